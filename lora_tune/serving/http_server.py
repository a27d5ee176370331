"""uvicorn, with the limits that it lacks: slow heads, unread answers, too many connections; and a stop that drains."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lora_tune.errors import UsageError
from lora_tune.serving.guard import Gate
from lora_tune.serving.settings import Caps

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lora_tune.serving.backend import Backend

GRACE_S = 4.0  # for running answers after SIGTERM; then 0.5 s for the connections to close
_CONNECTIONS_S = 0.5


def protocol_with(caps: Caps) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 with the time and number limits of `caps` for connections."""

    class Limited(H11Protocol):
        _late: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > caps.connections:
                transport.abort()
                return
            self._late = self.loop.call_later(caps.header_s, self._drop)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before or (self.cycle is not None and not self.cycle.response_complete):
                self._cancel("_late")
            elif self._late is None and not self.transport.is_closing():  # the first bytes of another request
                self._late = self.loop.call_later(caps.header_s, self._drop)

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel("_late")
            self._cancel("_unread")
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self._unread or self.loop.call_later(caps.write_s, self._drop)

        def resume_writing(self) -> None:
            self._cancel("_unread")
            super().resume_writing()

        def _cancel(self, name: str) -> None:
            timer = getattr(self, name)
            if timer is not None:
                timer.cancel()
                setattr(self, name, None)

        def _drop(self) -> None:
            self.transport.abort()

    return Limited


class Server(uvicorn.Server):
    """A server on a socket that is bound already; signals are the caller's, `drain` is what they should start."""

    def __init__(self, app: FastAPI, backend: Backend, *, gate: Gate, caps: Caps) -> None:
        config = uvicorn.Config(
            app,
            http=protocol_with(caps),
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=max(1, round(caps.header_s)),
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)
        self._backend, self._gate = backend, gate
        self._draining: asyncio.Task[None] | None = None

    def capture_signals(self) -> AbstractContextManager[Any]:  # type: ignore[override]
        """Nothing: a library does not take the process's signals."""
        return nullcontext()

    def drain(self) -> None:
        """Refuse new requests with 503, let the running answers end for `GRACE_S` seconds, then stop. In the loop."""
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            self.force_exit = self.should_exit = True

    async def _drain(self) -> None:
        self._gate.close()
        await self._backend.close(grace_s=GRACE_S)
        await asyncio.sleep(0)  # the last pieces go to their connections
        self.should_exit = True


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises: UsageError where the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio sends small answers at once (TCP_NODELAY) only where the socket says that it is TCP: 44 ms an answer
        found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(address)
        except OSError:
            found.close()
            raise
    except OSError as error:
        reason = f"{host} port {port} cannot be had: {error.strerror}"
        raise UsageError(reason, "choose another --port, or 0 for a free one") from None
    found.setblocking(False)
    return found

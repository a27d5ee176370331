"""The real HTTP server, in a thread of the test's process, for the tests of the compare page and its routes."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from lora_tune.serving.api import build_app
from lora_tune.serving.backend import Backend
from lora_tune.serving.settings import ServeSettings

EXAMPLE = Path(__file__).resolve().parent.parent / "adapters" / "example"


@dataclass(frozen=True)
class Served:
    """A server that answers at `url` until `ended`."""

    url: str
    server: uvicorn.Server
    ended: Future[None]
    loop: asyncio.AbstractEventLoop

    def cut(self) -> None:
        """Break every open connection, as a cable would."""
        for connection in list(self.server.server_state.connections):
            self.loop.call_soon_threadsafe(connection.transport.abort)  # type: ignore[union-attr]

    def stop(self) -> None:
        """End the server; nothing listens there any more."""
        self.server.should_exit = self.server.force_exit = True
        self.ended.result(timeout=30)


class Servers:
    """Servers in one event loop of one thread, as engines ask of those who call them."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._served: list[Served] = []
        self._backends: dict[int, Backend] = {}

    def start(self, backend: Backend, settings: ServeSettings) -> Served:
        """Serve a backend at a free port; several servers may have the same one."""
        self._backends[id(backend)] = backend
        listening = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            build_app(backend, settings), log_level="critical", lifespan="off", ws="none", loop="asyncio"
        )
        server = uvicorn.Server(config)
        ended = self._run(server.serve(sockets=[listening]))
        served = Served(f"http://127.0.0.1:{listening.getsockname()[1]}/", server, ended, self._loop)
        self._served.append(served)
        return served

    def close(self) -> None:
        """End all servers, then their engines."""
        for served in self._served:
            served.stop()
        for backend in self._backends.values():
            self._run(backend.close(grace_s=0)).result(timeout=30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


def call(url: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None) -> Reply:
    """GET, or POST of a body (bytes as they are, anything else as JSON)."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    kind = {} if data is None else {"content-type": "application/json"}
    request = urllib.request.Request(url, data, {**kind, **(headers or {})}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return Reply(reply.status, {k.lower(): v for k, v in reply.headers.items()}, reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return Reply(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())

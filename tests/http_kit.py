"""The server as `lora-tune serve` runs it, in a thread of the test's process; raw connections; an engine by script."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.data.chat_template import ChatTemplate
from lora_tune.serving.api import build_app
from lora_tune.serving.backend import Backend, Finished, Piece, Request, ServedModel, Statistics
from lora_tune.serving.guard import Gate
from lora_tune.serving.http_server import Server, bound_socket
from lora_tune.serving.settings import ServeSettings

JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Running:
    """A server that answers at `url`."""

    url: str
    port: int
    server: Server
    loop: asyncio.AbstractEventLoop

    def raw(self, data: bytes = b"") -> socket.socket:
        """A connection, with these bytes sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(data)
        return connection

    def ask(
        self, path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> Reply:
        """One request on a connection of its own: bytes as they are, anything else as JSON."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        method = method or ("GET" if body is None else "POST")
        all_headers = {"host": f"127.0.0.1:{self.port}", "connection": "close", **(JSON if data else {})}
        all_headers |= {"content-length": str(len(data))} if data or method == "POST" else {}
        all_headers |= headers or {}
        lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in all_headers.items() if v is not None)]
        with self.raw("\r\n".join([*lines, "", ""]).encode("latin-1") + data) as connection:
            return reply_of(read_all(connection))


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


def read_all(connection: socket.socket) -> bytes:
    """Everything until the other side closes."""
    parts = []
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionResetError:
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


def reply_of(data: bytes) -> Reply:
    """A reply as it stands on the wire; chunks are joined."""
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        joined, rest = b"", body
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            joined += rest[: int(size or b"0", 16)]
            rest = rest[int(size or b"0", 16) + 2 :]
        body = joined
    return Reply(int(first.split()[1]) if len(first.split()) > 1 else 0, headers, body)


@contextmanager
def serving(backend: Backend, *several: ServeSettings) -> Iterator[list[Running]]:
    """One server for each of the settings, all over one engine and in one event loop; at the end all are closed."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    running, ends = [], []
    for settings in several:
        gate, listening = Gate(), bound_socket("127.0.0.1", 0)
        server = Server(build_app(backend, settings, gate=gate), backend, gate=gate, caps=settings.caps)
        listening.listen(1024)
        ends.append(asyncio.run_coroutine_threadsafe(server.serve(sockets=[listening]), loop))
        port = listening.getsockname()[1]
        running.append(Running(f"http://127.0.0.1:{port}", port, server, loop))
    try:
        yield running
    finally:
        for one in running:
            one.server.should_exit = one.server.force_exit = True
        for end in ends:
            end.result(timeout=30)
        asyncio.run_coroutine_threadsafe(backend.close(grace_s=0), loop).result(timeout=30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=30)
        loop.close()


class Scripted:
    """An engine that says what it is told to say, token by token, by a real template."""

    def __init__(self, chat: ChatTemplate, answer: str, *, pause_s: float = 0.0) -> None:
        self._chat, self._pause_s = chat, pause_s
        self.ids = chat.tokenizer.encode(answer, add_special_tokens=False)
        self.asked: list[Request] = []

    def models(self) -> list[ServedModel]:
        return [ServedModel("scripted", None, 1, 4096)]

    def chat(self, model: str) -> ChatTemplate:
        return self._chat

    async def stream(self, request: Request) -> AsyncGenerator[Piece | Finished, None]:
        self.asked.append(request)
        said = ""
        for count in range(1, len(self.ids) + 1):
            await asyncio.sleep(self._pause_s)
            text = str(self._chat.tokenizer.decode(self.ids[:count], skip_special_tokens=True))
            new, said = ("", said) if text.endswith("\ufffd") else (text[len(said) :], text)
            yield Piece(new, (self.ids[count - 1],))
        yield Finished("stop", len(request.prompt_ids), len(self.ids) + 1)

    async def load(self, name: str, folder: Path) -> None:
        raise NotImplementedError

    async def unload(self, name: str) -> None:
        raise NotImplementedError

    def statistics(self) -> Statistics:
        return Statistics(0, 0, 0, 0, 0, 0.0, 0)

    async def close(self, *, grace_s: float) -> None:
        return

"""What stands before every route, unknown ones included: who asks, from which page, and how large and slow a body is.

Pure ASGI. With a token everything needs it, but for the paths that are public: `/health/live` and the page's empty
shell. Without one, only this machine can ask: the `Host` that a browser names must be this machine (a foreign name that
resolves to 127.0.0.1 is refused), and a page may ask only if this server gave it out. There are no CORS headers.
A body is read whole and parsed before a route sees it: at most so many bytes, within so many seconds.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from lora_tune.serving.json_body import parse_body
from lora_tune.serving.refusals import Refusal, draining
from lora_tune.serving.settings import LOOPBACK_NAMES, ServeSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
Seen = Callable[[MutableMapping[str, Any], int, float], None]
"""Called after every answer: scope, status, seconds."""

LIVE = "/health/live"
_DISCARD_BYTES, _DISCARD_S = 8 << 20, 1.0  # what is still read of a refused body, so that its sender reads the answer
_HEAD_BYTES = 16 << 10
_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class Gate:
    """Open until the server is about to stop; then every new request is answered with 503, but for `/health/live`."""

    def __init__(self) -> None:
        self.is_open = True

    def close(self) -> None:
        """Answer nothing new from now on."""
        self.is_open = False


class Guard:
    """The middleware. `public` are the paths that GET may have without a token."""

    def __init__(self, app: App, settings: ServeSettings, gate: Gate, public: Iterable[str], seen: Seen) -> None:
        self._app, self._gate, self._seen = app, gate, seen
        self._caps = settings.caps
        self._token = None if settings.token is None else _digest(settings.token.encode())
        self._public = frozenset(public) | {LIVE}
        self._held = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Check a request and hand it on, its body read and parsed into `scope["state"]["json"]`, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        began, status = time.monotonic(), 500
        body: bytes | None = None
        headers = _Headers(scope)

        async def answered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        try:
            try:
                self._check_sender(scope, headers)
                self._check_head(scope, headers)
                body = await self._body(receive, headers)
                if body:
                    scope.setdefault("state", {})["json"] = parse_body(body, caps=self._caps)
            except Refusal as refusal:
                left = None if body is not None or not headers.has_body else receive
                await _refuse(refusal, answered, left=left, patience=headers.patience)
                return
            await self._app(scope, _replayed(body, receive), answered)
        finally:
            self._seen(scope, status, time.monotonic() - began)

    def _check_sender(self, scope: MutableMapping[str, Any], headers: _Headers) -> None:
        """Raises: Refusal where the sender may not ask."""
        is_public = scope["method"] in ("GET", "HEAD") and scope["path"] in self._public
        if self._token is not None:
            given = headers.one(b"authorization")
            scheme, _, token = given.partition(b" ")
            right = hmac.compare_digest(_digest(token.strip()), self._token) and scheme.lower() == b"bearer"
            if not right and not is_public:
                said = "the token is wrong" if given else "a token is needed: Authorization: Bearer TOKEN"
                raise Refusal(401, said, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        else:
            host = headers.one(b"host").decode("latin-1")
            if _host_name(host) not in LOOPBACK_NAMES:
                raise Refusal(421, "this server answers as localhost alone; set a token to serve other names")
            origin = headers.one(b"origin").decode("latin-1")
            if origin and origin not in (f"http://{host}", f"https://{host}"):
                raise Refusal(403, "pages of other origins may not ask this server")
            site, mode = headers.one(b"sec-fetch-site"), headers.one(b"sec-fetch-mode")
            if site in (b"cross-site", b"same-site") and not (is_public and mode == b"navigate"):
                raise Refusal(403, "pages of other origins may not ask this server")
        if not self._gate.is_open and scope["path"] != LIVE:
            raise draining()

    def _check_head(self, scope: MutableMapping[str, Any], headers: _Headers) -> None:
        """Raises: Refusal for a body where none belongs, of another type than JSON, or announced as too large."""
        if len(scope["path"]) > 512 or len(scope.get("query_string", b"")) > 1024:
            raise Refusal(414, "the path is too long")
        if headers.size > _HEAD_BYTES:
            raise Refusal(431, f"the head has more than {_HEAD_BYTES:,} bytes")
        if not headers.has_body:
            return
        if scope["method"] in ("GET", "HEAD", "OPTIONS", "DELETE"):
            raise Refusal(400, f"{scope['method']} has no body")
        kind = headers.one(b"content-type").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise Refusal(415, "the body must be application/json")
        if headers.one(b"content-encoding").strip().lower() not in (b"", b"identity"):
            raise Refusal(415, "a compressed body is not read")
        if headers.length > self._caps.body_bytes:
            raise self._too_large()

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the body has more than {self._caps.body_bytes:,} bytes")

    async def _body(self, receive: Receive, headers: _Headers) -> bytes:
        """The whole body. Raises: Refusal where it is too large, too slow, or too much is being received at once."""
        if not headers.has_body:
            return b""
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._caps.body_s):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise Refusal(400, "the client left")
                    part = message.get("body", b"")
                    size, self._held = size + len(part), self._held + len(part)
                    if size > self._caps.body_bytes:
                        raise self._too_large()
                    if self._held > self._caps.held_bytes:
                        raise Refusal(429, "too many bodies at once; ask again", headers={"retry-after": "1"})
                    parts.append(part)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(408, f"the body was not whole within {self._caps.body_s:g} s") from None
        finally:
            self._held -= size


class _Headers:
    """The headers of a request that decide something here; one that is there twice counts as its joined values."""

    def __init__(self, scope: MutableMapping[str, Any]) -> None:
        self._all: list[tuple[bytes, bytes]] = scope["headers"]
        self.size = sum(len(name) + len(value) for name, value in self._all)
        length = self.one(b"content-length")
        self.length = int(length) if length.isdigit() else 0
        self.has_body = self.length > 0 or bool(self.one(b"transfer-encoding"))
        self.patience = 0.0 if self.one(b"expect") else _DISCARD_S

    def one(self, name: bytes) -> bytes:
        """Its value, "" where it is not there."""
        return b", ".join(value for key, value in self._all if key == name)


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _host_name(host: str) -> str:
    """`localhost` of `localhost:8000`, `::1` of `[::1]:8000`; "" where it is no host."""
    try:
        parts = urlsplit(f"//{host}")
        return "" if parts.path or parts.username is not None or parts.query else (parts.hostname or "")
    except ValueError:
        return ""


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` for the routes: the body at once, then whatever comes, which is the client's leaving."""
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay


async def _refuse(refusal: Refusal, send: Send, *, left: Receive | None, patience: float) -> None:
    """Answer with the refusal. What is `left` of the body is thrown away for a moment, then the connection ends."""
    if left is not None and patience and refusal.status != 408:
        await _discard(left, patience)
    body = refusal.body()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    if left is not None:
        headers["connection"] = "close"
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": HTTPStatus(refusal.status), "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def _discard(receive: Receive, seconds: float) -> None:
    """Throw away what comes within so many seconds, or the rest of the body where it is shorter."""
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while size < _DISCARD_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
    except TimeoutError:
        return

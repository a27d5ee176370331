"""The HTTP server as an application: OpenAI's endpoints over one backend, behind the guard (guard.py)."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from lora_tune.errors import LoraTuneError
from lora_tune.serving import web
from lora_tune.serving.asked import read_chat, read_completion, read_load, read_unload
from lora_tune.serving.backend import Backend, UnknownModel
from lora_tune.serving.completions import Completions
from lora_tune.serving.guard import LIVE, Gate, Guard
from lora_tune.serving.json_body import body_of
from lora_tune.serving.metrics import CONTENT_TYPE, Metrics
from lora_tune.serving.prompting import Prompting
from lora_tune.serving.refusals import Refusal, bad, by_status, refusal_of, too_slow
from lora_tune.serving.sending import ClientLeft, EventStream, begun, unless_client_leaves
from lora_tune.serving.settings import MODEL_NAME, ServeSettings
from lora_tune.serving.wire import model_object

Json = dict[str, Any]


def build_app(backend: Backend, settings: ServeSettings, *, gate: Gate | None = None) -> FastAPI:
    """The application that serves this backend. Closing `gate` makes it refuse everything new."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    prompting = Prompting(backend)
    page = web.router(backend, prompting=prompting, votes=settings.votes, caps=settings.caps)
    app.include_router(page)
    api = _Api(backend, settings, prompting)
    for path, methods, handler in api.routes():
        app.add_api_route(path, handler, methods=methods, response_model=None)
    app.state.paths = sorted({getattr(route, "path", "") for route in (*page.routes, *app.routes)} - {""})
    metrics = Metrics(backend, routes=app.state.paths)
    api.start(metrics, Completions(backend, prompting=prompting, metrics=metrics, caps=settings.caps))
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)

    def seen(scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        metrics.answered(scope["method"], scope["path"], status, seconds)

    app.add_middleware(Guard, settings=settings, gate=gate or Gate(), public=web.SHELL, seen=seen)
    return app


class _Api:
    """The handlers of OpenAI's endpoints and of those that operators ask."""

    def __init__(self, backend: Backend, settings: ServeSettings, prompting: Prompting) -> None:
        self._backend, self._settings, self._prompting = backend, settings, prompting
        self._one_load = asyncio.Lock()

    def start(self, metrics: Metrics, completions: Completions) -> None:
        """What the handlers need, once all routes are known."""
        self._metrics, self._completions = metrics, completions

    def routes(self) -> list[tuple[str, list[str], Any]]:
        """Path, methods and handler of each."""
        return [
            ("/v1/models", ["GET"], self.models),
            ("/v1/models/{name:path}", ["GET"], self.model),
            ("/v1/chat/completions", ["POST"], self.chat),
            ("/v1/completions", ["POST"], self.text),
            ("/v1/load_lora_adapter", ["POST"], self.load),
            ("/v1/unload_lora_adapter", ["POST"], self.unload),
            ("/health", ["GET"], self.health),
            (LIVE, ["GET"], self.live),
            ("/metrics", ["GET"], self.metrics),
        ]

    async def models(self) -> JSONResponse:
        """The base and its adapters."""
        return JSONResponse({"object": "list", "data": [model_object(one) for one in self._backend.models()]})

    async def model(self, name: str) -> JSONResponse:
        """One of them."""
        for one in self._backend.models():
            if one.name == name:
                return JSONResponse(model_object(one))
        raise UnknownModel(f"no model {name[:80]!r} is served here", "GET /v1/models lists them")

    async def chat(self, request: Request) -> Response:
        """An answer to a conversation."""
        settings = self._settings
        asked = read_chat(body_of(request), caps=settings.caps, temperature=settings.temperature)
        if asked.wanted.stream == "stream":
            return await self._stream(request, self._completions.chat_chunks(asked))
        return await self._whole(request, self._completions.chat(asked))

    async def text(self, request: Request) -> Response:
        """Text that goes on where other text ends."""
        settings = self._settings
        asked = read_completion(body_of(request), caps=settings.caps, temperature=settings.temperature)
        if asked.wanted.stream == "stream":
            return await self._stream(request, self._completions.text_chunks(asked))
        return await self._whole(request, self._completions.text(asked))

    async def _whole(self, request: Request, work: Any) -> Response:
        seconds = self._settings.caps.request_s
        until = asyncio.get_running_loop().time() + seconds
        try:
            return JSONResponse(await unless_client_leaves(request.receive, work, until=until))
        except TimeoutError:
            raise too_slow(seconds) from None

    async def _stream(self, request: Request, chunks: Any) -> Response:
        seconds = self._settings.caps.request_s
        until = asyncio.get_running_loop().time() + seconds
        try:
            first = await unless_client_leaves(request.receive, begun(chunks), until=until)
        except TimeoutError:
            raise too_slow(seconds) from None
        return EventStream(first, until=until, seconds=seconds)

    async def load(self, request: Request) -> Response:
        """Serve another adapter; vLLM's body and answer."""
        root = self._root()
        name, path = read_load(body_of(request))
        if MODEL_NAME.fullmatch(name) is None:
            raise bad("lora_name", "must be a to z, 0 to 9, _ and -, at most 64, a letter or number first")
        folder = _below(root, path)
        async with self._one_load:
            if len(self._backend.models()) > self._settings.caps.adapters:
                raise Refusal(400, f"at most {self._settings.caps.adapters} adapters at once; unload one", code="full")
            await self._backend.load(name, folder)
        return Response(f"Success: LoRA adapter '{name}' added successfully.", media_type="text/plain")

    async def unload(self, request: Request) -> Response:
        """Serve an adapter no more; vLLM's body and answer."""
        self._root()
        name = read_unload(body_of(request))
        adapters = {model.name for model in self._backend.models() if model.parent is not None}
        if name not in adapters:
            raise UnknownModel(f"no adapter {name[:80]!r} is served here", "GET /v1/models lists them")
        await self._backend.unload(name)
        self._metrics.forget(name)
        return Response(f"Success: LoRA adapter '{name}' removed successfully.", media_type="text/plain")

    def _root(self) -> Path:
        if self._settings.loading is None:
            said = "adapters are not loaded on request; the server's --allow-loading FOLDER allows it"
            raise Refusal(403, said, code="loading_is_off")
        return self._settings.loading

    async def health(self) -> JSONResponse:
        """Whether the engine answers, and how busy it is."""
        now = self._backend.statistics()
        models = len(self._backend.models())
        return JSONResponse(
            {"status": "ok", "models": models, "running": now.running, "waiting": now.waiting, "queue": now.queue}
        )

    async def live(self) -> JSONResponse:
        """Only that the process answers; needs no token."""
        return JSONResponse({"status": "ok"})

    async def metrics(self) -> Response:
        """Prometheus' page."""
        return Response(self._metrics.page(), headers={"content-type": CONTENT_TYPE})


def _below(root: Path, path: str) -> Path:
    """The folder that a request names, which must lie below the root. Raises: Refusal."""
    refusal = bad("lora_path", "must name an adapter folder below the folder of --allow-loading")
    if "\0" in path:
        raise refusal
    try:
        folder = (root / path).resolve()
        inside = folder.is_relative_to(root.resolve()) and folder != root.resolve() and folder.is_dir()
    except (OSError, RuntimeError):  # a name that is too long, links in a circle
        raise refusal from None
    if not inside:
        raise refusal
    return folder


def _refused(request: Request, error: Any) -> Response:
    refusal = error if isinstance(error, Refusal) else refusal_of(error)
    return Response(refusal.body(), refusal.status, headers=refusal.headers, media_type="application/json")


def _http(request: Request, error: Any) -> Response:
    found = _refused(request, by_status(error.status_code))
    found.headers.update(error.headers or {})
    return found


def _invalid(request: Request, error: Any) -> Response:
    where = ".".join(str(part) for part in error.errors()[0]["loc"][1:])
    return _refused(request, bad(where or "body", "is wrong or missing"))


def _left(request: Request, error: Any) -> Response:
    return Response(status_code=499)  # nobody reads it


def _fault(request: Request, error: Any) -> Response:
    """A fault of the program: the traceback goes to the server's log alone."""
    return _refused(request, Refusal(500, "a fault in the server; its log says more"))


_HANDLERS: dict[Any, Any] = {
    Refusal: _refused,
    LoraTuneError: _refused,
    HTTPException: _http,
    RequestValidationError: _invalid,
    ClientLeft: _left,
    Exception: _fault,
}

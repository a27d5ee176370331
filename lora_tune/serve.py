"""`lora-tune serve --adapter NAME=FOLDER …`: an OpenAI-compatible server, many adapters over one base.

1. who may ask, 2. the adapters, and the base that they share, verified before a weight is read, 3. the address, taken
before the base is loaded, 4. the engine, 5. the server, until a signal: running answers end, the queue gets 503.
"""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lora_tune.errors import Problem, UsageError
from lora_tune.interrupts import handled_by, signal_name
from lora_tune.serving.adapter_names import named_folders
from lora_tune.serving.settings import TOKEN_VARIABLE, Caps, Quantize, ServeSettings, is_loopback
from lora_tune.terminal import activity, messages, print_json, print_problems, results, run_app

if TYPE_CHECKING:
    import socket

    from lora_tune.recipe import Base
    from lora_tune.serving.backend import Backend

app = typer.Typer(help="Serve adapters over one base, with OpenAI's API.", add_completion=False)
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")
_TOKEN_LENGTH = 16
_CAPS = Caps()
_BACKLOG = 1024


@dataclass(frozen=True)
class Address:
    """Where the server listens, before the port is known where it is 0."""

    host: str
    port: int


def serve(
    base: Base,
    adapters: dict[str, Path],
    *,
    address: Address,
    settings: ServeSettings,
    limits: dict[str, int | None],
    shown: dict[str, Any],
    trust_remote_code: str | None = None,
) -> int:
    """Serve until a signal comes; returns its number. `shown` says how the start is printed (`json`).

    Raises: UsageError where the address cannot be had, and what starting the engine raises.
    """
    from lora_tune.serving.http_server import bound_socket

    listening = bound_socket(address.host, address.port)
    try:
        with activity(f"loading {Path(base.name).name} ({base.quantize})"):
            from lora_tune.serving.engine import Limits
            from lora_tune.serving.local import LocalBackend

            given = {name: value for name, value in limits.items() if value is not None}
            backend = LocalBackend.start(
                base, adapters=adapters, limits=Limits(**given), trust_remote_code=trust_remote_code
            )
        listening.listen(_BACKLOG)  # whoever reads the address may connect at once
        _announce(backend, listening, settings, shown=shown)
        return asyncio.run(_serve(backend, listening, settings))
    finally:
        listening.close()


async def _serve(backend: Backend, listening: socket.socket, settings: ServeSettings) -> int:
    """Answer requests until a signal; returns its number."""
    from lora_tune.serving.api import build_app
    from lora_tune.serving.guard import Gate
    from lora_tune.serving.http_server import Server

    gate, loop, caught = Gate(), asyncio.get_running_loop(), list[int]()
    server = Server(build_app(backend, settings, gate=gate), backend, gate=gate, caps=settings.caps)

    def stop(number: int, frame: Any) -> None:
        caught.append(number)
        loop.call_soon_threadsafe(server.drain)

    with activity("serving", display="own"), handled_by(stop):
        await server.serve(sockets=[listening])
    return caught[0] if caught else 0


def _announce(backend: Backend, listening: socket.socket, settings: ServeSettings, *, shown: dict[str, Any]) -> None:
    """Where the server is, what it serves, and two calls to copy. Flushed: whoever waits for the address reads it."""
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    models = [model.name for model in backend.models()]
    if shown["json"]:
        print_json({"url": url, "models": models, "token": "needed" if settings.token else "none"})
        sys.stdout.flush()
        return
    lines = [
        f"serving {', '.join(models)} at {url} (the page: {url}/)",
        *calls(url, models[-1], token="needed" if settings.token else "none"),
    ]
    results().print("\n".join(lines))
    sys.stdout.flush()


def calls(url: str, model: str, *, token: Literal["needed", "none"]) -> tuple[str, str]:
    """Two commands to copy that ask a model: with curl, and with the official client."""
    header = f' -H "Authorization: Bearer ${TOKEN_VARIABLE}"' if token == "needed" else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    curl = f"curl {url}/v1/chat/completions{header} -H 'Content-Type: application/json' -d '{body}'"
    key = f'os.environ["{TOKEN_VARIABLE}"]' if token == "needed" else '"none"'
    code = (
        f'import os; from openai import OpenAI; client = OpenAI(base_url="{url}/v1", api_key={key}); '
        f'print(client.chat.completions.create(model="{model}", '
        'messages=[{"role": "user", "content": "Hello"}]).choices[0].message.content)'
    )
    return curl, f"python -c '{code}'"


def _token(given: str | None, host: str) -> str | None:
    """The token of the command line or the environment. Raises: UsageError where one is needed, or it is too short."""
    token = given if given is not None else os.environ.get(TOKEN_VARIABLE) or None
    if token is None and not is_loopback(host):
        reason = f"--host: other machines could ask this server, got {host!r}"
        raise UsageError(reason, f"set {TOKEN_VARIABLE} to a token, or serve on 127.0.0.1")
    if token is not None and (len(token) < _TOKEN_LENGTH or not token.isascii() or not token.isprintable()):
        reason = f"the token needs at least {_TOKEN_LENGTH} printable ASCII characters, got {len(token)} characters"
        raise UsageError(reason, "make one with: openssl rand -hex 16")
    return token


def _need_extra() -> None:
    """Raises: UsageError where a library that only this command needs is not installed."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(f"serve needs {', '.join(missing)}", "pip install 'lora_tune[serve]'")


def _folder(path: Path | None, option: str) -> Path | None:
    if path is not None and not path.is_dir():
        raise UsageError(Problem(f"{option}: no such folder", "name a folder of adapters", str(path)))
    return path


class EngineChoice(StrEnum):
    """Engines that serve adapters."""

    local = "local"
    vllm = "vllm"
    sglang = "sglang"
    llama_cpp = "llama.cpp"


class StartChoice(StrEnum):
    """What is done with another engine's command: it is printed, started and checked, or only checked."""

    print = "print"
    start = "start"
    check = "check"


@dataclass(frozen=True)
class _Engine:
    name: str
    program: Path | None
    folder: Path
    start: str
    wait_s: float


def _other_engine(
    engine: _Engine,
    adapters: dict[str, Path],
    base: Base,
    address: Address,
    *,
    token: str | None,
    shown: dict[str, Any],
) -> None:
    """Print, or start and check, another engine for these adapters (serving/serve_engine.py)."""
    from lora_tune.serving.engines import Wanted
    from lora_tune.serving.serve_engine import Start, serve_engine

    if address.port == 0:
        raise UsageError("another engine needs a port, got 0", "give --port")
    wanted = Wanted(engine.folder, address.host, address.port, engine.program, token)
    say = (lambda line: None) if shown["json"] else _say
    start = Start(engine.start, engine.wait_s)  # type: ignore[arg-type]
    facts = serve_engine(engine.name, adapters, base=base, wanted=wanted, start=start, say=say)  # type: ignore[arg-type]
    if shown["json"]:
        print_json({"exit_code": 0, **facts})


def _say(line: str) -> None:
    results().print(line)
    sys.stdout.flush()


@app.command("serve")
def command(
    base: Annotated[str | None, typer.Option("--base", help="The base; by default the one of the adapters.")] = None,
    adapter: Annotated[list[str] | None, typer.Option("--adapter", help="NAME=FOLDER, or a folder; several.")] = None,
    adapters: Annotated[Path | None, typer.Option("--adapters", help="A folder of adapter folders.")] = None,
    host: Annotated[str, typer.Option(help="Where to listen; another than this machine needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one, which is printed.")] = 8000,
    token: Annotated[str | None, typer.Option(help=f"Who asks must know it; better in {TOKEN_VARIABLE}.")] = None,
    quantize: Annotated[Quantize | None, typer.Option(help="Hold the base so, instead of as in training.")] = None,
    allow_loading: Annotated[
        Path | None, typer.Option("--allow-loading", help="Load adapters below this folder when a request says so.")
    ] = None,
    votes: Annotated[Path | None, typer.Option(help="Where the page's votes go (JSON lines).")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Of requests that do not say theirs.")] = 0.0,
    max_running: Annotated[int | None, typer.Option(min=1, help="Most answers made together.")] = None,
    max_queue: Annotated[int | None, typer.Option(min=0, help="Most requests that wait; more get 429.")] = None,
    max_context: Annotated[int | None, typer.Option(min=2, help="Most tokens of prompt and answer together.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = _CAPS.max_tokens,
    max_answers: Annotated[int, typer.Option(min=1, max=64, help="Most answers to one prompt (n).")] = _CAPS.answers,
    max_body: Annotated[int, typer.Option(min=1024, help="Most bytes of a request.")] = _CAPS.body_bytes,
    max_seconds: Annotated[float, typer.Option(min=1, help="Most seconds of a whole answer.")] = _CAPS.request_s,
    max_connections: Annotated[int, typer.Option(min=1, help="Most connections at once.")] = _CAPS.connections,
    trust_remote_code: Annotated[str | None, typer.Option(metavar="REPO", help="Run the code of this base.")] = None,
    engine: Annotated[EngineChoice, typer.Option(help="Another engine than the embedded one.")] = EngineChoice.local,
    start: Annotated[StartChoice, typer.Option(help="What is done with its command.")] = StartChoice.print,
    engine_python: Annotated[Path | None, typer.Option(help="Its Python, or its command; else on PATH.")] = None,
    engine_folder: Annotated[Path, typer.Option(help="Where exports for it go.")] = Path("served"),
    engine_wait: Annotated[float, typer.Option(min=1, help="Seconds until it must answer.")] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when it serves.")] = False,
) -> None:
    """Serve adapters over one base, with OpenAI's API and a page to compare them. Ctrl-C or TERM end it in peace."""
    _need_extra()
    caps = Caps(
        body_bytes=max_body, request_s=max_seconds, connections=max_connections, answers=max_answers,
        max_tokens=max_tokens,
    )  # fmt: skip
    loading = _folder(allow_loading, "--allow-loading")
    settings = ServeSettings(_token(token, host), loading, votes, temperature, caps)
    folders = named_folders([*(adapter or []), *([str(_folder(adapters, "--adapters"))] if adapters else [])])
    with activity("verifying the adapters"):
        from lora_tune.serving.served_base import served_base

        held = quantize.value if quantize else None
        section, notes = served_base(folders, name=base, quantize=held, trust_remote_code=trust_remote_code)
    print_problems([] if as_json else notes)
    if engine is not EngineChoice.local:
        at = _Engine(engine.value, engine_python, engine_folder, start.value, engine_wait)
        _other_engine(at, folders, section, Address(host, port), token=settings.token, shown={"json": as_json})
        return
    number = serve(
        section,
        folders,
        address=Address(host, port),
        settings=settings,
        limits={"rows": max_running, "queue": max_queue, "context": max_context},
        shown={"json": as_json},
        trust_remote_code=trust_remote_code,
    )
    ended = f"stopped by {signal_name(number)}: running answers have ended" if number else "the server has stopped"
    messages().print(ended)
    raise typer.Exit(128 + number if number else 0)


if __name__ == "__main__":
    sys.exit(run_app(app, name="python -m lora_tune.serve"))

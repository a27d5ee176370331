"""A warm process that runs `lora-tune run` in forks of itself, so that a case costs one run and no imports.

Started by `driver.Server` with the injector preloaded. It reads one JSON request a line from stdin and answers with
one line on stdout: `{"id", "code"}` (negative for a signal). What a fork takes from the server, and a fresh process
would do anew: imported modules, the answers of the child that renders chat templates, pictures (written anew, not drawn
anew), and the hash seed of strings. Random numbers are stirred in every fork. The proof at the end of a run is made by
a fork as well. `driver.process` runs the same case as a process of its own.
"""

from __future__ import annotations

import base64
import ctypes
import gc
import importlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

_RUN = subprocess.run
_proof = ["made"]  # or "left out"
_LONGEST_S = 120.0
_NO_POOL = "Invalid thread pool"
_HUNG = 99  # the code of a run that had to be ended
_renders: dict[bytes, subprocess.CompletedProcess[Any]] = {}  # of chat templates: the same in every case
_pictures: dict[str, bytes] = {}  # of each format the first that was drawn; drawing is a third of a small run
# where a signal can be sent from: the phase, and the function at whose start (the n-th time) it comes
PHASES = {
    "reading": "lora_tune.data.checking:read_conversations",
    "tokenizing": "lora_tune.data.token_file:token_file",
    "loading": "lora_tune.model.base:load_base",
    "training": "lora_tune.training.trainer:RunTrainer.compute_loss",
    "evaluating": "lora_tune.training.evaluations:Evaluations.run",
    "saving": "lora_tune.training.checkpoint:save",
    "comparing": "lora_tune.evaluation.evaluate:compare",
    "writing": "lora_tune.adapter.write:write_run",
}


def main() -> None:
    """Import everything, learn from one run what else it imports, then answer requests until stdin ends."""
    for name in ("lora_tune.run", "lora_tune.adapters", "lora_tune.training.trainer"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    injector().fault_disarm()
    gc.freeze()  # what was imported is not walked again by every collection in every fork
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _work(request)
        code = _wait(child, kill_after=request.get("kill_after"))
        if request.get("learn"):
            _learn(Path(request["learn"]))
        print(json.dumps({"id": request["id"], "code": code}), flush=True)


@cache
def injector() -> Any:
    """The preloaded injector, to be armed in a fork."""
    return ctypes.CDLL(os.environ["LD_PRELOAD"])


def _wait(child: int, *, kill_after: float | None) -> int:
    """The exit code of a fork, killed after that many seconds, or after the longest time that a run may take."""
    deadline = time.monotonic() + (_LONGEST_S if kill_after is None else kill_after)
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if kill_after is not None else _HUNG


def _learn(file: Path) -> None:
    """Import what a first run had imported, and keep the answers of its subprocesses."""
    known = json.loads(file.read_text())
    for name in known["modules"]:
        try:
            importlib.import_module(name)
        except Exception:  # a module that only exists after another one was imported in some way
            continue
    for key, out in known["renders"]:
        _renders[key.encode()] = subprocess.CompletedProcess([], 0, out.encode(), b"")
    _pictures.update({kind: base64.b64decode(text) for kind, text in known["pictures"].items()})
    gc.collect()
    gc.freeze()


def _work(request: dict[str, Any]) -> None:
    """One run in this fork; never returns."""
    code = 70
    try:
        code = _run(request)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(request: dict[str, Any]) -> int:
    case = Path(request["case"])
    work = case / "work"
    for name, number in (("out.txt", 1), ("err.txt", 2)):
        os.dup2(os.open(case / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644), number)
    os.chdir(work)
    tempfile.tempdir = str(work / "tmp")
    os.environ.update(LORA_TUNE_CACHE=str(work / "cache"), TMPDIR=str(work / "tmp"), XDG_CACHE_HOME=str(work / "cache"))
    _stir()
    _record_steps(case / "steps.txt")
    _draw_once()
    _proof[0] = request["proof"]
    subprocess.run = _fork_instead  # type: ignore[assignment]
    if sent := request.get("signal"):
        _send_at(sent["phase"], number=sent["number"], turn=sent.get("turn", 1), again=sent.get("again", 0))
    before = set(sys.modules)
    if fault := request.get("fault"):
        injector().fault_arm(
            os.fsencode(work), fault["mode"].encode(), ctypes.c_long(fault["at"]), fault.get("errno", 0)
        )
    from lora_tune.cli import main as command

    code = command(request["arguments"])
    if request.get("learn"):
        new = sorted(set(sys.modules) - before)
        renders = [(key.decode(), done.stdout.decode()) for key, done in _renders.items()]
        pictures = {kind: base64.b64encode(drawn).decode() for kind, drawn in _pictures.items()}
        Path(request["learn"]).write_text(json.dumps({"modules": new, "renders": renders, "pictures": pictures}))
    return code


def _stir() -> None:
    """Random numbers that differ in every fork, as they do in every process."""
    import numpy
    import torch

    seed = int.from_bytes(os.urandom(4), "little")
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def _record_steps(path: Path) -> None:
    """Write `process step loss` for every optimizer step that is taken, repeated ones included, outside of the fault's
    folder."""
    from lora_tune.training.trainer import RunTrainer

    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    original = RunTrainer.log

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            text = f"{os.getpid()} {self.state.global_step} {float(logs['loss']).hex()}\n"
            os.write(descriptor, text.encode())
        original(self, logs, start_time)

    RunTrainer.log = log  # type: ignore[method-assign]


def _draw_once() -> None:
    """Write pictures as matplotlib does, with the bytes of the first one of that format."""
    from matplotlib.figure import Figure

    draw = Figure.savefig

    def savefig(self: Any, target: Any, *, format: str, **options: Any) -> None:
        if format not in _pictures:
            buffer = io.BytesIO()
            draw(self, buffer, format=format, **options)
            _pictures[format] = buffer.getvalue()
        if isinstance(target, io.StringIO):
            target.write(_pictures[format].decode())
        elif hasattr(target, "write"):
            target.write(_pictures[format])
        else:
            with open(target, "wb") as stream:
                stream.write(_pictures[format])

    setattr(Figure, "savefig", savefig)  # noqa: B010 - a method of other types


def _send_at(phase: str, *, number: int, turn: int, again: int) -> None:
    """Send this process a signal when the function of a phase begins for the `turn`-th time; twice where `again`."""
    module_name, _, path = PHASES[phase].partition(":")
    owner: Any = importlib.import_module(module_name)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def watched(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == turn:
            os.kill(os.getpid(), number)
            if again:
                os.kill(os.getpid(), again)
        return original(*arguments, **named)

    setattr(owner, name, watched)
    for module in list(sys.modules.values()):  # those that imported it by name
        if getattr(module, "__name__", "").startswith("lora_tune") and getattr(module, name, None) is original:
            setattr(module, name, watched)


def _fork_instead(command: Any, **options: Any) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run`, with a fork in place of this project's own command, and a memory for rendered templates."""
    if list(command[:3]) == [sys.executable, "-m", "lora_tune"]:
        if _proof[0] != "made":
            return subprocess.CompletedProcess(command, 0, "{}", "")
        return _command_in_fork(list(command[3:]))
    if "template_child" in str(command[-1]):
        key = options["input"]
        if key not in _renders:
            _renders[key] = _RUN(command, **options)
        return _renders[key]
    return _RUN(command, **options)


def _command_in_fork(arguments: list[str]) -> subprocess.CompletedProcess[Any]:
    """A command of the project in a fork; its output goes to files beside the case's own."""
    folder = Path.cwd().parent
    names = [folder / f"proof-{number}.txt" for number in (1, 2)]
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            for caught in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(caught, signal.SIG_DFL)
            for number, name in enumerate(names, 1):
                os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644), number)
            from lora_tune.cli import main as command

            injector().fault_disarm()
            code = command(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    out, err = (name.read_text() for name in names)
    if _NO_POOL in out + err:  # of torch after a fork beside its threads, rarely; a process of its own has none of it
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        own = [sys.executable, "-m", "lora_tune", *arguments]
        return _RUN(own, env=environment, capture_output=True, text=True, check=False)
    return subprocess.CompletedProcess(arguments, os.waitstatus_to_exitcode(status), out, err)


if __name__ == "__main__":
    main()

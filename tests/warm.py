"""Commands of the project in forks of one warm process, which has imported what takes seconds to import.

A fork runs `lora_tune.cli.main` as the process would: own working folder, environment, output and exit code; it shares
no memory with the test. What a fresh process does beyond that, its start and its imports, is the subject of
test_cli.py, test_house.py, test_journey.py and test_verify.py, which start real ones. One server for a test process.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_MODULES = ("lora_tune.run", "lora_tune.eval", "lora_tune.adapters", "lora_tune.training.trainer", "lora_tune.merge")
_RUN = subprocess.run
_servers: list[subprocess.Popen[str]] = []


def command(
    arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What `python -m lora_tune ARGUMENTS`, or `-c CODE`, printed, and its exit code."""
    server = _server()
    with tempfile.TemporaryDirectory(prefix="lora_tune-warm-") as folder:
        request = {"arguments": list(arguments), "cwd": str(cwd), "env": dict(env or os.environ), "out": folder}
        assert server.stdin and server.stdout
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        assert answer, "the warm process has ended"
        out, err = ((Path(folder) / name).read_text(encoding="utf-8") for name in ("out", "err"))
    return subprocess.CompletedProcess(list(arguments), json.loads(answer), out, err)


def instead(words: Any, *more: Any, **options: Any) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run`, with a fork in place of the project's own command where its text is captured."""
    own = [sys.executable, "-m", "lora_tune"]
    if isinstance(words, list) and words[:3] == own and options.get("capture_output") and options.get("text"):
        return command(words[3:], cwd=Path(options.get("cwd") or Path.cwd()), env=options.get("env"))
    return _RUN(words, *more, **options)


def _server() -> subprocess.Popen[str]:
    if not _servers:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
        program = [sys.executable, "-c", "import warm; warm.serve()"]
        server = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        _servers.append(server)
        atexit.register(_stop, server)
    return _servers[0]


def _stop(server: subprocess.Popen[str]) -> None:
    assert server.stdin and server.stdout
    server.stdin.close()
    server.wait(timeout=10)
    server.stdout.close()


def serve() -> None:
    """Import, then answer requests, one JSON line each, until stdin ends; the answer is the exit code."""
    for name in _MODULES:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _work(request)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


def _work(request: dict[str, Any]) -> None:
    """One command in this fork; never returns."""
    code = 70
    try:
        for number, name in enumerate(("out", "err"), 1):
            os.dup2(os.open(Path(request["out"]) / name, os.O_CREAT | os.O_WRONLY, 0o600), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        subprocess.run = _nested  # type: ignore[assignment]
        if request["arguments"][:1] == ["-c"]:
            exec(compile(request["arguments"][1], "<block>", "exec"), {"__name__": "__main__"})
            code = 0
        else:
            from lora_tune.cli import main

            code = main(request["arguments"])
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _nested(words: Any, *more: Any, **options: Any) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run` inside a fork: the proof of a run is made by a fork of it."""
    own = [sys.executable, "-m", "lora_tune"]
    if not (isinstance(words, list) and words[:3] == own and options.get("capture_output")):
        return _RUN(words, *more, **options)
    with tempfile.TemporaryDirectory(prefix="lora_tune-warm-") as folder:
        request = {"arguments": words[3:], "cwd": str(Path.cwd()), "env": dict(os.environ), "out": folder}
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _work(request)
        _, status = os.waitpid(child, 0)
        out, err = ((Path(folder) / name).read_text(encoding="utf-8") for name in ("out", "err"))
    if "Invalid thread pool" in out + err:  # of torch after a fork beside its threads, rarely
        return _RUN(words, *more, **options)
    return subprocess.CompletedProcess(words, os.waitstatus_to_exitcode(status), out, err)

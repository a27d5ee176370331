"""Runs of several processes in forks of one warm process, each with the place that a launcher would give it.

What a real launcher does beyond that, ours and torchrun, is the subject of test_processes.py, which starts both. The
forks of a run share nothing but their files and what they tell each other over gloo. `Strike` sends one of them a
signal when a function begins.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import warm

ROOT = Path(__file__).resolve().parent.parent
_LONGEST_S = 90.0
_servers: list[subprocess.Popen[str]] = []


@dataclass(frozen=True)
class Strike:
    """The signal `number` to the process `rank` when `function` (module:path) begins for the `turn`-th time."""

    rank: int
    number: int
    turn: int = 1
    function: str = "lora_tune.training.trainer:RunTrainer.micro_step"


@dataclass(frozen=True)
class Ended:
    """How the processes ended, by rank: exit codes (negative: a signal), what each printed, and the seconds."""

    codes: tuple[int, ...]
    out: tuple[str, ...]
    err: tuple[str, ...]
    seconds: float


def run(arguments: Sequence[str], *, cwd: Path, world: int, strike: Strike | None = None) -> Ended:
    """`lora-tune run ARGUMENTS` in `world` processes that find each other; waits for the last one."""
    server = _server()
    with tempfile.TemporaryDirectory(prefix="lora_tune-ranks-") as folder:
        request: dict[str, Any] = {
            "arguments": ["run", *arguments],
            "cwd": str(cwd),
            "env": dict(os.environ),
            "out": folder,
        }
        request |= {"world": world, "strike": asdict(strike) if strike else None}
        assert server.stdin and server.stdout
        began = time.monotonic()
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        assert answer, "the warm process has ended"
        texts = [[(Path(folder) / str(rank) / name).read_text() for rank in range(world)] for name in ("out", "err")]
    return Ended(tuple(json.loads(answer)), tuple(texts[0]), tuple(texts[1]), time.monotonic() - began)


def _server() -> subprocess.Popen[str]:
    if not _servers:
        environment = {
            **os.environ,
            "TORCH_CPP_LOG_LEVEL": "FATAL",
            "DS_ACCELERATOR": "cpu",  # read when DeepSpeed is imported, below
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        }
        program = [sys.executable, "-c", "import ranks; ranks.serve()"]
        server = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        _servers.append(server)
        atexit.register(warm._stop, server)
    return _servers[0]


def serve() -> None:
    """Import, then answer requests, one JSON line each, until stdin ends; the answer is the exit codes."""
    divided = ("torch.distributed.fsdp", "deepspeed.runtime.zero.stage3")
    for name in (*warm._MODULES, "bitsandbytes", *divided, "matplotlib.figure"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        children = [_fork(request, rank, port) for port in [_free_port()] for rank in range(request["world"])]
        print(json.dumps(_wait(children)), flush=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _fork(request: dict[str, Any], rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    out = Path(request["out"]) / str(rank)
    out.mkdir()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["world"], "MASTER_PORT": port}
    texts = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    environment = request["env"] | (texts if request["world"] > 1 else {}) | {"GLOO_SOCKET_IFNAME": "lo"}
    if request["strike"] and request["strike"]["rank"] == rank:
        _watch(**request["strike"])
    warm._work({**request, "out": str(out), "env": environment})
    return 0


def _watch(*, rank: int, number: int, turn: int, function: str) -> None:
    """Send this process the signal when the function begins for the `turn`-th time."""
    module, _, path = function.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    calls = 0

    def watched(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == turn:
            os.kill(os.getpid(), number)
        return original(*arguments, **named)

    setattr(owner, name, watched)


def _wait(children: list[int]) -> list[int]:
    """The exit codes of all children; those that take too long are killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + _LONGEST_S
    while len(codes) < len(children):
        for child in [child for child in children if child not in codes]:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for child in [child for child in children if child not in codes]:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children]

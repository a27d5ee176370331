"""Runs cases under the injector, through a warm server or as processes of their own, and reads what became of them."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
RUN = ("run", "recipe.yaml")
RESUME = (*RUN, "--resume")


def build_injector(corpus: Path, folder: Path) -> Path:
    """Compile the corpus' injector into `folder`; returns the injector."""
    injector = folder / "fault.so"
    source = corpus / "cases" / "fault_injector" / "fault.c"
    compiler = shutil.which("gcc") or shutil.which("cc") or "cc"
    subprocess.run(
        [compiler, "-O2", "-fPIC", "-shared", "-o", injector, source, "-ldl"], check=True, capture_output=True
    )
    return injector


def environment(injector: Path, folder: Path, faults: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that runs under the injector; `faults` are the injector's variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FAULT_", "LORA_TUNE_", "HF_"))}
    return kept | {
        "LD_PRELOAD": str(injector),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_COLOR": "1",
        "MPLBACKEND": "Agg",
        **faults,
    }


@dataclass(frozen=True)
class Fault:
    """What strikes a run: the injector at operation `at`, a kill after seconds, or a signal in a phase."""

    mode: str = ""
    at: int = 0
    errno: int = 0
    kill_after_s: float | None = None
    signal: Mapping[str, Any] | None = None

    def as_request(self) -> dict[str, Any]:
        """The part of a request to the server that says what strikes."""
        strike = {"mode": self.mode, "at": self.at, "errno": self.errno} if self.mode else None
        return {"fault": strike, "kill_after": self.kill_after_s, "signal": self.signal}


@dataclass(frozen=True)
class Attempt:
    """One run of a case: its exit code (negative: the signal that killed it), the steps it took, what it printed."""

    code: int
    steps: tuple[tuple[int, str], ...]
    """(step, loss in hexadecimal) in the order in which they were taken."""
    err: str
    out: str = ""


@dataclass
class Server:
    """A warm process for runs (`server.py`). `faults`: variables of the injector that hold for all its runs."""

    injector: Path
    folder: Path
    faults: Mapping[str, str] = field(default_factory=dict)

    def __enter__(self) -> Server:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "operations.txt"
        watched = {"FAULT_DIR": str(self.folder / "nothing"), "FAULT_LOG": str(self.log), "FAULT_MODE": "count"}
        self._numbers = itertools.count(1)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            cwd=ROOT,
            env=environment(self.injector, self.folder, watched | dict(self.faults)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=60)

    def run(
        self,
        case: Path,
        arguments: Sequence[str],
        fault: Fault | None = None,
        *,
        learn: str = "",
        proof: Literal["made", "left out"] = "made",
    ) -> Attempt:
        """One run in `case/work` with this fault; waits for its end."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the server is not running")
        before = {name: _size(case / name) for name in ("steps.txt", "err.txt", "out.txt")}
        request = {"id": next(self._numbers), "case": str(case), "arguments": list(arguments), "learn": learn}
        request["proof"] = proof
        print(json.dumps(request | (fault or Fault()).as_request()), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server ended with {self._process.wait()}")
        return _attempt(case, json.loads(line)["code"], before)

    def warm(self, case: Path) -> None:
        """Learn from one whole run what else is imported."""
        self.run(case, RUN, learn=str(self.folder / "learned.json"))

    def operations(self, case: Path, arguments: Sequence[str] = RUN) -> tuple[Attempt, list[tuple[str, str]]]:
        """An undisturbed run, and its file operations: (operation, path below `work`) in order."""
        start = _size(self.log)
        attempt = self.run(case, arguments, Fault("count"))
        lines = self.log.read_bytes()[start:].decode().splitlines()
        work = f"{(case / 'work').resolve()}/"
        return attempt, [(line.split(" ", 3)[2], line.split(" ", 3)[3].removeprefix(work)) for line in lines]


def process(
    injector: Path, case: Path, arguments: Sequence[str], faults: Mapping[str, str], *, kill_after_s: float = 300.0
) -> Attempt:
    """The same as a process of its own, started by the command that a user types."""
    work = case / "work"
    home = {"LORA_TUNE_CACHE": str(work / "cache"), "TMPDIR": str(work / "tmp"), "FAULT_DIR": str(work)}
    env = environment(injector, case, home | dict(faults))
    run = subprocess.Popen(
        [sys.executable, "-m", "lora_tune", *arguments],
        cwd=work,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = run.communicate(timeout=kill_after_s)
    except subprocess.TimeoutExpired:
        run.kill()
        out, err = run.communicate()
    return Attempt(run.returncode, (), err, out)


@dataclass(frozen=True)
class Result:
    """What a finished run is judged by."""

    losses: tuple[tuple[int, str], ...]
    """(step, loss in hexadecimal) of `metrics.jsonl`."""
    files: Mapping[str, str]
    """sha256 of what must be equal to the last byte."""
    untidy: tuple[str, ...]
    """What is left over: names that the folder does not document, or a checkpoint that was never finished."""


def result(case: Path) -> Result | None:
    """The outcome of a case; None where its run is not finished."""
    from lora_tune.adapter.folder import FILES, MANIFEST

    folder = case / "work" / "out"
    if not (folder / MANIFEST).is_file():
        return None
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = tuple((row["step"], row["loss_hex"]) for row in rows if "loss" in row)
    equal = ("adapter_model.safetensors", "adapter_config.json", "test_vectors.json", "tokenizer.json", "ledger.json")
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in equal}
    left = [path.name for path in folder.iterdir() if path.name not in FILES and path.name != "checkpoints"]
    left += [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith((".w", ".r"))]
    return Result(losses, files, tuple(sorted(left)))


def _attempt(case: Path, code: int, before: Mapping[str, int]) -> Attempt:
    new = {}
    for name, start in before.items():
        path = case / name
        new[name] = path.read_bytes()[start:].decode(errors="replace") if path.exists() else ""
    steps = [line.split() for line in new["steps.txt"].splitlines()]
    return Attempt(code, tuple((int(step), loss) for _, step, loss in steps), new["err.txt"], new["out.txt"])


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

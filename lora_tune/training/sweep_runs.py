"""The runs of a sweep as processes: `lora-tune run … --resume`, as many at a time as asked, watched while they train.

A run that is not worth going on with is stopped by TERM, which leaves its checkpoint. So does the end of the sweep
itself, whichever way that comes: the next one goes on with `--resume`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_tune.errors import Problem
from lora_tune.training.metrics_file import METRICS, read_metrics
from lora_tune.training.sweep_study import StudyRun

_EVERY_S = 0.2  # between two looks at the runs
_TERM_S = 120.0  # a stopped run finishes its step and writes a checkpoint; then it is killed
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended: its held-out loss where it finished, else why not; `code` is its exit code."""

    run: StudyRun
    state: Literal["complete", "pruned", "failed"]
    loss: float | None
    seconds: float
    code: int
    problems: tuple[Problem, ...] = ()


@dataclass(slots=True)
class _Going:
    run: StudyRun
    process: subprocess.Popen[bytes]
    folder: Path
    start: float
    card: str | None
    pruned_at: float | None = None
    seen: int = -1


@dataclass
class SweepRuns:
    """The processes of a sweep in `folder`, at most one for each entry of `cards` at a time.

    `command` is what every run starts with, `lora-tune run` and the recipe among it. Of several cards each run gets
    one; None leaves a run all of them.
    """

    folder: Path
    command: Sequence[str]
    cards: Sequence[str | None]
    _going: list[_Going] = field(default_factory=list)

    @property
    def free(self) -> int:
        """How many more runs may be started now."""
        return len(self.cards) - len(self._going)

    def folder_of(self, number: int) -> Path:
        """The adapter folder of a run."""
        return self.folder / f"{number:03d}"

    def log_of(self, number: int) -> Path:
        """What a run says while it works."""
        return self.folder / "logs" / f"{number:03d}.log"

    def start(self, run: StudyRun) -> None:
        """Start a run, or go on with what it left."""
        log = self.log_of(run.number)
        log.parent.mkdir(parents=True, exist_ok=True)
        taken = [going.card for going in self._going]
        card = next(card for card in self.cards if card is None or card not in taken)
        arguments = [*self.command, *(f"{key}={value}" for key, value in run.values.items())]
        arguments += [f"output={self.folder_of(run.number)}", "--resume", "--json"]
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": card} if card is not None else {})}
        with log.open("ab") as messages, log.with_suffix(".json").open("wb") as results:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=results,
                stderr=messages,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the sweep, which stops its runs
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        self._going.append(_Going(run, process, self.folder_of(run.number), time.monotonic(), card))

    def wait(self, ended: Callable[[Ending], None]) -> None:
        """Watch the runs until at least one has ended; `ended` gets each that has."""
        while self._going:
            done = [going for going in self._going if going.process.poll() is not None]
            for going in done:
                self._going.remove(going)
                ended(self._ending(going))
            if done:
                return
            for going in self._going:
                self._watch(going)
            time.sleep(_EVERY_S)

    def _watch(self, going: _Going) -> None:
        """Report new held-out losses; stop the run where it is not worth going on with."""
        if going.pruned_at is not None:
            if time.monotonic() - going.pruned_at > _TERM_S:
                going.process.kill()
            return
        for step, loss in held_out_losses(going.folder):
            if step > going.seen:
                going.seen = step
                if going.run.report(step, loss) == "prune":
                    going.pruned_at = time.monotonic()
                    going.process.terminate()
                    return

    def _ending(self, going: _Going) -> Ending:
        code, seconds = going.process.returncode, time.monotonic() - going.start
        answer = _answer(self.log_of(going.run.number).with_suffix(".json"))
        score = answer.get("scores", {}).get("loss", {}).get("adapter")
        if code == 0 and score is not None:
            for step, loss in held_out_losses(going.folder):  # of the last moments
                going.run.report(step, loss)
            return Ending(going.run, "complete", float(score), seconds, code)
        if going.pruned_at is not None:
            losses = held_out_losses(going.folder)
            return Ending(going.run, "pruned", losses[-1][1] if losses else None, seconds, code)
        problems = tuple(Problem(**one) for one in answer.get("problems", []) if one.get("severity") == "error")
        if not problems:
            words = self.log_of(going.run.number).read_text(encoding="utf-8", errors="replace").splitlines()
            said = f": {words[-1].strip()[:300]}" if words else ""
            problems = (Problem(f"ended with exit code {code}{said}", file=str(self.log_of(going.run.number))),)
        return Ending(going.run, "failed", None, seconds, code, problems)

    def stop(self) -> None:
        """Stop all runs by TERM and wait for their checkpoints."""
        for going in self._going:
            if going.process.poll() is None:
                going.process.terminate()
        end = time.monotonic() + _TERM_S
        for going in self._going:
            try:
                going.process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                going.process.kill()
                going.process.wait()
        self._going.clear()


def held_out_losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every evaluation of a run so far, finite ones alone."""
    rows = [row for row in read_metrics(folder / METRICS) if isinstance(row.get("eval"), Mapping)]
    found = [(row["step"], row["eval"].get("loss")) for row in rows]
    return [(int(step), float(loss)) for step, loss in found if isinstance(loss, (int, float))]


def _answer(path: Path) -> dict[str, Any]:
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _end_with_parent() -> None:
    """In the new process: TERM comes when the sweep dies, however it does, so that no run goes on unseen."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)

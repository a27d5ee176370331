"""A journey: named steps that need each other, at most some at a time, each a function or a process with a log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_tune.errors import CheckFailed, LoraTuneError, Problem

State = Literal["ok", "warning", "failed", "absent", "skipped"]
MOST_SECONDS = 900.0  # of one process, of which a minute would be long


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a step: `said` is what was found, or why it failed; `log` is the file that tells more."""

    name: str
    state: State
    said: str
    seconds: float = 0.0
    log: str | None = None


class Tolerable(Exception):
    """A step found something that the user should know, and the journey goes on."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step: `work` returns what it found and raises CheckFailed where it failed; without it the step is absent.

    `needs` are the names of steps that must have gone well before.
    """

    name: str
    needs: tuple[str, ...]
    work: Callable[[], str] | None
    absent: str = ""


def travel(
    steps: Sequence[Step], *, at_once: int, report: Callable[[Outcome], None], leave: Callable[[], None]
) -> list[Outcome]:
    """Take all steps, `at_once` of them at a time in their order; `report` gets each outcome as it comes.

    A step that raises CheckFailed has failed, and those that need it are skipped. `leave` is called at the end, however
    that comes, and stops what still runs.

    Raises:
        LoraTuneError: of another kind, from a step: the journey ends there.
    """
    outcomes: dict[str, Outcome] = {}
    amiss = {step.name for step in steps if not step.work}
    waiting = [step for step in steps if step.work]
    running: dict[Future[Outcome], Step] = {}

    def settle(outcome: Outcome) -> None:
        outcomes[outcome.name] = outcome
        if outcome.state not in ("ok", "warning"):
            amiss.add(outcome.name)
        report(outcome)

    with ThreadPoolExecutor(max_workers=at_once) as pool:
        try:
            while waiting or running:
                for step in list(waiting):
                    if missing := [name for name in step.needs if name in amiss]:
                        waiting.remove(step)
                        settle(Outcome(step.name, "skipped", f"needs {missing[0]}"))
                    elif len(running) < at_once and all(name in outcomes for name in step.needs):
                        waiting.remove(step)
                        running[pool.submit(_take, step)] = step
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    step = running.pop(future)
                    try:
                        settle(future.result())
                    except LoraTuneError as error:
                        report(Outcome(step.name, "failed", error.problems[0].reason))
                        raise
        finally:
            leave()
    for step in [step for step in steps if not step.work]:
        settle(Outcome(step.name, "absent", step.absent))
    return [outcomes[step.name] for step in steps]


def _take(step: Step) -> Outcome:
    start = time.monotonic()
    state: State = "ok"
    log = None
    try:
        said = step.work() if step.work else ""
    except Tolerable as found:
        state, said = "warning", str(found)
    except CheckFailed as error:
        state, log = "failed", error.problems[0].file
        said = "; ".join(part for part in (error.problems[0].reason, error.problems[0].fix) if part)
    return Outcome(step.name, state, said, time.monotonic() - start, log)


@dataclass
class Processes:
    """Verbs of this program as processes of their own, each with a log `logs/<name>.log` below `folder`.

    `environment` is added to that of this process, `where` is their working folder, by default `folder`. `close` ends
    those that still run.
    """

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    where: Path | None = None
    _running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def log(self, name: str) -> Path:
        """The log of a process."""
        return self.folder / "logs" / f"{name}.log"

    def start(self, name: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start `lora-tune ARGUMENTS`: what it prints goes to `logs/<name>.json`, its messages to the log."""
        log = self.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"lora-tune {' '.join(arguments)}\n", encoding="utf-8")
        command = [sys.executable, "-m", "lora_tune", *arguments]
        with log.open("ab") as messages, log.with_suffix(".json").open("wb") as results:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=results,
                stderr=messages,
                cwd=self.where or self.folder,
                env={**os.environ, **self.environment},
            )
        self._running.append(process)
        return process

    def run(self, name: str, arguments: Sequence[str], *, tolerated: Sequence[int] = ()) -> dict[str, Any]:
        """Run a verb with `--json` to its end and return what it printed.

        Raises:
            CheckFailed: it ended with another exit code than 0, or took longer than MOST_SECONDS; `file` is the log.
            Tolerable: it ended with one of the `tolerated` codes.
        """
        process = self.start(name, [*arguments, "--json"])
        try:
            code = process.wait(MOST_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise CheckFailed(Problem(f"took longer than {MOST_SECONDS:.0f} s", file=str(self.log(name)))) from None
        answer = self._answer(name)
        if code == 0 and answer is not None:
            return answer
        reason = self.reason(name, code)
        if code in tolerated:
            raise Tolerable(reason)
        raise CheckFailed(Problem(reason, file=str(self.log(name))))

    def reason(self, name: str, code: int) -> str:
        """Why a process that has ended did so: its first problem, else its last words, else the exit code."""
        answer = self._answer(name) or {}
        for problem in answer.get("problems", []):
            if problem.get("severity") == "error":
                return str(Problem(**problem))
        words = self.log(name).read_text(encoding="utf-8", errors="replace").splitlines()[1:]
        return f"ended with exit code {code}" + (f": {words[-1].strip()[:300]}" if words else "")

    def _answer(self, name: str) -> dict[str, Any] | None:
        try:
            answer = json.loads(self.log(name).with_suffix(".json").read_text(encoding="utf-8"))
        except ValueError:
            return None
        return answer if isinstance(answer, dict) else None

    def close(self) -> None:
        """Kill the processes that still run."""
        for process in self._running:
            if process.poll() is None:
                process.kill()
                process.wait()

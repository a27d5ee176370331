"""The rows of the grid for runs of two processes: one is killed or hangs, or a machine is lost and comes back.

Judged as the others, but for the numbers: a run that goes on with another number of processes has losses equal to 1e-4,
not to the last bit.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import nodes
from tests.faults.driver import ROOT

sys.path.insert(0, str(ROOT / "tests"))

import ranks
import tiny

_SAVING = "lora_tune.training.checkpoint:"
_RECIPE = """\
base: {name: base, quantize: nf4, compute_dtype: float32}
data: [{source: rows.jsonl, format: messages}]
lora: {rank: 4, alpha: 8}
train: {batch_size: 8, micro_batch_size: 2, max_length: 96, learning_rate: 1e-2, warmup: 0, packing: false,
        save_every: 2}
eval: {hold_out: 0, samples: 0}
output: out
"""


@dataclass(frozen=True)
class Case:
    """One run of two processes that is struck, and then resumed with `after` processes."""

    group: str
    strategy: str
    strike: ranks.Strike | None
    after: int

    @property
    def key(self) -> str:
        """Its name among all cases."""
        where = f"{self.strike.function.rpartition(':')[2]} {self.strike.turn}" if self.strike else "cable cut"
        return f"{self.group}: {self.strategy}: {where}, then {self.after}"


def cases() -> Iterator[Case]:
    """Kills at many moments of steps and of a gathered save, processes that hang, a machine that is lost."""
    for strategy in ("ddp", "fsdp2", "zero3"):
        for rank in (0, 1):
            for turn in range(1, 12, 2):
                strike = ranks.Strike(rank, signal.SIGKILL, turn=turn)
                yield Case(f"two processes: kill rank {rank}", strategy, strike, (1, 2)[turn % 4 == 1])
            strike = ranks.Strike(rank, signal.SIGSTOP, turn=7)
            yield Case(f"two processes: rank {rank} hangs", strategy, strike, 2)
        for name in ("_remove_unfinished", "_seal", "_write_manifest", "sync", "_rotate"):
            for turn in (1, 2, 3):
                strike = ranks.Strike(0, signal.SIGKILL, turn=turn, function=_SAVING + name)
                yield Case("two processes: kill during a gathered save", strategy, strike, 2)
    if nodes.possible():
        yield Case("two machines: one is lost and comes back", "ddp", None, 2)


def play(case: Case, folder: Path) -> dict[str, Any]:
    """Run a case to its end; the row of the grid's record."""
    reference = folder / "processes-alone"
    if not reference.exists():
        write_place(reference)
        done = ranks.run(["recipe.yaml", "--no-preflight"], cwd=reference, world=1)
        if done.codes != (0,):
            raise RuntimeError(f"the undisturbed run ended with {done.codes}: {done.err}")
    place, began = folder / "processes", time.monotonic()
    shutil.rmtree(place, ignore_errors=True)
    write_place(place)
    codes, said = _strike(case, place) if case.strike else _lose_a_machine(place)
    arguments = ["recipe.yaml", "--no-preflight", "--resume"]
    if case.after > 1:
        arguments.append(f"hardware.strategy={case.strategy}")
    ended = ranks.run(arguments, cwd=place, world=case.after)
    lost = _judge(ended, said, found=_losses(place), wanted=_losses(reference))
    seconds = round(time.monotonic() - began, 2)
    row = {"key": case.key, "group": case.group, "codes": [*codes, *ended.codes], "stopped": True}
    return {**row, "seconds": seconds, "lost": lost}


def write_place(folder: Path) -> None:
    """The recipe, its base and its rows."""
    tiny.write_base(folder / "base")
    turns = [(f"Question {n}?", f"Answer {n}." + " It is fine." * (n % 5)) for n in range(43)]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(_RECIPE)


def _strike(case: Case, place: Path) -> tuple[list[int], list[str]]:
    arguments = ["recipe.yaml", "--no-preflight", f"hardware.strategy={case.strategy}", "hardware.timeout=10s"]
    ended = ranks.run(arguments, cwd=place, world=2, strike=case.strike)
    return list(ended.codes), [line for text in ended.err for line in text.splitlines()]


def _lose_a_machine(place: Path) -> tuple[list[int], list[str]]:
    with nodes.two_machines():
        arguments = ["recipe.yaml", "--no-preflight", "hardware.timeout=10s"]
        machines = [nodes.start(number, place, [*arguments, "train.epochs=1"]) for number in (0, 1)]
        while not list((place / "out" / "checkpoints").glob("step-*")) and machines[0].poll() is None:
            time.sleep(0.01)
        nodes.cable("down")
        said = [machine.communicate(timeout=180)[1] for machine in machines]
        nodes.cable("up")
        codes = [machine.returncode for machine in machines]
    return codes, [line for text in said[:1] for line in text.splitlines()]


def _losses(place: Path) -> list[float]:
    rows = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def _judge(ended: ranks.Ended, said: list[str], *, found: list[float], wanted: list[float]) -> str:
    """Why a case is lost, or an empty text."""
    told = [line for line in said if line.startswith("process ") and ("is gone" in line or "not answered" in line)]
    if set(ended.codes) != {0}:
        return f"the resumed run ended with {ended.codes}: {' '.join(ended.err)[-600:]}"
    if "Traceback" in " ".join(said):
        return f"a traceback: {' '.join(said)[-600:]}"
    if len(told) != 1:
        return f"{len(told)} messages instead of one: {said[-4:]}"
    if len(found) != len(wanted) or any(abs(a - b) > 1e-4 for a, b in zip(found, wanted, strict=True)):
        return f"losses differ: {found} for {wanted}"
    return ""

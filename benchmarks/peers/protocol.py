"""What every side of `benchmarks.step` is given and how it takes turns; imports only what a peer's environment has.

A side is a process. It reads the job from its folder, loads the base, puts the common adapter start into it, and then
waits before every step for a line on its input; that line is the turn. What a step took is said when the next turn is
asked for, so that everything between two steps (fetching rows, bookkeeping) counts, and waiting does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


@dataclass(frozen=True)
class Job:
    """What is trained: the same for every side. AdamW without weight decay, clipped to 1, a constant learning rate."""

    method: str
    """lora: a bfloat16 base; qlora: NF4 with double quantization, the rest in bfloat16."""
    steps: int
    threads: int
    batch: int = 4
    length: int = 256
    rank: int = 16
    alpha: int = 32
    learning_rate: float = 1e-3
    recompute: str = "none"
    """none, or all: every layer is computed again in the backward pass (a card that cannot keep activations)."""

    def write(self, folder: Path) -> None:
        """Leave it in the folder of a measurement."""
        (folder / "job.json").write_text(json.dumps(asdict(self)))


class Turns:
    """Wait for a turn before each step, and say after it what it took."""

    def __init__(self, packages: Sequence[str] = ()) -> None:
        self._cpu = self._wall = self._loss = 0.0
        self._open, self._began = False, False
        say("VERSIONS", versions((*LIBRARIES, *packages)))

    def begin(self) -> None:
        """Say what the step before took, and wait for the turn; of a card, memory counts from the first turn on."""
        self.finish()
        if not self._began:
            self._began = True
            forget_loading()
        if not sys.stdin.readline():
            raise SystemExit
        self._cpu, self._wall, self._open = time.process_time(), time.perf_counter(), True

    def loss(self, value: float) -> None:
        """The loss of the running step, before its update."""
        self._loss = value

    def finish(self) -> None:
        """Say what the last step took: seconds of processor time and of the clock, peak memory in MiB, loss."""
        if self._open:
            cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
            say("STEP", {"cpu_s": cpu, "wall_s": wall, "peak_mib": peak_mib(), "loss": self._loss})
        self._open = False


def waits(turns: Turns, parent: type) -> Any:
    """A callback of a transformers Trainer that takes turns; `parent` is that library's TrainerCallback."""

    class Waits(parent):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            turns.begin()

        def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if "loss" in rest["logs"]:
                turns.loss(float(rest["logs"]["loss"]))

        def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            turns.finish()

    return Waits()


def same_start(model: Any, rank: int) -> None:
    """The same adapter in every side: B zero, A uniform in ±1/sqrt(inputs) as PEFT draws it, by the layer's name."""
    import torch

    found = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
            elif "lora_A" in name:
                assert parameter.shape[0] == rank, (name, parameter.shape)
                layer = name[name.index("layers.") : name.index(".lora_A")]
                draw = torch.Generator().manual_seed(zlib.crc32(layer.encode()))
                values = torch.rand(tuple(parameter.shape), generator=draw) * 2 - 1
                parameter.copy_(values / parameter.shape[1] ** 0.5)
                found += 1
    assert found, "no adapter is attached"


def say(word: str, facts: dict[str, Any]) -> None:
    """One line for `benchmarks.step`; whatever else a tool prints is passed over."""
    print(f"\n{word} {json.dumps(facts)}", flush=True)


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Libraries of this environment."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def forget_loading() -> None:
    """What loading took of a card for a moment is no part of a training's peak; every tool gives it back."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_mib() -> float:
    """The most memory so far: of the card where there is one, else resident."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return float(torch.cuda.max_memory_reserved() / 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def given() -> tuple[str, Path, Job]:
    """The side's name, its folder and the job, as `benchmarks.step` starts a side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tool")
    parser.add_argument("--folder", type=Path, required=True)
    asked = parser.parse_args()
    return asked.tool, asked.folder, Job(**json.loads((asked.folder / "job.json").read_text()))


def rows_of(folder: Path) -> list[list[int]]:
    """The token rows, in the order in which every tool trains them."""
    found: list[list[int]] = json.loads((folder / "rows.json").read_text())
    return found


def labelled(folder: Path) -> list[dict[str, list[int]]]:
    """The rows for a trainer: every token is trained but a row's first, which has nothing before it.

    Some tools would count that one in the divisor of the loss, and others not.
    """
    rows = rows_of(folder)
    return [{"input_ids": row, "attention_mask": [1] * len(row), "labels": [-100, *row[1:]]} for row in rows]


def stay_home() -> dict[str, str]:
    """Environment of a side: no network, no statistics."""
    quiet = {
        "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_DISABLED": "true",
    }  # fmt: skip
    return {**os.environ, **quiet}

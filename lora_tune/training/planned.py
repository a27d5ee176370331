"""What was planned, beside what the preflight or a shortage of memory measured; the next plan learns from it (cold)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lora_tune.model import calibration
from lora_tune.model.device import Machine, this_machine
from lora_tune.model.memory import MemoryPlan, plan_memory
from lora_tune.recipe import Base, Lora, Train

_ENOUGH_GIB = float(2**20)  # more than any device has: what is asked here is how much is needed


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan's side of a measurement: what the formulas give for this run, with nothing left at `auto`.

    `preflight` says whether it is measured before training; `reason` why the values at `auto` were chosen.

    Only measurements of a GPU are remembered: the resident memory of a process is no measure of what a training needs.
    """

    config: Mapping[str, Any]
    base: Base
    lora: Lora
    train: Train
    preflight: Literal["on", "off"] = "on"
    reason: str = ""

    def at(self, micro_batch_size: int, *, tokens: int | None = None, machine: Machine | None = None) -> MemoryPlan:
        """The plan at this micro-batch; `tokens` are those in it, where its rows are shorter than `max_length`."""
        machine = machine or this_machine()
        length = self.train.max_length if tokens is None else max(2, math.ceil(tokens / micro_batch_size))
        changes = {"micro_batch_size": micro_batch_size, "max_length": min(length, self.train.max_length)}
        return plan_memory(
            self.config,
            base=self.base,
            lora=self.lora,
            train=self.train.model_copy(update=changes),
            budget_gib=_ENOUGH_GIB,
            device=machine.device,
            card=machine.card,
        )

    def remember(
        self,
        peak_gib: float,
        *,
        micro_batch_size: int,
        tokens: int | None = None,
        step_s: float | None = None,
        machine: Machine | None = None,
    ) -> None:
        """Keep what was measured on this GPU: the memory that training took, and the seconds of a step."""
        machine = machine or this_machine()
        if machine.device != "cuda":
            return
        key = machine.card.name if machine.card else machine.device
        plan, known = self.at(micro_batch_size, tokens=tokens, machine=machine), calibration.read(key)
        learned = known.step_ratio if known and known.step_ratio else 1.0  # which is in the plan's seconds already
        formula = plan.formula_gib
        is_of_training = formula["gradients"] > 0  # a plan whose peak is in an evaluation is no measure of a training
        calibration.remember(
            key,
            predicted={"peak": sum(formula.values())} if is_of_training else {},
            measured={"peak": peak_gib + formula["runtime"]},  # torch counts neither its context nor its fragments
            step_s=(plan.step_s / learned, step_s) if plan.step_s and step_s else None,
        )

    def short(self, wanted_gib: float, micro_batch_size: int, tokens: int) -> None:
        """Keep that a GPU did not have what this micro-batch wanted: at least so much."""
        self.remember(wanted_gib, micro_batch_size=micro_batch_size, tokens=tokens)

"""Will it fit, and how long will it take? The plan of a run from `config.json` and the recipe alone.

`plan_memory` is the door: bytes by part (`footprint.py`), seconds (`speed.py`), and the fastest combination that fits
(`choice.py`). Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lora_tune.errors import Problem, ResourceError
from lora_tune.model import calibration
from lora_tune.model.activations import saved_bytes_per_layer
from lora_tune.model.cards import Card
from lora_tune.model.choice import (
    MARGIN,
    MOST_TOKENS,
    Change,
    cheapest_changes,
    choose,
    fits,
    flop_per_step,
    least,
    micro_batches,
    needed_gib,
    slower,
)
from lora_tune.model.device import Device, device_budget, this_machine
from lora_tune.model.footprint import (
    GIB,
    Choice,
    Job,
    formula_gib,
    job_of,
    offloaded_bytes,
    parts_gib,
    trainable_parameters,
    uncertainty_gib,
    unquantized_gib,
)
from lora_tune.model.speed import step_seconds
from lora_tune.model.strategy import STRATEGIES
from lora_tune.recipe import Base, Lora, Train

__all__ = ["MARGIN", "MOST_TOKENS", "MemoryPlan", "device_budget", "plan_here", "plan_memory", "saved_bytes_per_layer",
           "too_large", "trainable_parameters", "try_plan"]  # fmt: skip


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the memory goes in the combination chosen, and how long a step takes; `reason` says why that one.

    `parts_gib` add up to `peak_gib`, which may be wrong by `uncertainty_gib`; `formula_gib` is what the formulas gave
    before `calibrated` measurements of this card corrected them. `step_s` and `tokens_per_s` are None where the speed
    of the device is not known. A step has `tokens_per_step` tokens where every sequence is full. Only `try_plan` gives
    a plan that does not fit; `changes` would make it fit. Of the weights, `unquantized_gib` are embeddings, head, norms
    and experts. `known` says how the base's parameters were counted.
    """

    parts_gib: dict[str, float]
    peak_gib: float
    budget_gib: float
    micro_batch_size: int
    accumulation: int
    gradient_checkpointing: Literal["all", "none"] | int
    parameters: int
    trainable_parameters: int
    reason: str
    optimizer: str
    offload: Literal["none", "checkpoints"]
    uncertainty_gib: float
    formula_gib: dict[str, float]
    flop_per_step: float
    tokens_per_step: int
    step_s: float | None
    tokens_per_s: float | None
    calibrated: int
    fits: bool
    unquantized_gib: float
    known: Literal["in our table", "counted on the meta device"]
    changes: tuple[Change, ...] = ()

    @property
    def resolved(self) -> dict[str, Any]:
        """The keys of the recipe's `train` section that were at `auto`, decided."""
        return {
            "micro_batch_size": self.micro_batch_size,
            "gradient_checkpointing": self.gradient_checkpointing,
            "optimizer": self.optimizer,
            "offload": self.offload,
        }


def plan_here(config: Mapping[str, Any], *, base: Base, lora: Lora, train: Train) -> MemoryPlan:
    """The plan for this machine: its first visible GPU with what is free there, else its memory.

    Raises as `plan_memory`.
    """
    machine = this_machine()
    return plan_memory(
        config,
        base=base,
        lora=lora,
        train=train,
        budget_gib=machine.free_gib,
        device=machine.device,
        card=machine.card,
    )


def plan_memory(
    config: Mapping[str, Any],
    *,
    base: Base,
    lora: Lora,
    train: Train,
    budget_gib: float,
    device: Device,
    card: Card | None = None,
) -> MemoryPlan:
    """Choose the fastest combination that fits into 95 % of `budget_gib` (free memory, GiB), its uncertainty included.

    `micro_batch_size`, `gradient_checkpointing` and `optimizer` at `auto` are decided together (`choice.choose`): the
    largest micro-batch is not always the fastest, and no layer is recomputed that has room to be kept. `card` gives the
    speed, and by its name what was measured on it before.

    Raises ResourceError (exit 4) with the three cheapest changes where nothing fits, UsageError for a config that
    cannot be read.
    """
    plan = try_plan(config, base=base, lora=lora, train=train, budget_gib=budget_gib, device=device, card=card)
    if not plan.fits:
        raise ResourceError(too_large(plan, train))
    return plan


def try_plan(
    config: Mapping[str, Any],
    *,
    base: Base,
    lora: Lora,
    train: Train,
    budget_gib: float,
    device: Device,
    card: Card | None = None,
) -> MemoryPlan:
    """As `plan_memory`; where nothing fits, the smallest combination with `fits` False and the changes that help."""
    measured = calibration.read(card.name if card else device)
    job = job_of(config, base=base, lora=lora, train=train, device=device, calibration=measured)
    return plan_job(job, budget_gib, card=card)


def plan_job(
    job: Job, budget_gib: float, *, card: Card | None, changes_are: Literal["looked for", "left out"] = "looked for"
) -> MemoryPlan:
    """The plan of a job, as `try_plan`; of one that several cards share, the plan of each card."""
    job = replace(job, card=card)
    train, device = job.train, job.device
    measured = job.calibration
    chosen = choose(job, budget_gib, card=card)
    look = chosen is None and changes_are == "looked for"
    changes = tuple(cheapest_changes(job, budget_gib, card=card)) if look else ()
    choice = chosen or least(job)
    parts = parts_gib(job, choice)
    known = device == "cuda" and card is not None and card.tflops > 0
    step_s = step_seconds(job, choice, card) if known else None
    tokens = train.batch_size * train.max_length
    return MemoryPlan(
        parts_gib=parts,
        peak_gib=sum(parts.values()),
        budget_gib=budget_gib,
        micro_batch_size=choice.micro,
        accumulation=train.batch_size // choice.micro,
        gradient_checkpointing=_as_word(choice.checkpointed, job.shape.layers),
        parameters=job.shape.parameters,
        trainable_parameters=trainable_parameters(job.shape, job.lora),
        reason=_reason(job, choice, budget_gib, card) if chosen else f"does not fit into {budget_gib:.1f} GiB",
        optimizer=choice.optimizer,
        offload=choice.offload if choice.checkpointed else "none",
        uncertainty_gib=uncertainty_gib(job, parts),
        formula_gib=formula_gib(job, choice),
        flop_per_step=flop_per_step(job, choice),
        tokens_per_step=tokens,
        step_s=step_s,
        tokens_per_s=tokens / step_s if step_s else None,
        calibrated=measured.runs if measured else 0,
        fits=chosen is not None,
        unquantized_gib=unquantized_gib(job) / (job.layout.world if STRATEGIES[job.layout.strategy].divided else 1),
        known="in our table" if job.shape.known else "counted on the meta device",
        changes=changes,
    )


def too_large(plan: MemoryPlan, train: Train) -> Problem:
    """One line: what is needed, what there is, and the three cheapest changes with what each costs in time."""
    key = "train.micro_batch_size" if train.micro_batch_size != "auto" else "base.name"
    reason = (
        f"{plan.micro_batch_size} x {train.max_length} tokens need about {plan.peak_gib:.1f} GiB "
        f"(± {plan.uncertainty_gib:.1f}), got {plan.budget_gib:.1f} GiB free of which 5 % stay free"
    )
    return Problem(reason, "; or ".join(map(str, plan.changes)) or "take a smaller base", key=key)


def _as_word(checkpointed: int, layers: int) -> Literal["all", "none"] | int:
    return "none" if checkpointed == 0 else "all" if checkpointed == layers else checkpointed


def _reason(job: Job, choice: Choice, budget_gib: float, card: Card | None) -> str:
    """Why this combination, in one line."""
    layers = job.shape.layers
    kept = {0: "no layer recomputed", layers: f"all {layers} layers recomputed"}
    peak = sum(parts_gib(job, choice).values())
    text = (
        f"micro-batch {choice.micro} x {job.train.max_length} tokens, "
        f"{kept.get(choice.checkpointed, f'{choice.checkpointed} of {layers} layers recomputed')}"
        f"{_away(job, choice)}, {choice.optimizer}: "
        f"about {peak:.1f} of {budget_gib:.1f} GiB free"
    )
    return f"{text}; {_why(job, choice, budget_gib, card)}"


def _away(job: Job, choice: Choice) -> str:
    away = offloaded_bytes(job, choice)
    if job.train.offload == "checkpoints" and job.device == "cpu":
        return " (train.offload: on a CPU their inputs are in the machine's memory anyway)"
    return f" from {away / GIB:.1f} GiB of inputs in the machine's memory" if away else ""


def _why(job: Job, choice: Choice, budget_gib: float, card: Card | None) -> str:
    """What the nearest other combination would have been."""
    train = job.train
    if "auto" not in (train.micro_batch_size, train.gradient_checkpointing):
        return "as the recipe says"
    larger = 2 * choice.micro
    whole = replace(choice, checkpointed=0)
    if choice.checkpointed and train.gradient_checkpointing == "auto" and not fits(job, whole, budget_gib):
        return f"without recomputing it would need {needed_gib(job, whole):.1f} GiB, and 5 % stay free"
    if train.micro_batch_size != "auto":
        return "the micro-batch as the recipe says"
    if larger not in micro_batches(job):
        if train.packing and larger * train.max_length > MOST_TOKENS and train.batch_size % larger == 0:
            return f"a larger micro-batch gains nothing above {MOST_TOKENS} tokens"
        whole_batch = f"the whole batch_size {train.batch_size}"
        powers = f"the largest power of two that divides batch_size {train.batch_size}"
        return whole_batch if choice.micro == train.batch_size else powers
    other = replace(choice, micro=larger)
    if not fits(job, other, budget_gib):
        recomputed = choose(_fixed(job, larger), budget_gib, card=card)
        if recomputed is None:
            return f"{larger} would need {needed_gib(job, other):.1f} GiB"
        cost = step_seconds(job, recomputed, card) / step_seconds(job, choice, card)
        return f"{larger} would have to recompute {recomputed.checkpointed} layers ({slower(cost)})"
    return f"{larger} would be {slower(step_seconds(job, other, card) / step_seconds(job, choice, card))}"


def _fixed(job: Job, micro: int) -> Job:
    train = job.train.model_copy(update={"micro_batch_size": micro})
    return replace(job, train=train)

"""The guard before every optimizer step: numbers that are not finite, a loss that runs away, a gradient that is dead.

A step whose loss, gradient or weights are not finite is never taken: the training stops there, or goes on without the
step as often as `train.max_skipped_steps` allows. What the guard remembers is part of a checkpoint, so that a resumed
training stops where an uninterrupted one would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from lora_tune.errors import CheckFailed, Problem
from lora_tune.model.divided import handle, largest_of, whole

FIRST_WINDOW = 10  # steps whose mean loss later ones are measured against
DIVERGED_STEPS = 25  # in a row above 1.25 times that mean + 0.25 nats: by chance once in 2^25 starts
DEAD_STEPS = 5  # in a row with a gradient of exactly zero
LEARNED = 1e-3  # nats: below this loss a gradient of zero means that nothing is left to learn
SPIKE = (3.0, 2.0)  # a loss above 3 times the mean of the steps before + 2 nats is worth a line
_RECENT = 50
_SPIKES_SHOWN = 5
_ROWS_SHOWN = 8
_LOWER = "lower train.learning_rate; the checkpoints of this run stay"


@dataclass(slots=True)
class Watch:
    """What the guard remembers from step to step."""

    skipped: int = 0
    first: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    high: int = 0
    dead: int = 0
    spikes: int = 0


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """One step before it is taken: its number from 1, its loss, the norm of its gradient, the largest weight.

    `scaled` says whether a gradient that is not finite is dealt with by the loss scaling of float16.
    """

    step: int
    loss: float
    norm: float
    largest_weight: float
    scaled: bool = False

    def finite(self) -> bool:
        """Whether this step may be taken."""
        norm = self.scaled or math.isfinite(self.norm)
        return math.isfinite(self.loss) and norm and math.isfinite(self.largest_weight)


class StepGuard:
    """Judges every step of one training; `report` gets a line for each step that is left out, and for spikes."""

    def __init__(self, model: nn.Module, *, max_skipped: int, report: Callable[[str], None]) -> None:
        self.model = model
        self.max_skipped = max_skipped
        self.report = report
        self.watch = Watch()
        self.skipping = False  # the step that was judged last is left out

    def admits(self, numbers: StepNumbers, *, rows: Callable[[], str]) -> bool:
        """Whether this step is taken; False where it is left out. `rows` names the rows to blame, when asked.

        Raises:
            CheckFailed: the step is not finite and may not be skipped, the loss has run away, or the gradient is dead.
        """
        self.skipping = not numbers.finite()
        if self.skipping:
            self._refuse_or_skip(numbers, rows())
            return False
        self._look_at_loss(numbers, rows)
        self._look_at_gradient(numbers)
        return True

    def _refuse_or_skip(self, numbers: StepNumbers, rows: str) -> None:
        said = f"its loss is {numbers.loss}, the norm of its gradient {numbers.norm}"
        damaged = bad_weight(self.model)
        if damaged:
            where, fix = damaged
            raise CheckFailed(Problem(f"step {numbers.step} was not taken: {said}; {where}", fix))
        self.watch.skipped += 1
        if self.watch.skipped <= self.max_skipped:
            left = f"{self.watch.skipped} of train.max_skipped_steps {self.max_skipped}"
            self.report(f"step {numbers.step} is left out ({left}): {said}{rows}")
            return
        more = self.watch.skipped
        fix = f"look at these rows, or lower train.learning_rate; to go on without them: --resume --allow-change \
train.max_skipped_steps train.max_skipped_steps={more}"
        raise CheckFailed(Problem(f"step {numbers.step} was not taken: {said}{rows}", fix))

    def _look_at_loss(self, numbers: StepNumbers, rows: Callable[[], str]) -> None:
        watch, loss = self.watch, numbers.loss
        if len(watch.first) < FIRST_WINDOW:
            watch.first.append(loss)
        else:
            start = sum(watch.first) / FIRST_WINDOW
            watch.high = watch.high + 1 if loss > 1.25 * start + 0.25 else 0
            if watch.high >= DIVERGED_STEPS:
                reason = f"the training diverges: at step {numbers.step} the loss, now {loss:.4g}, has been above its \
start ({start:.4g} over the first {FIRST_WINDOW} steps) for {DIVERGED_STEPS} steps"
                raise CheckFailed(Problem(reason, _LOWER))
        usual = sum(watch.recent) / len(watch.recent) if len(watch.recent) >= FIRST_WINDOW else math.inf
        if loss > SPIKE[0] * usual + SPIKE[1] and watch.spikes < _SPIKES_SHOWN:
            watch.spikes += 1
            over = f"{usual:.4g} over the {len(watch.recent)} steps before"
            self.report(f"step {numbers.step}: the loss jumps to {loss:.4g}, against {over}{rows()}")
        watch.recent = [*watch.recent, loss][-_RECENT:]

    def _look_at_gradient(self, numbers: StepNumbers) -> None:
        self.watch.dead = self.watch.dead + 1 if numbers.norm == 0 and numbers.loss > LEARNED else 0
        if self.watch.dead >= DEAD_STEPS:
            reason = f"the training is dead: the gradient has been exactly zero for {DEAD_STEPS} steps up to step \
{numbers.step}, at a loss of {numbers.loss:.4g}"
            raise CheckFailed(Problem(reason, _LOWER))

    def as_json(self) -> dict[str, Any]:
        """What is remembered, as it is stored in a checkpoint."""
        return asdict(self.watch)

    def go_on(self, stored: Mapping[str, Any]) -> None:
        """Remember what a checkpoint holds."""
        self.watch = Watch(**stored)


def largest_weight(trained: Sequence[torch.Tensor]) -> torch.Tensor:
    """The largest absolute value of these weights on any process, as a tensor; NaN and infinity come through."""
    return largest_of(trained)


def require_finite(model: nn.Module, *, step: int) -> None:
    """Refuse to store or hand on trained weights that are not finite; the checkpoints before stay.

    Raises: CheckFailed naming the weight.
    """
    trained = [handle(parameter) for parameter in model.parameters() if parameter.requires_grad]
    if trained and not bool(torch.isfinite(largest_weight(trained))):
        where, _ = bad_weight(model) or ("a weight of the adapter is not finite", "")
        raise CheckFailed(Problem(f"step {step} ruined the adapter, and it is not written: {where}", _LOWER))


def bad_weight(model: nn.Module) -> tuple[str, str] | None:
    """Which weight holds numbers that are not finite, and what to do: trained ones first, then those of the base."""
    for name, parameter in sorted(model.named_parameters(), key=lambda pair: not pair[1].requires_grad):
        if parameter.is_floating_point() and not bool(torch.isfinite(whole(handle(parameter))).all()):
            if parameter.requires_grad:
                return f"the adapter's weight {name} is not finite", _LOWER
            return f"the base's weight {name} is not finite", "take another copy of the base: this one is damaged"
    return None


def places(rows: Any, numbers: Sequence[int], sources: Sequence[str]) -> str:
    """`; its rows: file:line, …` of these training rows, or nothing where the rows do not say."""
    if "rows" not in rows.column_names:
        return ""
    pairs = [pair for number in numbers for pair in rows[number]["rows"]]
    names = dict(enumerate(sources))
    found = [f"{names.get(source, f'data.{source}')}:{line}" for source, line in pairs]
    more = f" and {len(found) - _ROWS_SHOWN} more" if len(found) > _ROWS_SHOWN else ""
    return f"; its rows: {', '.join(found[:_ROWS_SHOWN])}{more}"

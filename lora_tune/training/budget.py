"""A training that ends with its time: how many steps still fit, and where on its schedule the learning rate is.

The budget counts the training loop: steps, and the evaluations and checkpoints between them. Loading, the preflight,
the final comparison and writing the folder come on top.

After every step the time left is divided by what a step takes now (a mean over the last ones), with the evaluations
and checkpoints that will fall due; that many steps are still to come. The position on the schedule, 0 at the start and
1 at the end, moves by an equal part of the rest in each of them: it is the share of the steps where the speed stays the
same, bends where it drifts, never jumps or turns back, and is 1 after the last step. All positions are kept, in the
checkpoint and in `metrics.jsonl`: given them a training does not depend on the clock, and is the same to the last bit.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from lora_tune.model.rate import rate_of
from lora_tune.recipe import Train
from lora_tune.recipe_values import SHARE, seconds_of
from lora_tune.training import checkpoint
from lora_tune.training.progress import read_metrics
from lora_tune.training.replan import ReplanningTrainer
from lora_tune.training.schedule import UNLIMITED

_WINDOW = 32  # steps over which the time of a step is averaged
_UNSURE = 0.005  # the most by which the schedule moves while only the first step is timed
_DRIFT = 0.05  # a plan that differs by more from the one before is written down
_WORTH_A_LINE = 0.25  # and one that differs by more from the one that was shown last is shown
_SLACK = 0.01  # share of the budget by which the last step may end late, where half of it fits
_LINEAR_END = 1e-7  # learning rate at which transformers' polynomial schedule ends
_TIMESCALE = 10_000  # steps, of its inverse square root without a warm-up


@dataclass(frozen=True, slots=True)
class Curve:
    """The learning rate over its peak, as transformers' schedule of that name has it, by position instead of step."""

    schedule: Literal["cosine", "linear", "constant", "polynomial", "inverse_sqrt"]
    warmup: int | str
    peak: float

    def factor(self, step: int, positions: Sequence[float]) -> float:
        """The factor for `step` (from 0), which is at `positions[step]`; earlier ones say where a warm-up ended."""
        share = SHARE.fullmatch(self.warmup) if isinstance(self.warmup, str) else None
        now = positions[step]
        if share:
            risen_at = float(share[1]) / 100
            risen = now / risen_at if now < risen_at else 1.0
        else:
            count = int(self.warmup)
            risen_at = positions[count] if step >= count else 1.0
            risen = step / count if step < count else 1.0
        if risen < 1:
            return risen
        if self.schedule == "inverse_sqrt":
            return self._inverse_sqrt(step, now, risen_at if share else 0.0)
        return self._falling((now - risen_at) / (1 - risen_at) if risen_at < 1 else 1.0)

    def _falling(self, part: float) -> float:
        """After the warm-up; `part` of the rest is over."""
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * part))
        if self.schedule == "constant":
            return 1.0
        return 1 - part * (1 - _LINEAR_END / self.peak if self.schedule == "polynomial" else 1)

    def _inverse_sqrt(self, step: int, now: float, risen_at: float) -> float:
        if risen_at:
            return math.sqrt(risen_at / now)
        count = self.warmup if isinstance(self.warmup, int) and self.warmup else 0
        return math.sqrt(count / step) if count else math.sqrt(_TIMESCALE / (step + _TIMESCALE))


@dataclass(frozen=True, slots=True)
class Cadence:
    """How often something happens between steps: every so many (0: never), and after the last one in any case."""

    every: int
    at_the_end: Literal["always", "never"]

    def count(self, first: int, last: int) -> int:
        """How often it falls due after the steps `first` to `last`, which is the end."""
        regular = last // self.every - (first - 1) // self.every if self.every else 0
        extra = self.at_the_end == "always" and not (self.every and last % self.every == 0)
        return regular + extra


@dataclass(frozen=True, slots=True)
class StepPlan:
    """From `step` on: the number of steps in all, at `step_s` seconds each."""

    step: int
    steps: int
    step_s: float


@dataclass(slots=True)
class Spent:
    """What a budget knows, as it stands in a checkpoint: seconds, positions, times of the last steps, plans."""

    elapsed_s: float = 0.0
    points: list[float] = field(default_factory=list)
    recent_s: list[float] = field(default_factory=list)
    evaluation_s: float = 0.0
    save_s: float = 0.0
    left: int = UNLIMITED
    plans: list[StepPlan] = field(default_factory=list)


class Budget:
    """The time of one training. `clock` gives seconds; `told` gets each new plan."""

    def __init__(self, seconds: float, *, curve: Curve, evaluations: Cadence, saves: Cadence) -> None:
        self.seconds = seconds
        self.curve = curve
        self.evaluations = evaluations
        self.saves = saves
        self.clock: Callable[[], float] = time.monotonic
        self.told: Callable[[StepPlan], None] = lambda plan: None
        self.spent = Spent()
        self.replay: Mapping[int, float] = {}  # positions of steps that a killed run had taken after its checkpoint
        self._last: float | None = None  # when the last thing ended; None before the loop
        self._first_s: float | None = None  # the first step of a process takes longer, and is not counted

    @property
    def ended(self) -> bool:
        """Whether the last step is behind."""
        return bool(self.spent.points) and self.spent.points[-1] >= 1

    def start(self) -> None:
        """The loop begins, or goes on in another process."""
        self._last = self.clock()
        self._first_s = None

    def factor(self, step: int) -> float:
        """The factor of the learning rate for this step (from 0): asked when the one before is over, which is timed."""
        spent = self.spent
        if step == 0 and not spent.points:
            spent.points.append(0.0)
        if step == len(spent.points):
            self._time_step()
            spent.points.append(self._position(step))
            self._tell(step)
        return self.curve.factor(step, spent.points)

    def happened(self, what: Literal["evaluation", "save", "nothing"]) -> None:
        """An evaluation or a checkpoint of the loop is over, which began when the last thing ended."""
        if self._last is None:  # an evaluation that a resumed run makes up for
            return
        seconds = self._lap()
        if what == "save":
            self.spent.save_s = seconds
        if what == "evaluation":
            self.spent.evaluation_s = seconds

    def as_json(self) -> dict[str, Any]:
        """What is spent by now, the checkpoint that is being written included."""
        running = 0.0 if self._last is None else self.clock() - self._last + self.spent.save_s
        return asdict(self.spent) | {"elapsed_s": self.spent.elapsed_s + running}

    def go_on(self, stored: Mapping[str, Any], *, replay: Mapping[int, float]) -> None:
        """Take up what a checkpoint holds; positions in `replay`, by step, are taken as they are."""
        self.spent = Spent(**dict(stored) | {"plans": [StepPlan(**plan) for plan in stored["plans"]]})
        self.replay = replay

    def _lap(self) -> float:
        now = self.clock()
        seconds = now - (now if self._last is None else self._last)
        self.spent.elapsed_s += seconds
        self._last = now
        return seconds

    def _time_step(self) -> None:
        seconds = self._lap()
        if self._first_s is None:
            self._first_s = seconds
        else:
            self.spent.recent_s = [*self.spent.recent_s, seconds][-_WINDOW:]

    def _position(self, step: int) -> float:
        """Where the schedule is after `step` steps: an equal part of the rest further for each step that is left."""
        left = self._steps_left(step)
        if step in self.replay:
            position = self.replay[step]
            self.spent.left = 0 if position >= 1 else max(left, 1)
            return position
        before = self.spent.points[-1]
        self.spent.left = left
        part = (1 - before) / (left + 1)
        return before + (part if self.spent.recent_s or not left else min(part, _UNSURE))

    @property
    def step_s(self) -> float:
        """Seconds of a step by now."""
        first = self._first_s or 0.0
        return max(statistics.fmean(self.spent.recent_s) if self.spent.recent_s else first, 1e-9)

    def _steps_left(self, step: int) -> int:
        """The most steps after `step` that end in time, with what falls due between them."""
        each = self.step_s
        time_left = self.seconds - self.spent.elapsed_s + min(each / 2, _SLACK * self.seconds)
        low, high = 0, max(0, int(time_left / each))
        if not self.spent.recent_s and time_left > 0:  # the first step took longer than the others will
            high = max(high, 1)
            low = 1
        while low < high:
            middle = (low + high + 1) // 2
            last = step + middle
            between = self.spent.evaluation_s * self.evaluations.count(step, last)
            between += self.spent.save_s * self.saves.count(step, last)
            low, high = (middle, high) if middle * each + between <= time_left else (low, middle - 1)
        return low

    def _tell(self, step: int) -> None:
        """Write down a plan that differs from the one before by 5 % and more than a step, once the speed is known."""
        plans, steps = self.spent.plans, step + self.spent.left
        if not self.spent.recent_s:
            return
        if not plans or abs(steps - plans[-1].steps) > max(1.0, _DRIFT * plans[-1].steps):
            plans.append(StepPlan(step, steps, self.step_s))
            self.told(plans[-1])


def plan_budget(train: Train, *, steps_per_epoch: int, evaluate_every: int, keep: Literal["best", "last"]) -> Budget:
    """The budget of `train`, which has one; `evaluate_every` is 0 where nothing is evaluated during training."""
    return Budget(
        seconds_of(train.budget or ""),
        curve=Curve(train.schedule, train.warmup, rate_of(train)),
        evaluations=Cadence(evaluate_every, "always" if evaluate_every and keep == "best" else "never"),
        saves=Cadence(train.save_every or steps_per_epoch, "always"),
    )


class BudgetedTrainer(ReplanningTrainer):
    """The part of a trainer that ends with its budget, where it has one."""

    budget: Budget | None
    lr_scheduler: Any

    def keep_to(self, budget: Budget) -> None:
        """End with this budget."""
        self.budget = budget
        self.add_callback(_Laps(self, budget))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule over steps, or over time."""
        if self.budget is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            budget = self.budget
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: self._rate_factor(budget, step))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _rate_factor(self, budget: Budget, step: int) -> float:
        """The factor of the learning rate; after a step also the end of the training moves to where it is now."""
        factor = budget.factor(step)
        if step:
            self.state.max_steps = self.state.global_step + 1 + budget.spent.left
        return factor

    def ended(self, start: checkpoint.Checkpoint) -> bool:
        """Whether nothing is left to train after this checkpoint."""
        return start.step >= self.steps.total_steps or (self.budget is not None and self.budget.ended)

    def resolved(self) -> dict[str, Any]:
        """Every value that was decided at run time; with a budget, the steps are those planned by now."""
        if self.budget is None:
            return super().resolved()
        return super().resolved() | {"steps": len(self.budget.spent.points) - 1 + self.budget.spent.left}

    def run_state(self) -> dict[str, Any]:
        """What the run knows besides tensors, with what is spent of the budget."""
        return super().run_state() | {"budget": self.budget.as_json() if self.budget else None}

    def go_on(self, run: Mapping[str, Any]) -> None:
        """Take up the budget, and the positions of steps that were taken after the checkpoint and are lost."""
        super().go_on(run)
        if self.budget is not None and self.facts.display is not None:
            rows = {row["step"]: row["progress"] for row in read_metrics(self.facts.display.path) if "progress" in row}
            self.budget.go_on(run["budget"], replay=rows)
        elif self.budget is not None:
            self.budget.go_on(run["budget"], replay={})


class _Laps(TrainerCallback):
    """Tells a budget when things between the steps end, and the trainer when the training does."""

    def __init__(self, trainer: BudgetedTrainer, budget: Budget) -> None:
        self.trainer = trainer
        self.budget = budget
        self._saved = -1
        self._shown_steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.budget.clock, self.budget.told = self.trainer.facts.clock, self._told
        state.max_steps = min(UNLIMITED, state.global_step + self.budget.spent.left)
        self.budget.start()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.budget.happened("evaluation")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # transformers tells of a save at the end of an epoch once more, though nothing is written twice
        self.budget.happened("nothing" if self._saved == state.global_step else "save")
        self._saved = state.global_step

    def _told(self, plan: StepPlan) -> None:
        facts, before = self.trainer.facts, self._shown_steps
        if abs(plan.steps - before) > _WORTH_A_LINE * before:
            self._shown_steps = plan.steps
            facts.report(
                f"{'the speed has changed: ' if before else ''}{plan.steps:,} steps fit into train.budget, at \
{plan.step_s:.3g} s each (step {plan.step})"
            )
        if facts.display is not None:
            facts.display.on_replan(asdict(plan))

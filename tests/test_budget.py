"""A time budget: it ends in time with the learning rate at its end, whatever the speed does, and replays to the bit."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import training_kit as kit
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback, get_scheduler

from lora_tune.recipe import Lora, Train
from lora_tune.training import checkpoint
from lora_tune.training.budget import Budget, Cadence, Curve, plan_budget
from lora_tune.training.evaluations import Evaluation
from lora_tune.training.progress import TrainingDisplay, read_metrics
from lora_tune.training.resume import RunFacts
from lora_tune.training.schedule import SCHEDULES

NEVER = Cadence(0, "never")
DROPOUT = Lora(rank=4, alpha=8.0, dropout=0.1)


class Clock:
    """A clock that stands still until it is told how long something took."""

    def __init__(self, start: float = 1e6) -> None:
        self.now = start

    def __call__(self) -> float:
        return self.now


class Run:
    """A training without a model: steps, evaluations and saves of given lengths under a budget."""

    def __init__(
        self,
        seconds: float,
        *,
        step: Callable[[int], float],
        curve: Curve | None = None,
        evaluate: tuple[int, float] = (0, 0.0),
        save: tuple[int, float] = (0, 0.0),
    ) -> None:
        clock = Clock()
        curve = curve or Curve("cosine", "3%", 1e-3)
        evaluations, saves = Cadence(evaluate[0], "never"), Cadence(save[0], "always" if save[0] else "never")
        budget = Budget(seconds, curve=curve, evaluations=evaluations, saves=saves)
        budget.clock = clock
        budget.start()
        self.rates, self.totals = [budget.factor(0)], []
        number = 0
        while not budget.ended:
            number += 1
            clock.now += step(number)
            self.rates.append(budget.factor(number))
            self.totals.append(number + budget.spent.left)
            if evaluate[0] and number % evaluate[0] == 0:
                clock.now += evaluate[1]
                budget.happened("evaluation")
            if save[0] and (number % save[0] == 0 or budget.ended):
                clock.now += save[1]
                budget.happened("save")
        self.steps, self.seconds, self.budget = number, clock.now - 1e6, budget
        self.points = budget.spent.points


def bend(points: list[float]) -> float:
    """By how much the schedule moves in the step in which it moves most."""
    return max(after - before for before, after in pairwise(points))


SPEEDS: dict[str, Callable[[int], float]] = {
    "steady": lambda step: 1.0,
    "slow start": lambda step: 60.0 if step == 1 else 1.0,
    "slower in the middle": lambda step: 1.0 if step < 400 else 2.5,
    "faster in the middle": lambda step: 2.0 if step < 150 else 0.8,
    "slow for a while": lambda step: 4.0 if 300 < step < 400 else 1.0,
    "a hiccup": lambda step: 90.0 if step == 321 else 1.0,
    "by length": lambda step: 0.4 + 1.2 * ((step * 7919) % 101) / 101,
}


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("between", ["steps alone", "evaluations and saves"])
def test_it_ends_in_time_at_the_end_of_the_schedule(speed: str, between: str) -> None:
    lumps: dict[str, Any] = {} if between == "steps alone" else {"evaluate": (50, 12.0), "save": (100, 5.0)}
    run = Run(1000.0, step=SPEEDS[speed], **lumps)
    assert run.seconds == pytest.approx(1000, rel=0.02)
    assert run.points[-1] == 1.0 and run.rates[-1] == pytest.approx(0, abs=1e-9)
    assert all(before < after for before, after in pairwise(run.points))
    assert bend(run.points) < 0.02
    top = run.rates.index(max(run.rates))
    assert run.rates[:top] == sorted(run.rates[:top]) and run.rates[top:] == sorted(run.rates[top:], reverse=True)


@given(
    base=st.floats(0.05, 4.0),
    noise=st.floats(0, 0.5),
    slow=st.tuples(st.integers(2, 2000), st.integers(1, 300), st.floats(1, 5)),
    seed=st.integers(0, 99),
    evaluate=st.tuples(st.integers(10, 90), st.floats(0, 3)),
)
def test_any_speed_ends_in_time(
    base: float, noise: float, slow: tuple[int, int, float], seed: int, evaluate: tuple[int, float]
) -> None:
    """Noise, a slow stretch and evaluations; 500 s hold at least 25 of the longest steps."""

    def step(number: int) -> float:
        wave = 1 + noise * math.sin(number * 12.9898 + seed)
        return base * wave * (slow[2] if slow[0] <= number < slow[0] + slow[1] else 1)

    run = Run(500.0, step=step, evaluate=(evaluate[0], evaluate[1] * base))
    longest = 1.5 * base * slow[2]
    assert 500 - 0.02 * 500 - 2 * longest <= run.seconds <= 500 + 0.01 * 500 + 2 * longest
    assert run.points[-1] == 1.0 and run.points == sorted(run.points)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", ["0%", "10%", 0, 20])
def test_at_a_steady_speed_it_is_the_schedule_over_steps(schedule: str, warmup: int | str) -> None:
    """Transformers' own schedule over 200 steps, point for point."""
    run = Run(200.0, step=lambda step: 1.0, curve=Curve(schedule, warmup, 1e-3))  # type: ignore[arg-type]
    assert run.steps == 200
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    count = warmup if isinstance(warmup, int) else round(float(warmup[:-1]) * 2)
    theirs = get_scheduler(SCHEDULES[schedule], optimizer, num_warmup_steps=count, num_training_steps=200)
    rates = []
    for _ in range(200):
        rates.append(theirs.get_last_lr()[0] / 1e-3)
        optimizer.step()
        theirs.step()
    assert run.rates[:200] == pytest.approx(rates, abs=2e-3)
    end = {"cosine": 0, "linear": 0, "constant": 1, "polynomial": 1e-4}.get(schedule)
    assert end is None or run.rates[-1] == pytest.approx(end, abs=1e-9)


def test_a_step_longer_than_the_budget_is_the_only_one() -> None:
    run = Run(10.0, step=lambda step: 25.0)
    assert run.steps == 1 and run.points == [0.0, 1.0]
    assert Run(10.0, step=lambda step: 7.0 if step == 1 else 1.0).steps == 4


def test_plans_are_told_when_the_speed_has_changed() -> None:
    steady = Run(1000.0, step=lambda step: 1.0).budget.spent.plans
    assert [(plan.step, plan.steps) for plan in steady] == [(2, 1000)]
    slower = Run(1000.0, step=SPEEDS["slower in the middle"]).budget.spent.plans
    assert slower[0].steps == 1000 and slower[1].step > 399 and 640 <= slower[-1].steps < 680


def test_how_often_something_falls_due() -> None:
    for every in (0, 1, 3, 7):
        for end in ("always", "never"):
            for first in range(1, 20):
                for last in range(first, 30):
                    due = [step for step in range(first, last + 1) if every and step % every == 0]
                    due += [last] if end == "always" and last not in due else []
                    assert Cadence(every, end).count(first, last) == len(due)  # type: ignore[arg-type]


# --- in the trainer ----------

SETTINGS: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 5e-3, "budget": "30s"}


class Takes(TrainerCallback):
    """Lets time pass: in each step, and in each evaluation and save."""

    def __init__(self, clock: Clock, *, step: Callable[[int], float], stop_after: int = 10**9) -> None:
        self.clock, self.step, self.stop_after = clock, step, stop_after

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.now += self.step(state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.stop_after and state.global_step < state.max_steps:
            raise Killed


class Killed(BaseException):
    """What ends a process that nobody asks."""


def start(
    base: Path,
    folder: Path,
    *,
    step: Callable[[int], float] = lambda step: 1.0,
    stop_after: int = 10**9,
    evaluate: float | None = None,
    **changes: Any,
) -> Any:
    """A trainer with a budget whose clock moves by `step` seconds in each step, `evaluate` in each evaluation."""
    clock = Clock()

    def measure(model: Any) -> dict[str, float]:
        clock.now += evaluate or 0.0
        return {"loss": 1.0}

    plan = Evaluation(every=4, measure=measure) if evaluate else None
    model = kit.adapter(base, lora=DROPOUT)
    train = Train(**SETTINGS | changes)
    trainer = kit.trainer(folder, base, kit.rows(14), train=train, model=model, evaluation=plan)
    display = TrainingDisplay(folder, style="none")
    trainer.for_run(RunFacts(report=lambda line: None, display=display, clock=clock))
    trainer.add_callback(Takes(clock, step=step, stop_after=stop_after))
    return trainer


def drifting(step: int) -> float:
    return 1.0 if step < 10 else 1.7


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_training_ends_with_its_budget(tiny_base: Path, tmp_path: Path, schedule: str) -> None:
    trainer = start(tiny_base, tmp_path, step=drifting, evaluate=0.5, schedule=schedule)
    began = trainer.facts.clock()
    trainer.train()
    spent = trainer.facts.clock() - began
    assert 30 - 1.7 <= spent <= 30 * 1.02
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    steps = len(rates)
    assert trainer.state.global_step == steps and 17 <= steps <= 24
    end = trainer.lr_scheduler.get_last_lr()[0] / 5e-3
    least = {"cosine": 0, "linear": 0, "polynomial": 2e-5, "constant": 1}.get(schedule, math.sqrt(0.03))
    assert end == pytest.approx(least, abs=1e-6)
    found = checkpoint.newest(tmp_path, report=pytest.fail)
    assert found is not None and found.step == steps and found.run["resolved"]["steps"] == steps
    assert found.run["budget"]["elapsed_s"] == pytest.approx(spent, rel=0.01)
    again = start(tiny_base, tmp_path, schedule=schedule)
    assert again.train(resume_from_checkpoint=True).global_step == steps


def test_plans_stand_in_the_checkpoint_and_the_metrics(tiny_base: Path, tmp_path: Path) -> None:
    trainer = start(tiny_base, tmp_path, step=drifting)
    trainer.train()
    found = checkpoint.newest(tmp_path, report=pytest.fail)
    assert found is not None
    plans = found.run["budget"]["plans"]
    assert [plan["step"] for plan in plans][:2] == [2, 10] and plans[0]["steps"] == 30
    assert [row["replan"] for row in read_metrics(tmp_path / "metrics.jsonl") if "replan" in row] == plans


def test_the_same_points_are_the_same_training_whatever_the_clock_says(tiny_base: Path, tmp_path: Path) -> None:
    first = start(tiny_base, tmp_path / "first", step=drifting)
    first.train()
    again = start(tiny_base, tmp_path / "again", step=lambda step: 0.3)
    again.budget.replay = dict(enumerate(first.budget.spent.points))
    again.train()
    assert again.budget.spent.points == first.budget.spent.points
    assert kit.losses(again) == kit.losses(first)
    assert kit.same(kit.weights(again.model), kit.weights(first.model))


def test_a_killed_training_goes_on_with_the_time_that_is_left(tiny_base: Path, tmp_path: Path) -> None:
    """Killed five steps after its checkpoint: those five are the same again though the clock says something else."""
    killed = start(tiny_base, tmp_path, step=drifting, save_every=6, stop_after=11)
    with pytest.raises(Killed):
        killed.train()
    assert checkpoint.steps(tmp_path) == [6]
    lost = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert len(lost) == 11
    again = start(tiny_base, tmp_path, step=lambda step: 1.2, save_every=6)
    began = again.facts.clock()
    again.train(resume_from_checkpoint=True)
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [row["loss_hex"] for row in rows[:11]] == [row["loss_hex"] for row in lost]
    assert [row["learning_rate"] for row in rows[:11]] == [row["learning_rate"] for row in lost]
    assert again.facts.clock() - began == pytest.approx(30 - 6, abs=1.2)
    points = again.budget.spent.points
    assert points == sorted(points) and points[-1] == 1.0 and bend(points) < 2.5 / len(points)


def test_a_training_whose_points_are_known_resumes_to_the_last_bit(tiny_base: Path, tmp_path: Path) -> None:
    """From an early checkpoint and the lines of all steps, at another speed."""
    whole = start(tiny_base, tmp_path / "whole", step=drifting, save_every=6, keep_checkpoints=9)
    whole.train()
    kept = Path("checkpoints") / "step-00000006"
    shutil.copytree(tmp_path / "whole" / kept, tmp_path / "again" / kept)
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", tmp_path / "again")
    again = start(tiny_base, tmp_path / "again", step=lambda step: 0.4, save_every=6)
    again.train(resume_from_checkpoint=True)
    assert again.budget.spent.points == whole.budget.spent.points
    assert kit.losses(again) == kit.losses(whole)[6:]
    assert kit.same(kit.weights(again.model), kit.weights(whole.model))


def test_what_a_checkpoint_holds_of_it_is_json(tiny_base: Path, tmp_path: Path) -> None:
    budget = plan_budget(Train(**SETTINGS), steps_per_epoch=4, evaluate_every=0, keep="last")
    budget.factor(0)
    stored = json.loads(json.dumps(budget.as_json()))
    again = plan_budget(Train(**SETTINGS), steps_per_epoch=4, evaluate_every=0, keep="last")
    again.go_on(stored, replay={})
    assert again.spent.points == [0.0] and again.seconds == 30


def test_a_resumed_run_may_get_more_time(tiny_base: Path, tmp_path: Path) -> None:
    """`--allow-change train.budget`: the schedule goes on evenly from where it is to the new end."""
    first = start(tiny_base, tmp_path, save_every=6, stop_after=7)
    with pytest.raises(Killed):
        first.train()
    (tmp_path / "metrics.jsonl").unlink()
    again = start(tiny_base, tmp_path, save_every=6, budget="60s")
    again.train(resume_from_checkpoint=True)
    points = again.budget.spent.points
    assert 56 <= again.state.global_step <= 60 and points[-1] == 1.0
    assert points[6] == pytest.approx(6 / 30, abs=0.03) and bend(points[6:]) < 1.5 * 0.8 / 50

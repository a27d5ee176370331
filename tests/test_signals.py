"""Signals in a training: at any moment, one ends it after a checkpoint, and the resumed run is the same to the bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import training_kit as kit
from transformers import TrainerCallback

from lora_tune.errors import Interrupted
from lora_tune.interrupts import Stop, handled_by, stop
from lora_tune.recipe import Lora, Train
from lora_tune.training import checkpoint
from lora_tune.training.evaluations import Evaluation
from lora_tune.training.progress import TrainingDisplay, read_metrics
from lora_tune.training.resume import RunFacts

TRAIN = Train(batch_size=4, micro_batch_size=2, max_steps=6, learning_rate=5e-3, warmup=2)
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
IDS = torch.arange(20, 60)[None]


class Measure:
    """A held-out loss that draws random numbers, counts its calls, and sends a signal in the middle of one."""

    def __init__(self, *, signal_at: int = 0, number: signal.Signals = signal.SIGTERM) -> None:
        self.calls = 0
        self.signal_at = signal_at
        self.number = number

    def __call__(self, model: Any) -> dict[str, float]:
        self.calls += 1
        torch.rand(5)
        loss = float(model(input_ids=IDS, labels=IDS).loss)
        if self.calls == self.signal_at:
            os.kill(os.getpid(), self.number)
            torch.rand(5)
        return {"loss": loss}


def started(folder: Path, base: Path, *, measure: Measure | None = None, plan: dict[str, Any] | None = None) -> Any:
    """A trainer with dropout that evaluates every second step."""
    evaluation = Evaluation(every=2, measure=measure or Measure(), **(plan or {}))
    model = kit.adapter(base, lora=Lora(rank=4, alpha=8.0, dropout=0.1))
    folder.mkdir(exist_ok=True)
    trainer = kit.trainer(folder, base, kit.rows(30), train=TRAIN, model=model, evaluation=evaluation)
    return trainer.for_run(RunFacts(display=TrainingDisplay(folder, style="none")))


def numbers(folder: Path) -> list[Any]:
    """Losses and evaluations in metrics.jsonl."""
    return [row["loss_hex"] if "loss" in row else row["eval"] for row in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_an_evaluation_is_cut_short_and_made_by_the_resumed_run(
    tiny_base: Path, tmp_path: Path, at: int, keep: str
) -> None:
    plan = {"keep": keep, "stop_after": 2}
    whole = started(tmp_path / "whole", tiny_base, plan=plan)
    whole.train()
    measure = Measure(signal_at=at)
    cut = started(tmp_path / "cut", tiny_base, measure=measure, plan=plan)
    with pytest.raises(Interrupted, match=rf"SIGTERM after step {2 * at}; .*--resume") as caught:
        cut.train()
    assert caught.value.exit_code == 143 and measure.calls == at
    found = checkpoint.newest(tmp_path / "cut", report=pytest.fail)
    assert found is not None and found.step == 2 * at and found.run["evaluations"]["pending"]
    again = started(tmp_path / "cut", tiny_base, plan=plan)
    again.train(resume_from_checkpoint=True)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert kit.same(kit.weights(again.model), kit.weights(whole.model))
    assert again.evaluations.standing == whole.evaluations.standing


def test_an_evaluation_that_is_made_up_can_be_cut_short_again(tiny_base: Path, tmp_path: Path) -> None:
    whole = started(tmp_path / "whole", tiny_base)
    whole.train()
    for _ in range(3):
        with pytest.raises(Interrupted, match="after step 2"):
            started(tmp_path / "cut", tiny_base, measure=Measure(signal_at=1)).train(
                resume_from_checkpoint=bool(checkpoint.steps(tmp_path / "cut")) or None
            )
    again = started(tmp_path / "cut", tiny_base)
    again.train(resume_from_checkpoint=True)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert kit.same(kit.weights(again.model), kit.weights(whole.model))


class Press(TrainerCallback):
    """Sends a signal at a moment of the second step, `times` times."""

    def __init__(self, moment: str, number: signal.Signals, *, times: int = 1) -> None:
        self.moment, self.number, self.times = moment, number, times

    def press(self, moment: str, step: int) -> None:
        if moment == self.moment and step == 1 + (moment in ("on_step_end", "on_save")):
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.press("on_step_begin", state.global_step)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.press("on_substep_end", state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.press("on_pre_optimizer_step", state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.press("on_optimizer_step", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.press("on_step_end", state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.press("on_save", state.global_step)


MOMENTS = ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_save"]


@pytest.mark.parametrize(("moment", "number"), [(moment, NUMBERS[place % 4]) for place, moment in enumerate(MOMENTS)])
def test_a_signal_anywhere_in_a_step_costs_no_step(
    tiny_base: Path, tmp_path: Path, moment: str, number: signal.Signals
) -> None:
    whole = started(tmp_path / "whole", tiny_base)
    whole.train()
    before = [signal.getsignal(other) for other in NUMBERS]
    stopped = started(tmp_path / "run", tiny_base)
    stopped.save_every = 2
    stopped.add_callback(Press(moment, number))
    with pytest.raises(Interrupted, match=number.name) as caught:
        stopped.train()
    assert caught.value.exit_code == 128 + number
    assert [signal.getsignal(other) for other in NUMBERS] == before
    step = stopped.state.global_step
    assert step <= 3 and checkpoint.steps(tmp_path / "run")[0] == step
    again = started(tmp_path / "run", tiny_base)
    again.train(resume_from_checkpoint=True)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    assert kit.same(kit.weights(again.model), kit.weights(whole.model))


def test_a_second_signal_leaves_at_once(tiny_base: Path, tmp_path: Path) -> None:
    trainer = started(tmp_path / "run", tiny_base)
    trainer.add_callback(Press("on_step_begin", signal.SIGINT, times=2))
    with handled_by(stop), pytest.raises(Stop):  # as every command runs
        trainer.train()
    assert trainer.state.global_step == 1 and not checkpoint.steps(tmp_path / "run")


def test_it_says_so_when_the_checkpoint_could_not_be_written(tiny_base: Path, tmp_path: Path) -> None:
    trainer = started(tmp_path / "run", tiny_base)
    trainer.for_run(RunFacts(report=lambda line: None))
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    trainer.add_callback(Press("on_step_begin", signal.SIGTERM))
    with pytest.raises(Interrupted, match=r"after step 2, but its checkpoint could not be written.* from step 0"):
        trainer.train()

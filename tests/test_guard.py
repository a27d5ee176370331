"""No step on numbers that are not finite, none of them on the disk, and a training that goes nowhere is stopped."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import training_kit as kit
from safetensors.torch import load_file
from transformers import TrainerCallback

from lora_tune.errors import CheckFailed
from lora_tune.recipe import Base, Lora, Train
from lora_tune.training import checkpoint
from lora_tune.training.evaluations import Evaluation
from lora_tune.training.guard import DEAD_STEPS, DIVERGED_STEPS, FIRST_WINDOW, StepGuard, StepNumbers
from lora_tune.training.progress import TrainingDisplay, read_metrics
from lora_tune.training.resume import RunFacts
from lora_tune.training.trainer import RunTrainer

TRAIN = Train(batch_size=4, micro_batch_size=2, max_steps=6, learning_rate=5e-3, warmup=0, save_every=1)
TRAIN = TRAIN.model_copy(update={"keep_checkpoints": 9})


class At(TrainerCallback):
    """Does something to the model before a step (counted from 0)."""

    def __init__(self, step: int, act: Callable[[Any], None]) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act(model)


def spoil(name: str, value: float) -> Callable[[Any], None]:
    """Put a number into the first weight whose name has this part."""

    def act(model: Any) -> None:
        weight = next(parameter for found, parameter in model.named_parameters() if name in found)
        with torch.no_grad():
            weight.view(-1)[3] = value

    return act


def no_bad_number_on_disk(folder: Path) -> None:
    files = list(folder.rglob("*.safetensors"))
    assert files
    for path in files:
        for name, tensor in load_file(path).items():
            assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()), f"{path}: {name}"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("lora_B", math.nan, "the adapter's weight .*lora_B.* is not finite; lower train.learning_rate"),
        ("lora_A", math.inf, "the adapter's weight .*lora_A.* is not finite"),
        ("up_proj.base_layer.weight", math.inf, "the base's weight .*up_proj.* is not finite; take another copy"),
        ("embed_tokens.weight", math.nan, "the base's weight .*embed_tokens.* is not finite"),
    ],
)
@pytest.mark.parametrize("skipped", [0, 9])
def test_a_spoiled_weight_stops_before_the_next_step(
    tiny_base: Path, tmp_path: Path, name: str, value: float, says: str, skipped: int
) -> None:
    """Where a weight is to blame there is nothing to skip: every later step would be like this one."""
    train = TRAIN.model_copy(update={"max_skipped_steps": skipped})
    model = kit.adapter(tiny_base)
    if "embed" in name:  # every token that is trained on
        model.get_input_embeddings().weight.data[:] = math.nan
    trainer = kit.trainer(tmp_path, tiny_base, kit.rows(24), train=train, model=model)
    trainer.add_callback(At(2, spoil(name, value)))
    with pytest.raises(CheckFailed, match=says) as caught:
        trainer.train()
    if "embed" not in name:
        assert "step 3 was not taken" in str(caught.value) and trainer.state.global_step == 2
        assert checkpoint.steps(tmp_path) == [2, 1]
        no_bad_number_on_disk(tmp_path)


def test_an_update_that_ruins_the_weights_is_not_written(tiny_base: Path, tmp_path: Path) -> None:
    """Numbers that become infinite in the step itself have a finite loss before them."""

    class Ruin(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 2:
                spoil("lora_A", math.inf)(model)

    trainer = kit.trainer(tmp_path, tiny_base, kit.rows(24), train=TRAIN)
    trainer.add_callback(Ruin())
    with pytest.raises(CheckFailed, match=r"step 3 ruined the adapter, and it is not written: .*lora_A"):
        trainer.train()
    assert checkpoint.steps(tmp_path) == [2, 1]
    no_bad_number_on_disk(tmp_path)


def test_bad_weights_are_never_the_best(tiny_base: Path, tmp_path: Path) -> None:
    losses = iter([3.0, math.nan, math.inf, 2.9, 5.0, 6.0])
    plan = Evaluation(every=1, measure=lambda model: {"loss": next(losses)}, keep="best")
    trainer = kit.trainer(tmp_path, tiny_base, kit.rows(24), train=TRAIN, evaluation=plan)
    trainer.train()
    assert trainer.evaluations is not None and trainer.evaluations.standing.best_step == 4
    no_bad_number_on_disk(tmp_path)


def bad_steps(trainer: RunTrainer, *steps: int) -> None:
    """Make the loss of the last micro-batch of these steps (from 1) NaN."""
    inner = trainer.compute_loss

    def compute(*arguments: Any, **words: Any) -> Any:
        loss = inner(*arguments, **words)
        last = len(trainer._micro_losses) == trainer.steps.accumulation - 1
        return loss * math.nan if last and trainer.state.global_step + 1 in steps else loss

    trainer.compute_loss = compute  # type: ignore[method-assign]


def skipping(folder: Path, base: Path, *, said: list[str], allowed: int = 2, optimizer: str = "adamw") -> RunTrainer:
    """A trainer that may skip steps, with dropout (which is not fused), and metrics in `folder`."""
    train = TRAIN.model_copy(update={"max_skipped_steps": allowed, "optimizer": optimizer, "kernels": "off"})
    model = kit.adapter(base, lora=Lora(rank=4, alpha=8.0, dropout=0.1))
    trainer = kit.trainer(folder, base, kit.rows(24), train=train, model=model)
    folder.mkdir(exist_ok=True)
    facts = RunFacts(sources=["rows.jsonl"], report=said.append, display=TrainingDisplay(folder, style="none"))
    return trainer.for_run(facts)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor", "lion_8bit", "sgd", "paged_adamw"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_skipped_step_changes_no_weight_and_names_its_rows(tiny_base: Path, tmp_path: Path, optimizer: str) -> None:
    said: list[str] = []
    trainer = skipping(tmp_path, tiny_base, said=said, optimizer=optimizer)
    bad_steps(trainer, 3)
    seen: dict[int, Any] = {}

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen[state.global_step] = kit.weights(model)

    trainer.add_callback(Look())
    trainer.train()
    assert trainer.state.global_step == 6
    assert kit.same(seen[3], seen[2]) and not kit.same(seen[4], seen[3])
    (line,) = said
    rows = trainer._sampler.order(0)[8:12][2:]
    assert line.startswith("step 3 is left out (1 of train.max_skipped_steps 2): its loss is nan")
    assert ", ".join(f"rows.jsonl:{row + 1}" for row in rows) in line
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert [("loss" in row, "skipped" in row) for row in found] == [
        (True, False), (True, False), (False, True), (True, False), (True, False), (True, False),
    ]  # fmt: skip
    no_bad_number_on_disk(tmp_path)


def test_skipped_steps_are_counted_over_a_resume(tiny_base: Path, tmp_path: Path) -> None:
    said: list[str] = []
    whole = skipping(tmp_path / "whole", tiny_base, said=said, allowed=1)
    bad_steps(whole, 2, 5)
    with pytest.raises(CheckFailed, match=r"step 5 was not taken.*train\.max_skipped_steps=2"):
        whole.train()
    again = skipping(tmp_path / "whole", tiny_base, said=said, allowed=1)
    bad_steps(again, 2, 5)
    with pytest.raises(CheckFailed, match="step 5 was not taken"):
        again.train(resume_from_checkpoint=True)
    more = skipping(tmp_path / "whole", tiny_base, said=said, allowed=2)
    bad_steps(more, 2, 5)
    more.train(resume_from_checkpoint=True)
    uncut = skipping(tmp_path / "uncut", tiny_base, said=said, allowed=2)
    bad_steps(uncut, 2, 5)
    uncut.train()
    assert kit.same(kit.weights(more.model), kit.weights(uncut.model))
    lines = [
        [row.get("loss_hex") for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "uncut")
    ]
    assert lines[0] == lines[1] and lines[0].count(None) == 2


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_learning_rate_of_a_million_is_stopped_with_advice(tiny_base: Path, tmp_path: Path, quantize: Any) -> None:
    train = TRAIN.model_copy(update={"learning_rate": 1e6, "max_steps": 60, "save_every": 5})
    base = Base(name=str(tiny_base), quantize=quantize, compute_dtype="bfloat16" if quantize == "nf4" else "float32")
    trainer = kit.trainer(tmp_path, tiny_base, kit.rows(24), train=train, model=kit.adapter(tiny_base, base=base))
    with pytest.raises(CheckFailed, match=r"lower train\.learning_rate"):
        trainer.train()
    assert trainer.state.global_step < FIRST_WINDOW + DIVERGED_STEPS
    no_bad_number_on_disk(tmp_path)


def judged(losses: list[float], *, norm: float = 1.0) -> tuple[int, list[str]]:
    """How many steps with these losses are admitted, and what is said."""
    said: list[str] = []
    guard = StepGuard(torch.nn.Linear(1, 1), max_skipped=0, report=said.append)
    for step, loss in enumerate(losses, 1):
        try:
            guard.admits(StepNumbers(step, loss, norm, 1.0), rows=lambda: "")
        except CheckFailed as error:
            said.append(str(error))
            return step - 1, said
    return len(losses), said


def test_divergence_a_dead_gradient_and_spikes() -> None:
    falling = [3.0 * 0.99**step for step in range(400)]
    assert judged(falling) == (400, [])
    noisy = [loss * (1.6 if step % 3 else 0.5) for step, loss in enumerate([2.0] * 400)]
    assert judged(noisy) == (400, [])
    admitted, said = judged([2.0] * FIRST_WINDOW + [2.8] * 100)
    assert admitted == FIRST_WINDOW + DIVERGED_STEPS - 1 and "diverges" in said[0] and "learning_rate" in said[0]
    assert judged([2.0] * FIRST_WINDOW + ([2.8] * (DIVERGED_STEPS - 1) + [1.0]) * 4)[1] == []
    admitted, said = judged([2.0] * 40, norm=0.0)
    assert admitted == DEAD_STEPS - 1 and "dead" in said[0]
    assert judged([0.0] * 40, norm=0.0) == (40, [])  # everything is learned
    admitted, said = judged([1.0] * 30 + [9.0] + [1.0] * 30)
    assert admitted == 61 and len(said) == 1 and "step 31: the loss jumps to 9" in said[0]
    assert len(judged(([1.0] * 30 + [99.0]) * 20)[1]) == 5  # not a line for each

"""The trainer: documents apart, every row once, evaluations without a trace, bad numbers stopped, nothing sent."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import training_kit as kit
from transformers import TrainerCallback
from trl import SFTTrainer

from lora_tune.errors import CheckFailed, DataError, Interrupted, RecipeError
from lora_tune.model.methods import parameter_groups
from lora_tune.recipe import Base, Lora, Train
from lora_tune.training import checkpoint
from lora_tune.training.evaluations import Evaluation
from lora_tune.training.resume import RunFacts
from lora_tune.training.schedule import OPTIMIZERS, SCHEDULES, plan_steps

SMALL = Train(batch_size=4, micro_batch_size=2, max_steps=4, learning_rate=5e-3, warmup=0)
DROPOUT = Lora(rank=4, alpha=8.0, dropout=0.1)


def held_out(model: Any) -> dict[str, float]:
    """A loss that draws random numbers, as a careless evaluation would."""
    torch.rand(5)
    ids = torch.arange(20, 60)[None]
    return {"loss": float(model(input_ids=ids, labels=ids).loss)}


def test_it_is_an_ordinary_sft_trainer_with_the_arguments_of_the_recipe(tiny_base: Path, tmp_path: Path) -> None:
    train = Train(
        batch_size=8,
        micro_batch_size=2,
        epochs=3,
        learning_rate=1e-3,
        schedule="polynomial",
        warmup="10%",
        weight_decay=0.1,
        max_grad_norm=0.5,
        neftune_alpha=5.0,
        optimizer="sgd",
    )
    trainer = kit.trainer(tmp_path, tiny_base, kit.rows(40), train=train, seed=9)
    args = trainer.args
    assert isinstance(trainer, SFTTrainer)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.num_train_epochs) == (2, 4, 3)
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (1e-3, 0.1, 0.5)
    assert (args.lr_scheduler_type, args.warmup_steps, args.optim, args.seed) == ("polynomial", 2, "sgd", 9)
    assert (args.packing, args.padding_free, args.max_length, args.neftune_noise_alpha) == (False, True, None, 5.0)
    assert (args.bf16, args.fp16, args.use_cpu) == (False, False, not torch.cuda.is_available())
    assert args.save_strategy == "no" and args.report_to == [] and not args.gradient_checkpointing


def test_positions_restart_at_every_document_and_prompts_are_masked(tiny_base: Path, tmp_path: Path) -> None:
    data = kit.rows(6, pack=3)
    trainer = kit.trainer(tmp_path, tiny_base, data, train=Train(batch_size=6, micro_batch_size=6))
    for collator in (trainer.data_collator, trainer.data_collator.flat):
        trainer.data_collator = collator
        batch = next(iter(trainer.get_train_dataloader()))
        assert int((batch["position_ids"] == 0).sum()) == 18
        lengths = sorted(length for row in data["seq_lengths"] for length in row)
        flat = batch["position_ids"].flatten()
        ends = [*((flat == 0).nonzero().flatten()[1:]).tolist(), len(flat)]
        ids = batch["input_ids"].flatten()
        starts = [0, *ends[:-1]]
        runs = [int((ids[a:b] != 0).sum()) for a, b in zip(starts, ends, strict=True)]
        assert sorted(runs) == lengths
        trained = sum(label != -100 for row in data["labels"] for label in row)
        first = sum(row["labels"][sum(row["seq_lengths"][:n])] != -100 for row in data for n in range(3))
        assert int((batch["labels"] != -100).sum()) == trained - first


def test_packed_documents_do_not_see_each_other(tiny_base: Path, tmp_path: Path) -> None:
    """Another first document must not move the loss of the second one."""
    losses = []
    for fill in (50, 150):
        row = {"input_ids": [fill] * 9 + list(range(60, 75)), "labels": [-100] * 9 + list(range(60, 75))}
        data = kit.packed([[row | {"seq_lengths": [9, 15], "rows": [[0, 1], [0, 2]]}]])
        trainer = kit.trainer(tmp_path, tiny_base, data, train=SMALL.model_copy(update={"max_steps": 1}))
        trainer.data_collator = trainer.data_collator.flat
        trainer.train()
        losses += kit.losses(trainer)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("count", [4, 7, 9])
def test_every_row_is_trained_once_an_epoch(tiny_base: Path, tmp_path: Path, count: int) -> None:
    train = Train(batch_size=4, micro_batch_size=2, epochs=2, warmup=0)
    trainer = kit.trainer(tmp_path, tiny_base, kit.rows(count), train=train)
    seen: list[int] = []
    inner = trainer.data_collator

    def watch(rows: list[dict[str, Any]]) -> Any:
        seen.extend(hash(tuple(row["input_ids"])) for row in rows)
        return inner(rows)

    trainer.data_collator = watch
    trainer.train()
    every = sorted(hash(tuple(ids)) for ids in trainer.train_dataset["input_ids"])
    assert sorted(seen[:count]) == every and sorted(seen[count:]) == every
    assert seen[:count] != seen[count:]
    rows = trainer.state.log_history
    assert sum(row.get("tokens", 0) for row in rows) == 2 * sum(map(sum, trainer.train_dataset["seq_lengths"]))


def test_evaluations_change_nothing(tiny_base: Path, tmp_path: Path) -> None:
    def run(name: str, *, evaluation: Evaluation | None) -> Any:
        train = SMALL.model_copy(update={"neftune_alpha": 5.0})
        model = kit.adapter(tiny_base, lora=DROPOUT)
        trainer = kit.trainer(tmp_path / name, tiny_base, kit.rows(12), train=train, model=model, evaluation=evaluation)
        trainer.train()
        return trainer

    without = run("without", evaluation=None)
    seen: list[bool] = []

    def measure(model: Any) -> dict[str, float]:
        seen.append(model.training or any(module.training for module in model.modules()))
        return held_out(model)

    answers: list[str] = []
    evaluated = run("with", evaluation=Evaluation(1, measure, answer=lambda model: [("q", str(answers.append("a")))]))
    assert seen == [False] * 4 and len(answers) == 4
    assert kit.losses(evaluated) == kit.losses(without)
    assert kit.same(kit.weights(evaluated.model), kit.weights(without.model))


def test_evaluating_an_nf4_base_in_mid_training_changes_nothing(tiny_base: Path, tmp_path: Path) -> None:
    """bitsandbytes repacks 4-bit weights at the first evaluation on some CPUs; later gradients are then wrong."""

    def run(name: str, *, evaluation: Evaluation | None) -> Any:
        base = Base(name=str(tiny_base), quantize="nf4", compute_dtype="bfloat16")
        model = kit.adapter(tiny_base, base=base, spread=0.05)
        trainer = kit.trainer(tmp_path / name, tiny_base, kit.rows(12), train=SMALL, model=model, evaluation=evaluation)
        trainer.train()
        return trainer

    without, evaluated = run("without", evaluation=None), run("with", evaluation=Evaluation(1, held_out))
    assert kit.losses(evaluated) == kit.losses(without)
    assert [row["grad_norm"] for row in evaluated.state.log_history if "grad_norm" in row] == [
        row["grad_norm"] for row in without.state.log_history if "grad_norm" in row
    ]
    assert kit.same(kit.weights(evaluated.model), kit.weights(without.model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_adapter_of_a_4_bit_base_keeps_its_dtype(tiny_base: Path, tmp_path: Path, dtype: str) -> None:
    model = kit.adapter(tiny_base, base=Base(name=str(tiny_base), quantize="nf4", compute_dtype="bfloat16"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    before = kit.weights(model)
    trainer = kit.trainer(tmp_path, tiny_base, kit.rows(4), train=SMALL, model=model)
    assert kit.same(kit.weights(trainer.model), before)
    assert trainer.args.bf16 == (dtype == "float32")
    trainer.train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {getattr(torch, dtype)}


def test_the_best_weights_are_put_back(tiny_base: Path, tmp_path: Path) -> None:
    losses, kept = iter([3.0, 2.0, 4.0, 5.0]), []

    def measure(model: Any) -> dict[str, float]:
        kept.append(kit.weights(model))
        return {"loss": next(losses)}

    plan = Evaluation(every=1, measure=measure, keep="best")
    trainer = kit.trainer(tmp_path, tiny_base, kit.rows(16), train=SMALL, evaluation=plan)
    trainer.train()
    assert trainer.evaluations.standing.best_step == 2
    assert kit.same(kit.weights(trainer.model), kept[1]) and not kit.same(kept[1], kept[3])


def test_it_stops_when_the_held_out_loss_stays_up(tiny_base: Path, tmp_path: Path) -> None:
    losses = iter([3.0, 2.0, 2.5, math.nan, 1.0])
    plan = Evaluation(every=1, measure=lambda model: {"loss": next(losses)}, stop_after=2)
    train = SMALL.model_copy(update={"max_steps": 9})
    trainer = kit.trainer(tmp_path, tiny_base, kit.rows(40), train=train, evaluation=plan)
    trainer.train()
    assert trainer.state.global_step == 4
    found = checkpoint.newest(tmp_path, report=pytest.fail)
    assert found is not None and found.run["evaluations"]["stopped"]
    again = kit.trainer(tmp_path, tiny_base, kit.rows(40), train=train, evaluation=plan)
    assert again.train(resume_from_checkpoint=True).global_step == 4
    assert kit.same(kit.weights(again.model), kit.weights(trainer.model))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_before_the_step(tiny_base: Path, tmp_path: Path, where: str) -> None:
    model = kit.adapter(tiny_base)
    train = SMALL.model_copy(update={"save_every": 1})
    trainer = kit.trainer(tmp_path, tiny_base, kit.rows(16), train=train, model=model)
    trainer.for_run(RunFacts(sources=["alpaca.json"]))
    parameter = next(p for p in model.parameters() if p.requires_grad)
    before: dict[str, torch.Tensor] = {}

    class Spoil(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                before.update(kit.weights(model))
                if where == "gradient":
                    parameter.register_hook(lambda gradient: gradient * math.inf)

    if where == "loss":
        inner = trainer.compute_loss
        calls = iter(range(99))
        trainer.compute_loss = lambda *a, **k: inner(*a, **k) * (math.nan if next(calls) == 5 else 1.0)
    trainer.add_callback(Spoil())
    with pytest.raises(CheckFailed) as caught:
        trainer.train()
    lines = trainer._sampler.order(0)[8:12]
    bad = lines[2:] if where == "loss" else lines
    message = str(caught.value)
    assert "step 3" in message
    assert ", ".join(f"alpaca.json:{line + 1}" for line in bad) in message
    assert kit.same(kit.weights(model), before)
    found = checkpoint.newest(tmp_path, report=pytest.fail)
    assert found is not None and found.step == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_stops(tiny_base: Path, tmp_path: Path, number: signal.Signals) -> None:
    class Press(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                os.kill(os.getpid(), number)

    train = SMALL.model_copy(update={"max_steps": 6})
    whole = kit.trainer(tmp_path / "whole", tiny_base, kit.rows(30), train=train)
    whole.train()
    handler = signal.getsignal(number)
    stopped = kit.trainer(tmp_path / "run", tiny_base, kit.rows(30), train=train)
    stopped.add_callback(Press())
    with pytest.raises(Interrupted) as caught:
        stopped.train()
    assert caught.value.exit_code == 128 + number and stopped.state.global_step == 2
    assert signal.getsignal(number) is handler
    again = kit.trainer(tmp_path / "run", tiny_base, kit.rows(30), train=train)
    again.train(resume_from_checkpoint=True)
    assert kit.losses(again) == kit.losses(whole)[2:]


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_training(tiny_base: Path, tmp_path: Path) -> None:
    said: list[str] = []
    trainer = kit.trainer(tmp_path, tiny_base, kit.rows(16), train=SMALL)
    (tmp_path / "checkpoints").write_text("in the way")
    trainer.for_run(RunFacts(report=said.append)).train()
    assert trainer.state.global_step == 4
    assert said and said[0].startswith("checkpoint of step 4 was not written, training goes on")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(tiny_base: Path, tmp_path: Path, optimizer: str) -> None:
    rate = {"sgd": 1.0, "lion_8bit": 1e-3}.get(optimizer, 1e-2)
    train = SMALL.model_copy(update={"optimizer": optimizer, "learning_rate": rate, "max_steps": 12, "batch_size": 2})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        trainer = kit.trainer(tmp_path, tiny_base, kit.rows(2), train=train)
        trainer.train()
    rows = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert rows[-1] < rows[0] - 0.01


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_warms_up_and_follows_its_name(tiny_base: Path, tmp_path: Path, schedule: str) -> None:
    train = SMALL.model_copy(update={"schedule": schedule, "warmup": 2, "max_steps": 6, "learning_rate": 1e-3})
    trainer = kit.trainer(tmp_path, tiny_base, kit.rows(8), train=train)
    trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    assert rates[:3] == pytest.approx([0.0, 5e-4, 1e-3])
    assert rates[3] == pytest.approx(1e-3) if schedule == "constant" else rates[5] < rates[3] < 1e-3


def test_lora_plus_trains_b_at_its_own_rate(tiny_base: Path, tmp_path: Path) -> None:
    lora = Lora(rank=4, alpha=8.0, plus_ratio=16.0)
    model = kit.adapter(tiny_base, lora=lora)
    trainer = kit.trainer(tmp_path, tiny_base, kit.rows(8), train=SMALL, model=model)
    trainer.for_run(RunFacts(groups=lambda: parameter_groups(model, lora=lora, train=SMALL)))
    trainer.train()
    rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    assert sorted(rates) == pytest.approx([SMALL.learning_rate, 16 * SMALL.learning_rate])
    again = kit.trainer(tmp_path, tiny_base, kit.rows(8), train=SMALL, model=kit.adapter(tiny_base, lora=lora))
    with pytest.raises(CheckFailed, match="another optimizer"):
        again.create_optimizer()
        found = checkpoint.newest(tmp_path, report=pytest.fail)
        again._load_optimizer_and_scheduler(str(found.folder))


def test_steps_are_counted_before_training(tiny_base: Path, tmp_path: Path) -> None:
    for count, epochs, most in ((17, 2.0, None), (17, 1.5, None), (5, 1.0, 7)):
        train = Train(batch_size=4, micro_batch_size=2, epochs=epochs, max_steps=most)
        trainer = kit.trainer(tmp_path / f"{count}-{epochs}", tiny_base, kit.rows(count), train=train)
        trainer.train()
        assert trainer.state.global_step == plan_steps(count, train).total_steps
    with pytest.raises(RecipeError, match="micro_batch_size"):
        plan_steps(5, Train())
    with pytest.raises(DataError, match="no rows"):
        kit.trainer(tmp_path, tiny_base, kit.rows(2).select([]), train=SMALL)


OFFLINE = """
import sys
tried = []
def watch(event, arguments):
    if event == "socket.connect":
        tried.append(arguments[1])
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        tried.append(arguments[0])
    if event.startswith("socket.") and tried and not str(tried[-1]).startswith(("127.", "localhost")):
        raise OSError(f"no network here: {tried}")
sys.addaudithook(watch)
sys.path.insert(0, sys.argv[1])
import training_kit as kit
from pathlib import Path
from lora_tune.recipe import Train
trainer = kit.trainer(Path(sys.argv[3]), Path(sys.argv[2]), kit.rows(4), train=Train(batch_size=2, micro_batch_size=2))
trainer.train()
assert trainer.state.global_step == 2
assert not tried, tried
"""


def test_training_tries_no_connection(tiny_base: Path, tmp_path: Path) -> None:
    """In a process of its own without the offline switches and CI that would keep upstream's telemetry quiet."""
    quiet = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "HF_DATASETS_OFFLINE", "CI")
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    tests = Path(__file__).parent
    environment["PYTHONPATH"] = f"{tests.parent}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    command = [sys.executable, "-c", OFFLINE, str(tests), str(tiny_base), str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_trl_does_not_advise_against_rows_that_are_packed_already(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A micro-batch of 1 is a full row of documents; nothing else that TRL says is lost."""
    train = Train(batch_size=2, micro_batch_size=1, max_steps=1, max_length=64)
    kit.trainer(tmp_path, tiny_base, kit.rows(4), train=train)
    logging.getLogger("trl.trainer.sft_trainer").warning("You are using something else")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("trl")] == [
        "You are using something else"
    ]

"""The preflight: the longest of everything once, measured, and afterwards nothing is other than before."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_kit as kit
from test_replan import CUDA, Short

from lora_tune.data.chat_template import TokenRow
from lora_tune.errors import ResourceError
from lora_tune.recipe import Base, Lora, Train
from lora_tune.training import checkpoint
from lora_tune.training.preflight import Measured, try_out
from lora_tune.training.progress import TrainingDisplay, read_metrics
from lora_tune.training.resume import RunFacts

SETTINGS: dict[str, Any] = {"batch_size": 8, "micro_batch_size": 4, "max_steps": 4, "learning_rate": 5e-3}
KINDS: dict[str, dict[str, Any]] = {
    "dropout, neftune": {"lora": Lora(rank=4, alpha=8.0, dropout=0.1), "neftune_alpha": 5.0},
    "nf4, bfloat16 beside float32 adapters": {"base": {"quantize": "nf4", "compute_dtype": "bfloat16"}},
    "8-bit optimizer": {"optimizer": "adamw_8bit"},
    "paged optimizer": {"optimizer": "paged_adamw_8bit"},
    "a head in full": {"lora": Lora(rank=4, alpha=8.0, modules_to_save=("lm_head",)), "optimizer": "adafactor"},
    "checkpointed layers": {"layers": "all"},
    "a budget": {"budget": "2h", "max_steps": None},
}


def held_out(count: int = 6) -> list[TokenRow]:
    """Rows of which some tokens are trained."""
    rows: list[TokenRow] = []
    for document in kit.documents(count, seed=8):
        ids = np.array(document["input_ids"], dtype=np.int32)
        rows.append(TokenRow(ids, np.array(document["labels"]) != -100, 0, "rows", len(rows) + 1, frozenset()))
    return rows


def make(base: Path, folder: Path, kind: str = "dropout, neftune") -> Any:
    """A trainer of this kind, ready to start."""
    from lora_tune.model.base import checkpoint_layers

    given = dict(KINDS[kind])
    frozen = Base(**{"name": str(base), "quantize": "none", "compute_dtype": "float32"} | given.pop("base", {}))
    model = kit.adapter(base, base=frozen, lora=given.pop("lora", None), spread=0.05)
    checkpoint_layers(model, given.pop("layers", "none"))
    trainer = kit.trainer(folder, base, kit.rows(21), train=Train(**SETTINGS | given), model=model)
    return trainer.for_run(RunFacts(report=lambda line: None, display=TrainingDisplay(folder, style="none")))


class Ticking:
    """A clock that moves by five minutes whenever somebody looks at it."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 300.0
        return self.now


def preflight(trainer: Any, base: Path) -> Measured:
    return try_out(trainer, chat=kit.chat_of(base), held_out=held_out())


def randomness() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_after_a_preflight_is_the_same_run(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    runs = {}
    for name in ("without", "with"):
        trainer = make(tiny_base, tmp_path / name, kind)
        if name == "with":
            before, drawn = kit.weights(trainer.model), randomness()
            modes = [module.training for module in trainer.model.modules()]
            preflight(trainer, tiny_base)
            assert kit.same(kit.weights(trainer.model), before) and randomness() == drawn
            assert all(parameter.grad is None for parameter in trainer.model.parameters())
            assert [module.training for module in trainer.model.modules()] == modes
            assert trainer.optimizer is None and trainer.lr_scheduler is None
            assert not list((tmp_path / name).rglob("*")), "files are left"
        if kind == "a budget":
            trainer.facts = RunFacts(report=lambda line: None, clock=Ticking())
        trainer.train()
        runs[name] = trainer
    assert kit.losses(runs["with"]) == kit.losses(runs["without"]) and len(kit.losses(runs["with"])) > 3
    assert kit.same(kit.weights(runs["with"].model), kit.weights(runs["without"].model))


def test_it_takes_the_longest_rows_and_measures(tiny_base: Path, tmp_path: Path) -> None:
    trainer = make(tiny_base, tmp_path)
    seen: list[int] = []
    run = trainer.micro_step

    def watch(model: Any, inputs: dict[str, Any], divisor: Any) -> Any:
        seen.append(int((inputs["position_ids"] == 0).sum()))
        return run(model, inputs, divisor)

    trainer.micro_step = watch
    found = preflight(trainer, tiny_base)
    longest = sorted(trainer.row_tokens, reverse=True)[:4]
    assert seen == [4] and found.tokens == sum(longest) and found.micro_batch_size == 4
    assert set(found.peaks_gib) == {"training", "evaluation", "generation"}
    assert all(gib >= found.weights_gib * 0.9 > 0 for gib in found.peaks_gib.values())
    assert found.how == "resident memory, sampled" and found.checkpoint_bytes > 50_000
    first, second = found.lines(0.5)
    assert "planned 0.50 GiB" in first and "resident memory" in first and "evaluation" in second
    assert "planned" not in found.lines(None)[0]


@pytest.mark.parametrize("where", ["forward", "backward", "head"])
def test_what_does_not_fit_is_halved_before_the_first_step(tiny_base: Path, tmp_path: Path, where: str) -> None:
    trainer = make(tiny_base, tmp_path / "run", "8-bit optimizer")
    short = Short(rows=1, step=0, where=where).into(trainer)
    found = preflight(short, tiny_base)
    assert found.micro_batch_size == trainer.micro_batch_size == 1
    assert [(replan.step, replan.micro_batch_size, replan.accumulation) for replan in trainer.replans] == [
        (0, 2, 4),
        (0, 1, 8),
    ]
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    trainer.train()
    kept = checkpoint.newest(tmp_path / "run", report=pytest.fail)
    assert kept is not None and [replan["step"] for replan in kept.run["resolved"]["replans"]] == [0, 0]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["replan"]["micro_batch_size"] for row in rows if "replan" in row] == [2, 1]
    small = make(tiny_base, tmp_path / "small", "8-bit optimizer")
    small.train()
    assert [row["loss"] for row in trainer.state.log_history if "loss" in row] == pytest.approx(
        [row["loss"] for row in small.state.log_history if "loss" in row], abs=1e-5
    )


def test_where_nothing_fits_it_says_so_before_the_first_step(tiny_base: Path, tmp_path: Path) -> None:
    trainer = Short(rows=0, step=0).into(make(tiny_base, tmp_path))
    with pytest.raises(ResourceError, match="out of memory at micro-batch 1") as caught:
        preflight(trainer, tiny_base)
    assert caught.value.exit_code == 4 and trainer.state.global_step == 0
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_an_evaluation_that_does_not_fit_is_known_before_the_first_step(tiny_base: Path, tmp_path: Path) -> None:
    trainer = make(tiny_base, tmp_path)

    def refuse(module: Any, *_: Any) -> None:
        if not torch.is_grad_enabled():
            raise torch.OutOfMemoryError(CUDA)

    trainer.model.get_output_embeddings().register_forward_hook(refuse)
    with pytest.raises(ResourceError, match="the longest row does not fit") as caught:
        preflight(trainer, tiny_base)
    assert caught.value.exit_code == 4


def test_a_disk_that_takes_no_checkpoint_is_known_before_the_first_step(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(ResourceError, match="a checkpoint cannot be written: No space left") as caught:
        preflight(make(tiny_base, tmp_path), tiny_base)
    assert caught.value.exit_code == 4

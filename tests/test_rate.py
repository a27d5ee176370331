"""The learning rate at auto: from the width of the base, decided once, a number wherever it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_tune.errors import RecipeError
from lora_tune.model.rate import learning_rate, rate_of
from lora_tune.model.source import find_base
from lora_tune.recipe import Recipe, Train
from lora_tune.run import _resolve
from lora_tune.training.checkpoint import Checkpoint
from lora_tune.training.start import Start

LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "intermediate_size": 64,
}  # fmt: skip


@given(st.integers(1, 4000), st.floats(1e-9, 1e9))
def test_auto_falls_as_the_base_grows_wider_and_a_number_stays(heads: int, number: float) -> None:
    config = {**LLAMA, "hidden_size": 4 * heads}
    assert learning_rate(Train(), config) * 4 * heads == pytest.approx(2e-4 * 4096, rel=6e-3)
    assert learning_rate(Train(learning_rate=number), config) == number == rate_of(Train(learning_rate=number))


@pytest.mark.parametrize(
    ("width", "rate"), [(4096, 2e-4), (8192, 1e-4), (320, 2.56e-3)], ids=["8B", "65B", "embedded base"]
)
def test_rates_of_known_widths(width: int, rate: float) -> None:
    assert learning_rate(Train(), {**LLAMA, "hidden_size": width}) == rate
    nested = {"model_type": "gemma3", "text_config": {**LLAMA, "hidden_size": width}}
    assert learning_rate(Train(), nested) == rate


@pytest.mark.parametrize("value", [0, -1e-4, float("nan"), float("inf"), 10**400, True, "high", None])
def test_what_is_no_rate_is_refused(value: Any) -> None:
    with pytest.raises(ValidationError):
        Train(learning_rate=value)


def test_auto_must_be_decided_before_it_is_used() -> None:
    with pytest.raises(RecipeError, match=r"train\.learning_rate: must be a number by now"):
        rate_of(Train())


def test_the_trainer_decides_for_who_calls_it_from_python(tiny_base: Path, tmp_path: Path) -> None:
    import training_kit

    train = Train(batch_size=2, micro_batch_size=2, max_steps=1)
    trainer = training_kit.trainer(tmp_path, tiny_base, training_kit.rows(4), train=train)
    width = trainer.model.config.hidden_size
    assert trainer.args.learning_rate == learning_rate(train, {**LLAMA, "hidden_size": width})


@pytest.mark.parametrize(("stored", "rate"), [({"learning_rate": 1e-3}, 1e-3), ({}, 2.56e-3)], ids=["kept", "older"])
def test_a_resumed_run_keeps_the_rate_that_it_was_started_with(
    stored: dict[str, float], rate: float, tmp_path: Path
) -> None:
    content = {"base": {"name": "builtin:quickstart"}, "data": [{"source": "rows.jsonl"}], "output": "out"}
    recipe = Recipe.model_validate(content)
    run = {"resolved": {"micro_batch_size": 2, "gradient_checkpointing": 0, "optimizer": "adamw", **stored}}
    start = Start(found=Checkpoint(tmp_path, step=1, run=run, run_id="", files=frozenset()))
    resolved, _ = _resolve(recipe, find_base(recipe.base), start=start)
    assert resolved.train.learning_rate == rate

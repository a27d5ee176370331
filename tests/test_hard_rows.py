"""Training rows that stay hard: a wrong label is found, the numbers are those of the rows alone, nothing changes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_kit

from lora_tune.data.chat_template import ChatTemplate
from lora_tune.data.checking import read_conversations
from lora_tune.data.pipeline import Prepared, encode
from lora_tune.evaluation.hard_rows import SHOWN, hard_rows, time_for
from lora_tune.evaluation.losses import row_losses
from lora_tune.recipe import Base, Recipe, Train

WRONG = 17  # line of the row with the wrong answer


@dataclass
class Trained:
    """A model that has seen the rows, and the rows."""

    model: Any
    prepared: Prepared
    chat: ChatTemplate


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Trained:
    """40 rows with one rule, one of which breaks it, trained for 15 steps."""
    folder = tmp_path_factory.mktemp("hard")
    rows = [{"prompt": f"Say the word {n}.", "completion": "the word"} for n in range(1, 41)]
    rows[WRONG - 1]["completion"] = "QX%7~Z!"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = Train(max_steps=15, batch_size=8, micro_batch_size=8, max_length=96, learning_rate=2e-2, packing=False)
    content = {
        "base": Base(name=str(tiny_base), quantize="none"),
        "data": [{"source": str(folder / "rows.jsonl"), "format": "prompt_completion"}],
        "train": train,
        "eval": {"hold_out": 0},
        "output": str(folder / "out"),
    }
    recipe = Recipe.model_validate(content)
    chat = training_kit.chat_of(tiny_base)
    conversations = read_conversations(recipe.data, hold_out=recipe.eval, seed=1)
    prepared = encode(conversations, chat, loss_on="assistant", train=train, limits=recipe.limits, seed=1)
    model = training_kit.adapter(tiny_base)
    training_kit.trainer(folder / "out", tiny_base, prepared.train, train=train, model=model).train()
    return Trained(model, prepared, chat)


def test_a_wrong_label_is_the_hardest_row(trained: Trained) -> None:
    found = hard_rows(trained.model, trained.prepared.documents, chat=trained.chat, seed=1, seconds=60)
    assert found.rows[0].place == f"rows.jsonl:{WRONG}"
    assert found.rows[0].answer == "QX%7~Z!" and found.rows[0].prompt == f"Say the word {WRONG}."
    assert found.rows[0].adapter > 2 * found.rows[1].adapter
    assert len(found.rows) == SHOWN and len(found.losses) == found.of == 40


def test_the_losses_are_those_of_each_row_alone(trained: Trained) -> None:
    documents = trained.prepared.documents
    found = hard_rows(trained.model, documents, chat=trained.chat, seed=1, seconds=60)
    alone = [row_losses(trained.model, [row], pad_id=trained.chat.pad_id)[0] for row in documents]
    with trained.model.disable_adapter():
        base = [row_losses(trained.model, [row], pad_id=trained.chat.pad_id)[0] for row in documents]
    expected = sorted((loss.nll / loss.tokens for loss in alone), reverse=True)
    assert sorted(found.losses, reverse=True) == pytest.approx(expected, rel=1e-5)
    assert [row.adapter for row in found.rows] == pytest.approx(expected[:SHOWN], rel=1e-5)
    for row in found.rows:
        line = int(row.place.split(":")[1])
        assert row.base == pytest.approx(base[line - 1].nll / base[line - 1].tokens, rel=1e-5)
        assert row.tokens == alone[line - 1].tokens


def test_the_run_does_not_notice(trained: Trained) -> None:
    model = trained.model
    model.train()
    before, states = training_kit.weights(model), (torch.random.get_rng_state(), str(np.random.get_state()))
    hard_rows(model, trained.prepared.documents, chat=trained.chat, seed=1, seconds=60)
    assert training_kit.same(before, training_kit.weights(model))
    assert model.training and torch.equal(torch.random.get_rng_state(), states[0])
    assert str(np.random.get_state()) == states[1]


@pytest.mark.parametrize("most, seconds, read", [(5, 60, 5), (5_000, 0, 40), (40, 60, 40)])
def test_it_ends_after_a_number_of_rows_or_a_time(most: int, seconds: float, read: int, trained: Trained) -> None:
    documents = trained.prepared.documents
    found = hard_rows(trained.model, documents, chat=trained.chat, seed=2, seconds=seconds, most_rows=most)
    again = hard_rows(trained.model, documents, chat=trained.chat, seed=2, seconds=seconds, most_rows=most)
    assert len(found.losses) == read and (found.losses, found.rows) == (again.losses, again.rows)


def test_the_time_follows_the_training() -> None:
    assert [time_for(seconds) for seconds in (0.0, 75.0, 36_000.0)] == [2.0, 3.75, 120.0]


def test_many_rows_are_read_in_blocks(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_tune.evaluation.hard_rows._AT_ONCE", 8)
    found = hard_rows(trained.model, trained.prepared.documents, chat=trained.chat, seed=1, seconds=0)
    assert len(found.losses) == 8 and found.of == 40

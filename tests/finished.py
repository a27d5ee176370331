"""A finished run on the tiny base, made with the real parts in a second: for tests of the adapter folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from lora_tune.adapter.card import Sample
from lora_tune.adapter.claim import claim_folder
from lora_tune.adapter.folder import ScoreRecord, TrainingRecord
from lora_tune.adapter.vectors import make_test_vectors, precision
from lora_tune.adapter.write import FinishedRun, write_run
from lora_tune.data.chat_template import load_chat_template
from lora_tune.data.sources import SourceIdentity
from lora_tune.model.base import load_base
from lora_tune.model.methods import attach, saved_adapter
from lora_tune.model.source import find_base, load_tokenizer
from lora_tune.recipe import Recipe

TRAINING = TrainingRecord(
    method="lora", steps=3, tokens=1200, seconds=1.5, final_loss=1.25, batch_size=4, micro_batch_size=2, accumulation=2,
    max_length=128, learning_rate=2e-4, optimizer="adamw", schedule="cosine", device="cpu",
)  # fmt: skip
SCORES = {"loss": ScoreRecord(base=3.5, adapter=1.25, low=-2.5, high=-2.0, rows=40)}
SAMPLES = (Sample("Who?", "Ann", "```\nBob", "Ann"),)


def recipe_for(base: Path, *, quantize: str = "none", lora: dict[str, Any] | None = None, **keys: Any) -> Recipe:
    """A recipe as `read_recipe` gives it: local paths absolute."""
    folder = base.parent
    content: dict[str, Any] = {
        "base": {"name": str(base), "quantize": quantize, "compute_dtype": "float32"},
        "data": [{"source": str(folder / "rows.jsonl"), "format": "messages"}, {"source": "org/data"}],
        "lora": {"rank": 4, "alpha": 8, **(lora or {})},
        "output": str(folder / "out"),
        **keys,
    }
    return Recipe.model_validate(content)


def trained_model(recipe: Recipe, *, strength: float = 0.1) -> PeftModel:
    """The base with an adapter whose trainable numbers were moved by `strength`, as training would."""
    source = find_base(recipe.base)
    model = attach(load_base(source, recipe.base), recipe.lora, source=source, base=recipe.base, seed=1)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(strength * torch.randn(parameter.shape, generator=draw).to(parameter.dtype))
    return model.eval()


def finished_run(recipe: Recipe, model: PeftModel) -> FinishedRun:
    """What the run verb hands to `write_run`."""
    source = find_base(recipe.base)
    chat = load_chat_template(load_tokenizer(source, new_tokens=recipe.lora.new_tokens))
    here = precision(device="cpu", compute_dtype="float32", quantize=recipe.base.quantize)
    return FinishedRun(
        recipe=recipe,
        source=source,
        compute_dtype="float32",
        adapter=saved_adapter(model, lora=recipe.lora, source=source),
        chat=chat,
        identities=(
            SourceIdentity("rows.jsonl", "messages", "ab" * 32, 100),
            SourceIdentity("org/data", "alpaca", "cd" * 32, 200, revision="1" * 40),
        ),
        ledger={"total": {"read": 300, "kept": 290}, "sources": []},
        training=replace_method(recipe.lora.method),
        vectors=make_test_vectors(model, chat, made_on=here),
        scores=SCORES,
        samples=SAMPLES,
    )


def replace_method(method: str) -> TrainingRecord:
    """The training record of another method."""
    return TRAINING.model_copy(update={"method": method})


def write_finished(folder: Path, base: Path, **keys: Any) -> PeftModel:
    """A whole adapter folder for `base`; returns the model as it was trained."""
    recipe = recipe_for(base, **keys)
    model = trained_model(recipe)
    with claim_folder(folder, "new"):
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5}\n', encoding="utf-8")
        write_run(folder, finished_run(recipe, model))
    return model

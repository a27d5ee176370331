"""What pages say that the plan says: lengths that fit, and 256 tokens more do not; what fused layers save."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import context_by_plan as planned
from benchmarks.model_configs import CONFIGS
from lora_tune.model.memory import plan_memory
from lora_tune.recipe import Base, Lora, Train
from lora_tune.recipe_file import read_recipe

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "gpu_memory.md").read_text(encoding="utf-8")
LINES = PAGE[PAGE.index(planned.COLUMNS) :].splitlines()[2:6]


@pytest.mark.parametrize("line", LINES)
def test_the_page_says_what_the_plan_fits(line: str) -> None:
    card, *lengths = (cell.strip() for cell in line.strip("| ").split("|"))
    gib, (*ours, published) = int(card.split()[0]), (int(length.replace(",", "")) for length in lengths)
    assert published == planned.PUBLISHED[gib]
    for tokens, (offload, embeddings) in zip(ours, planned.HOW, strict=True):
        assert planned.fits(tokens, gib, offload=offload, embeddings=embeddings), tokens
        assert not planned.fits(tokens + planned.STEP, gib, offload=offload, embeddings=embeddings), tokens


@pytest.mark.parametrize(("kernels", "gib", "layers"), [("auto", 14.0, 23), ("off", 18.8, 31)])
def test_what_fused_layers_save_by_the_plan(kernels: str, gib: float, layers: int) -> None:
    train = Train.model_validate({"micro_batch_size": 1, "gradient_checkpointing": "none", "kernels": kernels})
    base = Base(name="x", quantize="nf4")
    whole = plan_memory(CONFIGS["Qwen/Qwen2.5-7B"], base=base, lora=Lora(), train=train, budget_gib=99, device="cuda")
    assert whole.peak_gib == pytest.approx(gib, abs=0.1)
    recipe = read_recipe(ROOT / "recipes" / "alpaca_8gb.yaml", overrides=[f"train.kernels={kernels}"]).recipe
    given = {"base": recipe.base, "lora": recipe.lora, "train": recipe.train, "device": "cuda"}
    small = plan_memory(CONFIGS["mistralai/Mistral-7B-v0.3"], budget_gib=7, **given)  # type: ignore[arg-type]
    assert small.gradient_checkpointing == layers

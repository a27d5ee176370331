"""The lengths that docs/gpu_memory.md says: each fits by the plan, and 256 tokens more do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import context_by_plan as planned

PAGE = (Path(__file__).parents[1] / "docs" / "gpu_memory.md").read_text(encoding="utf-8")
LINES = [line for line in PAGE[PAGE.index(planned.COLUMNS) :].splitlines()[2:6]]


@pytest.mark.parametrize("line", LINES)
def test_the_page_says_what_the_plan_fits(line: str) -> None:
    card, *lengths = (cell.strip() for cell in line.strip("| ").split("|"))
    gib, (*ours, published) = int(card.split()[0]), (int(length.replace(",", "")) for length in lengths)
    assert published == planned.PUBLISHED[gib]
    for tokens, (offload, embeddings) in zip(ours, planned.HOW, strict=True):
        assert planned.fits(tokens, gib, offload=offload, embeddings=embeddings), tokens
        assert not planned.fits(tokens + planned.STEP, gib, offload=offload, embeddings=embeddings), tokens

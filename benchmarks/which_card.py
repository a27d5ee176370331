"""Which model fits on which card, from the plan:

    python -m benchmarks.which_card            print the table (docs/which_card.md holds it)
    python -m benchmarks.which_card --write    write it there

For each model and each size of memory: the longest sequence, a power of two, with which `lora-tune plan` fits a batch
of 2 (rank 16 on all linear layers, everything else at `auto`), for a base held in nf4 and, behind the stroke, in
bfloat16. A dash: not even 256 tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from benchmarks.model_configs import CONFIGS
from lora_tune.model.cards import find_card, usable_gib
from lora_tune.model.choice import choose
from lora_tune.model.footprint import job_of
from lora_tune.recipe import Base, Lora, Train

TABLE = Path(__file__).resolve().parent.parent / "docs" / "which_card.md"
SIZES_GIB = (8, 12, 16, 24, 48, 80)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768)


def longest(config: dict[str, Any], gib: int, quantize: Literal["nf4", "none"]) -> int | None:
    """The longest of LENGTHS that fits; None where none does."""
    card, fitting = find_card(f"{gib}GiB"), None
    for length in LENGTHS:
        job = job_of(
            config,
            base=Base(name="x", quantize=quantize),
            lora=Lora(),
            train=Train(max_length=length),
            device="cuda",
        )
        if choose(job, usable_gib(card), card=card) is None:
            break
        fitting = length
    return fitting


def cell(config: dict[str, Any], gib: int) -> str:
    """`4k / 1k`: tokens in nf4, and in bfloat16 where that fits."""
    kinds: tuple[Literal["nf4", "none"], ...] = ("nf4", "none")
    found = [longest(config, gib, kind) for kind in kinds]
    words = ["–" if length is None else f"{length // 1024}k" if length >= 1024 else str(length) for length in found]
    return words[0] if found[1] is None else " / ".join(words)


def table() -> str:
    """The table in Markdown, with what it means above it."""
    head = """\
Longest sequence (tokens) that `lora-tune plan` fits on a card of this much memory, on which nothing else runs: base in
`nf4`, behind the stroke in bfloat16; rank 16 on all linear layers, batch of 2, packed, the rest at `auto`. 32k is the
longest that was tried, – is less than 256. Made by `python -m benchmarks.which_card --write`; planned, not measured.
"""
    lines = ["| model | " + " | ".join(f"{gib} GiB" for gib in SIZES_GIB) + " |", "|---" * (len(SIZES_GIB) + 1) + "|"]
    for name, config in CONFIGS.items():
        lines.append(f"| {name} | " + " | ".join(cell(config, gib) for gib in SIZES_GIB) + " |")
    return head + "\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        TABLE.write_text(table(), encoding="utf-8")
    else:
        sys.stdout.write(table())

"""The longest sequence that the plan fits on cards of 8 to 24 GiB, the table of `docs/gpu_memory.md`:

    python -m benchmarks.context_by_plan [--card rtx4090] [--rank 32] [--write]

Llama 3.1 8B in NF4, adapters on all linear layers, one sequence a step, evaluation included; the longest multiple of
256 tokens up to which everything fits. `--card` is whose attention is counted (`none`: unknown, with a mask). Planned,
not measured: `python -m benchmarks.context` measures on a card. Beside it stands what Unsloth publishes for the same
model at rank 32, measured by them on cards of these sizes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.machine import at_least_one
from benchmarks.model_configs import CONFIGS
from benchmarks.table import put
from lora_tune.model.cards import find_card
from lora_tune.model.memory import try_plan
from lora_tune.recipe import Base, Lora, Train

PAGE = Path(__file__).parents[1] / "docs" / "gpu_memory.md"
STEP = 256
HOW = (("none", "device"), ("auto", "device"), ("auto", "cpu"))  # train.offload, base.embeddings
PUBLISHED = {8: 2_972, 12: 21_848, 16: 40_724, 24: 78_475}  # Unsloth, Llama-3.1-8B, rank 32, batch 1; read 2026-11-22
COLUMNS = "| free memory | `offload: none` | `auto` | and `embeddings: cpu` | Unsloth, published |"


def fits(tokens: int, gib: float, *, offload: str, embeddings: str, card: str = "rtx4090", rank: int = 32) -> bool:
    """Whether the plan finds room for sequences of so many tokens."""
    base = Base.model_validate({"name": "x", "quantize": "nf4", "embeddings": embeddings})
    train = Train.model_validate({"batch_size": 1, "max_length": tokens, "offload": offload})
    known = None if card == "none" else find_card(card)
    config = CONFIGS["meta-llama/Llama-3.1-8B"]
    return try_plan(
        config, base=base, lora=Lora(rank=rank), train=train, budget_gib=gib, device="cuda", card=known
    ).fits


def longest(gib: float, *, offload: str, embeddings: str, card: str = "rtx4090", rank: int = 32) -> int:
    """Tokens up to the first multiple of 256 that does not fit: by halving one could land beyond it."""
    tokens = 0
    while tokens < 2**20 and fits(tokens + STEP, gib, offload=offload, embeddings=embeddings, card=card, rank=rank):
        tokens += STEP
    return tokens


def main() -> None:
    """Print the table, or keep it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--card", default="rtx4090")
    parser.add_argument("--rank", type=at_least_one, default=32)
    parser.add_argument("--write", action="store_true", help="keep it in docs/gpu_memory.md (rank 32, rtx4090)")
    given = parser.parse_args()
    if given.write and (given.card, given.rank) != ("rtx4090", 32):
        parser.error("--write keeps the table of the rtx4090 at rank 32; leave --card and --rank out")
    lines = [COLUMNS, "|---" * 5 + "|"]
    for gib, published in PUBLISHED.items():
        found = [longest(gib, offload=to, embeddings=at, card=given.card, rank=given.rank) for to, at in HOW]
        lines.append(f"| {gib} GiB | " + " | ".join(f"{tokens:,}" for tokens in [*found, published]) + " |")
    print("\n".join(lines))
    if given.write:
        put(lines, PAGE)


if __name__ == "__main__":
    main()

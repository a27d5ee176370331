"""Models on 1, 2, 4 and 8 cards, and how far more cards pay, from the plan:

    python -m benchmarks.many_cards            print the tables (docs/cards_and_strategies.md holds them)
    python -m benchmarks.many_cards --write    write them there

For each model, number of cards and kind of base: the strategy that `auto` takes, GiB at the peak on each card, and the
tokens/s of all of them together, for 2,048 tokens a sequence, rank 16 on all linear layers, 64 sequences a step.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any, Literal

from benchmarks.model_configs import CONFIGS
from lora_tune.model.cards import find_card, usable_gib
from lora_tune.model.links import find_link, link_of
from lora_tune.model.scaling import CardsPlan, Place, pays_until, scaling
from lora_tune.recipe import Recipe

TABLE = Path(__file__).resolve().parent.parent / "docs" / "cards_and_strategies.md"
MODELS = ("Qwen/Qwen2.5-7B", "Qwen/Qwen3-14B", "Qwen/Qwen3-32B", "meta-llama/Llama-3.1-70B")
CARDS = {"rtx4090": "24 GiB", "a100-80": "80 GiB"}
COUNTS = (1, 2, 4, 8)
NETWORK = "100gbe"
Kind = Literal["nf4", "none"]


@cache
def recipe(quantize: Kind) -> Recipe:
    """The recipe of the table."""
    content: dict[str, Any] = {
        "base": {"name": "org/base", "quantize": quantize}, "data": [{"source": "org/rows"}],
        "train": {"batch_size": 64, "max_length": 2048}, "output": "adapters/x",
    }  # fmt: skip
    return Recipe.model_validate(content)


def place(card: str) -> Place:
    """Cards of this name: PCIe 4 or NVLink inside a machine of eight, 100 Gbit/s between machines."""
    found = find_card(card)
    return Place(usable_gib(found), "cuda", found, link_of(found), find_link(NETWORK))


def cell(plan: CardsPlan | None) -> str:
    """`ddp 16.2, 9.7k`: strategy, GiB a card, thousand tokens/s; a dash where it does not fit."""
    if plan is None or plan.memory is None:
        return "–"
    speed = (plan.tokens_per_s or 0) / 1000
    name = "" if plan.layout.world == 1 else f"{plan.layout.strategy} "
    return f"{name}{plan.memory.peak_gib:.1f}, {speed:.1f}k"


def tables() -> str:
    """All tables in Markdown, with what they mean above them."""
    parts = [_HEAD]
    for card, size in CARDS.items():
        link = link_of(find_card(card))
        joined = f"`{link.name}`, {link.gbs:g} GB/s each way"
        lines = [f"## Cards of {size} ({card}, {joined})\n", "| model | base | 1 | 2 | 4 | 8 | pays up to |"]
        lines.append("|---" * 7 + "|")
        for model in MODELS:
            for quantize in ("nf4", "none"):
                plans = scaling(CONFIGS[model], recipe(quantize), place=place(card))  # type: ignore[arg-type]
                fitting = {plan.layout.world: plan for plan in plans}
                cells = [cell(fitting.get(count)) for count in COUNTS]
                until = pays_until(plans)
                held = "nf4" if quantize == "nf4" else "bfloat16"
                lines.append(f"| {model} | {held} | {' | '.join(cells)} | {until or '–'} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


_HEAD = """\
# Models on several cards

What `lora-tune plan` says (planned, not measured; ± 25 % for speeds): the strategy that `auto` takes, GiB at the peak
on each card, tokens/s of all cards together. 64 sequences of 2,048 tokens a step, rank 16 on all linear layers, the
rest at `auto`; `–` does not fit. **Pays up to**: the number of cards from which twice as many would be less than 1.5
times as fast (up to 64, eight to a machine, 100 Gbit/s Ethernet between machines). Made by `python -m
benchmarks.many_cards --write`; a test compares it.

`ddp` divides the rows and sums the adapter's gradients once a step: megabytes, so that it scales over nearly any
network. `fsdp2` divides the base as well and gathers it twice in every micro-batch: gigabytes, so that it needs the
links inside a machine. For your own recipe: `lora-tune plan RECIPE --cards 4 --link pcie4`, see
[planning.md](planning.md) and [launching.md](launching.md).
"""


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        TABLE.write_text(tables(), encoding="utf-8")
    else:
        sys.stdout.write(tables())

"""Speed on several cards, from the measured speed of one and the bandwidth between them, beside what others measured:

    python -m benchmarks.scaling_simulation            print (benchmarks/results/scaling_simulation.md holds it)
    python -m benchmarks.scaling_simulation --write    write it there

The computing of a step is taken from a published measurement, divided by the cards; the bytes between them are those
of `lora_tune.model.scaling`, which tests hold to torch; nothing here was measured on GPUs by us.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks.model_configs import CONFIGS
from lora_tune.model.footprint import Job, job_of
from lora_tune.model.links import LINKS, REACHED
from lora_tune.model.scaling import exchanged, joined_seconds, layout_on
from lora_tune.model.strategy import Name
from lora_tune.recipe import Base, Lora, Train

RESULT = Path(__file__).resolve().parent / "results" / "scaling_simulation.md"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA_70B = CONFIGS["meta-llama/Llama-3.1-70B"] | {"vocab_size": 32_000}  # Llama 2 70B has the same layers
MISTRAL = CONFIGS["mistralai/Mistral-7B-v0.3"] | {"vocab_size": 32_000}
FMS = "fms-acceleration, scripts/benchmarks/refs/a100_80gb.csv"
ANSWER = "AnswerDotAI/fsdp_qlora, benchmarks_03_2024.md"


@dataclass(frozen=True, slots=True)
class Measured:
    """One published pair: seconds of a step before and after more cards, or another strategy, were used.

    `computing_s` is a card's own work in a step on `cards` cards, from the first measurement; `step_s` the second one.
    `micro` sequences of `length` tokens are a card's micro-batch, `accumulation` of them a step.
    """

    what: str
    config: dict[str, object]
    quantize: Literal["nf4", "none"]
    cards: int
    strategy: Name
    link: str
    computing_s: float
    step_s: float
    accumulation: int
    source: str
    targets: tuple[str, ...] | str = "all-linear"


def of_fms(name: str, config: dict[str, object], quantize: Literal["nf4", "none"], batch: int, tps: tuple[float, float]
           ) -> Measured:  # fmt: skip
    """Tokens/s of one card and of each of two, the global batch of 4,096-token rows the same."""
    tokens = batch * 4096
    return Measured(f"{name}, batch {batch} x 4,096, 1 to 2 A100-80", config, quantize, 2, "fsdp2", "nvlink3",
                    tokens / tps[0] / 2, tokens / (2 * tps[1]), 1, FMS, ATTENTION)  # fmt: skip


def of_answer(what: str, config: dict[str, object], quantize: Literal["nf4", "none"], link: str,
              seconds: tuple[float, float], *, batch: int, cards: int = 2) -> Measured:  # fmt: skip
    """Seconds for 1,024 sequences of 2,048 tokens: without dividing the base (or on half the cards), and with."""
    steps = 1024 / (cards * batch)
    return Measured(what, config, quantize, cards, "fsdp2", link, seconds[0] / steps, seconds[1] / steps, 1, ANSWER)


LLAMA_7B = CONFIGS["meta-llama/Llama-2-7b"]
ROWS = (
    of_fms("Mistral-7B bfloat16", MISTRAL, "none", 4, (3597.6, 2995.9)),
    of_fms("Mistral-7B bfloat16", MISTRAL, "none", 8, (3632.4, 3417.6)),
    of_fms("Mistral-7B nf4", MISTRAL, "nf4", 4, (3428.6, 2843.4)),
    of_fms("Mistral-7B nf4", MISTRAL, "nf4", 8, (3514.4, 3290.2)),
    of_fms("Llama-2-70B nf4", LLAMA_70B, "nf4", 4, (457.1, 418.9)),
    of_answer("Llama-2-7B bfloat16, 2 RTX 4090, ddp to fsdp", LLAMA_7B, "none", "pcie4", (437, 481), batch=6),
    of_answer("Llama-2-7B nf4, 2 RTX 4090, ddp to fsdp", LLAMA_7B, "nf4", "pcie4", (450, 466), batch=10),
    of_answer("Llama-2-7B bfloat16, 2 RTX 3090*, ddp to fsdp", LLAMA_7B, "none", "pcie3x4", (881, 1366), batch=4),
    of_answer("Llama-2-7B bfloat16, 2 RTX 3090*, ddp to fsdp", LLAMA_7B, "none", "pcie3x4", (881, 1199), batch=6),
    of_answer("Llama-2-7B nf4, 2 RTX 3090*, ddp to fsdp", LLAMA_7B, "nf4", "pcie3x4", (875, 998), batch=4),
    of_answer("Llama-2-70B nf4, 4 to 8 A5000*", LLAMA_70B, "nf4", "pcie4", (4829 / 2, 2613), batch=1, cards=8),
    of_answer("Llama-2-70B nf4, 4 to 8 A100-40", LLAMA_70B, "nf4", "nvlink3", (1266 / 2, 672), batch=4, cards=8),
)


def job(config: dict[str, object], quantize: Literal["nf4", "none"], cards: int, strategy: Name,
        targets: tuple[str, ...] | str = "all-linear") -> Job:  # fmt: skip
    """What the formulas need."""
    lora = Lora() if targets == "all-linear" else Lora(targets=targets)  # type: ignore[arg-type]
    made = job_of(config, base=Base(name="x", quantize=quantize), lora=lora, train=Train(), device="cuda")
    return replace(made, layout=layout_on(cards, strategy))


def simulated(row: Measured) -> float:
    """Seconds of a step."""
    made = job(row.config, row.quantize, row.cards, row.strategy, row.targets)
    sent, collectives, hops = exchanged(made, accumulation=row.accumulation)
    return joined_seconds(made, row.computing_s, LINKS[row.link].seconds(sent, collectives=collectives, hops=hops))


def speed_up(cards: int, strategy: Name, link: str, quantize: Literal["nf4", "none"]) -> float:
    """Mistral-7B: times one A100, from its measured 3,514 (nf4) or 3,632 tokens/s, 64 x 2,048 tokens a step."""
    if cards == 1:
        return 1.0
    one_s = 64 * 2048 / {"nf4": 3514.4, "none": 3632.4}[quantize]
    made = job(MISTRAL, quantize, cards, strategy)
    sent, collectives, hops = exchanged(made, accumulation=max(1, 64 // cards // 4))  # micro-batches of 4
    step_s = joined_seconds(made, one_s / cards, LINKS[link].seconds(sent, collectives=collectives, hops=hops))
    return one_s / step_s


def report() -> str:
    """Both tables in Markdown."""
    lines = [
        _HEAD,
        "| run | link | simulated s/step | measured | measured / simulated | source |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        expected = simulated(row)
        lines.append(f"| {row.what} | {row.link} | {expected:.2f} | {row.step_s:.2f} | {row.step_s / expected:.2f} "
                     f"| {row.source} |")  # fmt: skip
    ratios = sorted(row.step_s / simulated(row) for row in ROWS)
    lines.append(_BETWEEN.format(low=ratios[0], middle=ratios[len(ratios) // 2], high=ratios[-1], reached=REACHED))
    links = (("ddp", "nf4", "nvlink3"), ("ddp", "nf4", "10gbe"), ("ddp", "nf4", "1gbe"), ("fsdp2", "nf4", "nvlink3"),
             ("fsdp2", "nf4", "pcie4"), ("fsdp2", "nf4", "10gbe"), ("fsdp2", "none", "pcie4"),
             ("fsdp2", "none", "10gbe"))  # fmt: skip
    lines += ["| strategy | base | link | " + " | ".join(map(str, _COUNTS)) + " |", "|---" * (3 + len(_COUNTS)) + "|"]
    for strategy, quantize, link in links:
        found = [f"{speed_up(cards, strategy, link, quantize):.1f}" for cards in _COUNTS]  # type: ignore[arg-type]
        base = "bfloat16" if quantize == "none" else quantize
        lines.append(f"| {strategy} | {base} | {link} | {' | '.join(found)} |")
    return "\n".join([*lines, _ELSEWHERE])


_COUNTS = (1, 2, 4, 8, 16, 32, 64)
_HEAD = """\
# Steps on several cards, simulated from one card's measured speed

`python -m benchmarks.scaling_simulation --write`. Computing: published, from fewer cards or from `ddp` on the same
ones. Exchange: bytes counted by `lora_tune.model.scaling` over the link's rate. `*`: the link is not published. Two
RTX 3090 in an "older motherboard" are taken to have 4 lanes of PCIe 3, which is what fits: these rows test the form
and not the number. A5000s are taken to have 16 lanes of PCIe 4, A100s to be joined by NVLink (SXM).
"""
_BETWEEN = """
Measured over simulated: {low:.2f} to {high:.2f}, in the middle {middle:.2f}. Links count as {reached:.0%} of their
rate. Where it is well above 1 more cards also had smaller micro-batches (half of them on two A100s), whose kernels
are less busy: the simulation divides the computing evenly. It is a bound from below for the time, and nearest where
micro-batches stay large.

## How far it goes: Mistral-7B on A100s, 64 sequences of 2,048 tokens a step, times one card
"""
_ELSEWHERE = """
Published without the details that a simulation needs: LoRA on 128 single-A10G machines over up to 10 Gbit/s, 63 times
one card (49 %; E. Yu, "LoRA makes distributed fine-tuning far faster", 2023); Qwen-7B LoRA by DeepSpeed on 2 x 2
A100s, 2.2 times one card at 2,048 tokens (QwenLM/Qwen README: 5.2 s an iteration on one card, 9.25 s with 4, each
with the same batch; link not given).
"""


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        RESULT.write_text(report(), encoding="utf-8")
    else:
        sys.stdout.write(report())

"""The loss head before and after it formed its gradient in the forward pass, in turns, by seconds of processor time.

    python -m benchmarks.loss_head [--rounds 9] [--json FILE]

Before: the logits of the trained tokens, their float32 copy, cross-entropy, and its backward pass, all kept at once.
After: `lora_tune.model.kernels.loss_head`. Forward and backward of the head alone, on one thread; medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.machine import result_file
from lora_tune.model.kernels.loss_head import Head, summed

SHAPES = ((8_192, 512, 1_024), (128_256, 512, 512))  # vocabulary, hidden size, trained tokens


def before(hidden_BTH: torch.Tensor, head: Head, predicts_N: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """What a run did until now."""
    logits_NV = head.layer(hidden_BTH.flatten(0, 1)[predicts_N])
    return functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")


def seconds(loss_of: Callable[..., torch.Tensor], hidden: torch.Tensor, *rest: Any) -> float:
    """Processor time of one forward and backward pass."""
    leaf = hidden.detach().requires_grad_()
    began = time.process_time()
    (loss_of(leaf, *rest) / len(rest[1])).backward()
    return time.process_time() - began


def measure(rounds: int) -> list[dict[str, Any]]:
    """One row for each vocabulary and dtype."""
    rows = []
    for vocabulary, size, tokens in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            layer = nn.Linear(size, vocabulary, bias=False).requires_grad_(False).to(dtype)
            hidden = torch.randn(1, tokens + 1, size).to(dtype)
            rest = (Head(layer), torch.arange(tokens), torch.randint(0, vocabulary, (tokens,)))
            found: dict[str, list[float]] = {"before": [], "after": []}
            for _ in range(rounds + 1):
                found["before"].append(seconds(before, hidden, *rest))
                found["after"].append(seconds(summed, hidden, *rest))
            medians = {name: statistics.median(times[1:]) for name, times in found.items()}
            row = {"vocabulary": vocabulary, "hidden": size, "tokens": tokens, "dtype": str(dtype).split(".")[1]}
            rows.append(row | {f"{name}_cpu_s": round(value, 4) for name, value in medians.items()})
            rows[-1]["ratio"] = round(medians["before"] / medians["after"], 2)
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure, print, and keep where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=result_file)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.rounds)
    if arguments.json:
        facts = {"machine": platform.processor() or platform.machine(), "versions": {"torch": torch.__version__}}
        arguments.json.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

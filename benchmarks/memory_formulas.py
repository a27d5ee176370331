"""The memory plan beside published peaks of other tools on the same model, length and rank:

    python benchmarks/memory_formulas.py [--json]

None of the published numbers was measured with lora_tune. They differ by what the tools do (16-bit adapters, compiled
or fused layers, whole logits), which the last column names. The plan itself is printed for all layers checkpointed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

from lora_tune.model.memory import plan_memory
from lora_tune.recipe import Base, Lora, Train

LLAMA_2: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
GROUPED = {"intermediate_size": 14336, "num_key_value_heads": 8}
LLAMA_3 = LLAMA_2 | GROUPED | {"vocab_size": 128256}
MISTRAL = LLAMA_2 | GROUPED | {"model_type": "mistral"}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GB = 10**9 / 2**30  # GiB


@dataclass(frozen=True)
class Published:
    """A peak that another tool published."""

    name: str
    config: dict[str, Any]
    tokens: tuple[int, int]
    """Sequences of a micro-batch, and their length."""
    rank: int
    targets: Any
    quantize: Any
    peak_gib: float
    source: str
    differs: str


ROWS = (
    Published("Llama-3.1-8B QLoRA", LLAMA_3, (2, 2048), 8, "all-linear", "nf4", 7.4, "torchtune README, RTX 4090",
              "compiled; 16-bit adapters"),
    Published("Llama-3.1-8B LoRA", LLAMA_3, (2, 2048), 8, "all-linear", "none", 16.2, "torchtune README, RTX 4090",
              "compiled; 16-bit adapters"),
    Published("Mistral-7B QLoRA", MISTRAL, (4, 4096), 16, ATTENTION, "nf4", 16.4 * GB, "fms-acceleration, A100-80",
              "whole logits, no float32 upcasts"),
    Published("Mistral-7B QLoRA", MISTRAL, (4, 4096), 16, ATTENTION, "nf4", 14.1 * GB, "fms-acceleration, A100-80",
              "fused LoRA, RoPE, RMSNorm and cross-entropy"),
    Published("Mistral-7B QLoRA", MISTRAL, (8, 4096), 16, ATTENTION, "nf4", 23.9 * GB, "fms-acceleration, A100-80",
              "fused LoRA, RoPE, RMSNorm and cross-entropy"),
    Published("Llama-2-7B QLoRA", LLAMA_2, (4, 1024), 8, "all-linear", "nf4", 7.0 * GB,
              "LLaMA-Factory wiki (Unsloth), A100", "fused layers"),
)  # fmt: skip


def planned(row: Published) -> float:
    """Peak in GiB that our plan gives for this row."""
    sequences, length = row.tokens
    train = Train(batch_size=sequences, micro_batch_size=sequences, max_length=length, gradient_checkpointing="all")
    base, lora = Base(name="x", quantize=row.quantize), Lora(rank=row.rank, targets=row.targets)
    return plan_memory(row.config, base=base, lora=lora, train=train, budget_gib=1e6, device="cuda").peak_gib


def main() -> None:
    """Print the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    found = [
        {
            "job": row.name,
            "tokens": "{} x {}".format(*row.tokens),
            "published_gib": round(row.peak_gib, 1),
            "planned_gib": round(planned(row), 1),
            "source": row.source,
            "differs_by": row.differs,
        }
        for row in ROWS
    ]
    if as_json:
        print(json.dumps({"rows": found}))
        return
    for line in [{key: key for key in found[0]}, *found]:
        print("{job:20} {tokens:>9} {published_gib:>13} {planned_gib:>11}  {source:34} {differs_by}".format(**line))


if __name__ == "__main__":
    main()

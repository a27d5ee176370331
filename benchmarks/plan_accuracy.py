"""How right the plan is: weights, kept activations, and published peaks and speeds beside its answers.

    python -m benchmarks.plan_accuracy [--corpus FOLDER] [--write]

Weights: every config.json with an index of `FOLDER/data/configs`. Activations: saved-tensor hooks on small models of
eight families, in bfloat16 and nf4, checkpointed or not, on this CPU, with fused layers (`train.kernels: auto`).
Published numbers were measured by others with other code; the last column says how that differs. `--write` keeps it all
in benchmarks/results/plan_accuracy.md.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from benchmarks.model_configs import CONFIGS
from lora_tune.model.activations import kept_after_forward, saved_bytes_per_layer
from lora_tune.model.cards import find_card
from lora_tune.model.memory import MemoryPlan, plan_memory
from lora_tune.model.shape import read_shape
from lora_tune.recipe import Base, Lora, Train

RESULT = Path(__file__).resolve().parent / "results" / "plan_accuracy.md"
GB = 10**9 / 2**30  # GiB
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2", "mixtral")
LLAMA_8B, MISTRAL, LLAMA_3B = "meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.3", "meta-llama/Llama-3.2-3B"
TORCHTUNE, FMS, PEFT = "torchtune README", "fms-acceleration benchmarks", "peft MetaMathQA"


@dataclass(frozen=True)
class Published:
    """A peak, and a speed where there is one, that others measured."""

    source: str
    model: str
    card: str
    tokens: tuple[int, int]
    """Sequences of a micro-batch, and their length."""
    lora: Lora
    quantize: Literal["nf4", "none"]
    checkpointing: Literal["all", "none"]
    peak_gib: float
    tokens_per_s: float | None
    differs: str

    @property
    def kernels(self) -> Literal["auto", "off"]:
        """Their layers are fused, by hand or by a compiler, or they are PEFT's own."""
        return "off" if self.source == PEFT or "all logits" in self.differs else "auto"


def _row(
    where: tuple[str, str, str], job: tuple[int, int, int, Any], kind: tuple[Any, Any], found: tuple[Any, Any], why: str
) -> Published:
    """Source, model, card; sequences, length, rank, targets; base, checkpointing; GiB, tokens/s."""
    sequences, length, rank, targets = job
    return Published(*where, (sequences, length), Lora(rank=rank, targets=targets), *kind, *found, why)


ROWS = (
    _row((TORCHTUNE, LLAMA_8B, "rtx4090"), (2, 2048, 8, "all-linear"), ("nf4", "all"), (7.4, 2413),
         "compiled (its layers keep less); 16-bit adapters; torch's count without context"),
    _row((TORCHTUNE, LLAMA_8B, "rtx4090"), (2, 2048, 8, "all-linear"), ("none", "all"), (16.2, 3083),
         "compiled; 16-bit adapters; torch's count without context"),
    _row((TORCHTUNE, LLAMA_8B, "a6000"), (2, 2048, 8, "all-linear"), ("none", "none"), (30.3, 4699),
         "compiled: fused norms, rotation and SwiGLU keep less; by our count more FLOP than the card has"),
    _row((TORCHTUNE, LLAMA_3B, "a100-80"), (2, 4096, 8, "all-linear"), ("none", "all"), (8.5, 8210),
         "compiled; inputs of layers offloaded to the host, of which ours keep 1.3 GiB here; 8-bit AdamW"),
    _row((TORCHTUNE, LLAMA_3B, "a100-80"), (2, 4096, 8, "all-linear"), ("nf4", "all"), (4.6, 8035),
         "as the line above"),
    _row((FMS, MISTRAL, "a100-80"), (4, 4096, 16, ATTENTION), ("nf4", "all"), (20.7 * GB, 2904),
         "all logits, norms and residuals in float32; ours has a fused head and 16-bit residuals"),
    _row((FMS, MISTRAL, "a100-80"), (4, 4096, 16, ATTENTION), ("nf4", "all"), (16.4 * GB, 3596),
         "all logits (1 GiB in 16 bit, 2 in float32) instead of a fused head; one document a row, no mask"),
    _row((FMS, MISTRAL, "a100-80"), (4, 4096, 16, ATTENTION), ("nf4", "all"), (14.1 * GB, 4128),
         "fused LoRA, rotation, RMSNorm and cross-entropy: less is kept of the layer that is recomputed"),
    _row((FMS, MISTRAL, "a100-80"), (8, 4096, 16, ATTENTION), ("nf4", "all"), (23.9 * GB, 4213), "as the line above"),
    _row((FMS, MISTRAL, "a100-80"), (4, 4096, 16, ATTENTION), ("none", "all"), (26.7 * GB, 3324),
         "all logits instead of a fused head"),
    _row((FMS, LLAMA_8B, "a100-80"), (4, 4096, 16, ATTENTION), ("nf4", "all"), (14.4 * GB, 4009),
         "fused layers and Liger's loss head"),
    _row((PEFT, LLAMA_3B, "l40s"), (4, 768, 32, ("q_proj", "v_proj")), ("none", "none"), (20.8, None),
         "no autocast: float32 copies of what adapters read; all logits of 128k tokens, also in float32"),
)  # fmt: skip


def planned(row: Published) -> MemoryPlan:
    """What our plan gives for this row, at its micro-batch and checkpointing."""
    sequences, length = row.tokens
    train = Train(
        batch_size=sequences, micro_batch_size=sequences, max_length=length, gradient_checkpointing=row.checkpointing,
        optimizer="adamw", packing=row.source != FMS and row.source != PEFT, kernels=row.kernels,
    )  # fmt: skip
    card, base = find_card(row.card), Base(name="x", quantize=row.quantize)
    return plan_memory(
        CONFIGS[row.model], base=base, lora=row.lora, train=train, budget_gib=1e6, device="cuda", card=card
    )


def published() -> Iterator[list[str]]:
    """Rows of published peaks and speeds beside the plan's."""
    for row in ROWS:
        plan = planned(row)
        speed = "–" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}"
        job = f"{row.model.partition('/')[2]} {row.quantize if row.quantize == 'nf4' else 'bf16'}, r{row.lora.rank}"
        yield [row.source, f"{job}, {row.tokens[0]} x {row.tokens[1]}, {row.checkpointing} recomputed", row.card,
               f"{row.peak_gib:.1f}", f"{plan.peak_gib:.1f} ± {plan.uncertainty_gib:.1f}", speed,
               f"{plan.tokens_per_s or 0:,.0f}", row.differs]  # fmt: skip


def weights(corpus: Path) -> Iterator[list[str]]:
    """Parameters and bytes of real configurations beside what was counted of them and what their index says."""
    facts = json.loads((corpus / "data" / "VERIFIED.json").read_text())["configs"]
    for name, found in sorted(facts.items()):
        folder = corpus / "data" / name
        config = json.loads((folder / "config.json").read_text())
        shape = read_shape(config)
        real = found.get("params_tied")
        counted = "–" if real is None else f"{100 * (shape.parameters / real - 1):+.3f} %"
        index = folder / "model.safetensors.index.json"
        held = "–"
        if index.exists():
            base = Base(name="x", quantize="int8" if found.get("quant") else "none")
            plan = plan_memory(config, base=base, lora=Lora(), train=Train(), budget_gib=1e6, device="cuda")
            stored = json.loads(index.read_text())["metadata"]["total_size"]
            held = f"{100 * (plan.parts_gib['weights'] * 2**30 / stored - 1):+.2f} %"
        yield [folder.name, f"{shape.parameters / 1e9:.3f} B", counted, held]


def activations() -> Iterator[list[str]]:
    """Bytes that autograd keeps beside the formula, family by family."""
    from benchmarks.saved_activations import EQUAL_HEADS, SIZES, saved_bytes, tiny_config

    kinds: tuple[Literal["none", "nf4"], ...] = ("none", "nf4")
    for family in FAMILIES:
        config = tiny_config(family, EQUAL_HEADS[6] if family == "gpt2" else SIZES[6], layers=6)
        shape, lora, cells = read_shape(config), Lora(rank=4), []
        one_set = saved_bytes_per_layer(shape, tokens=200, element=2, lora=lora)
        for quantize in kinds:
            for count in (0, 6):
                real = saved_bytes(config, dtype="bfloat16", lora=lora, documents=[200], quantize=quantize,
                                   checkpointed="all" if count else "none")  # fmt: skip
                ours = kept_after_forward(shape, one_set=one_set, tokens=200, element=2, checkpointed=count)
                cells.append(f"{100 * (ours / real - 1):+.2f} %")
        yield [family, *cells]


def _table(columns: list[str], rows: Iterator[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report(corpus: Path | None) -> str:
    """All tables in Markdown, with the machine and the versions."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    text = f"# How right the plan is\n\n`python -m benchmarks.plan_accuracy` on {platform.machine()}, {libraries}.\n"
    text += "\n## Published peaks (GiB) and speeds (tokens/s)\n\nNone was measured with lora_tune.\n\n"
    text += "`train.kernels` is off where their layers are PEFT's own (all logits), else auto.\n\n"
    names = ["source", "job", "card", "peak", "planned", "speed", "planned", "how theirs differs"]
    text += _table(names, published())
    text += "\n## Kept activations against saved-tensor hooks\n\n"
    text += _table(["family", "bf16", "bf16, recomputed", "nf4", "nf4, recomputed"], activations())
    if corpus is not None:
        text += "\n## Parameters and weights of real configurations\n\n"
        text += _table(["configuration", "parameters", "against the model built", "against the index"], weights(corpus))
    return text


def main() -> None:
    """Print the report, or keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    text = report(given.corpus)
    if given.write:
        RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

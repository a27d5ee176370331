"""The card of a merged model: what it is made of, and how far its answers are from the adapter's."""

from __future__ import annotations

from typing import Any


def merge_card(facts: dict[str, Any]) -> str:
    """The merged model's card: what it is made of, and how far its answers are from the adapter's."""
    base = facts["base"]
    hub = f"base_model: {base['name']}\nbase_model_relation: merge\n" if base["kind"] == "hub" else ""
    lines = [
        f"| {name} | {one['kl']:.2e} | {one['worst_kl']:.2e} | {one['top1']:.2%} | {loss_text(one['loss'])} |"
        for name, one in merge_table(facts)
    ]
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{hub}---\n\n# {facts['adapter']}, merged\n\n"
        f"The adapter `{facts['adapter']}` (sha256 `{facts['adapter_sha256'][:16]}…`) folded into the "
        f"{facts['chosen']} weights of `{base['name']}`, in {facts['dtype']}. Measured against the adapter "
        "as it was trained, before the folder was written:\n\n"
        "| merged into | KL (nats) | worst KL | same most likely token | loss on answers |\n|---|---|---|---|---|\n"
        + "\n".join(lines)
        + f"\n\nLoss of the adapter as trained: {loss_text(facts['loss_as_trained'])}. Again: `lora-tune merge`.\n"
    )


def merge_table(facts: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, measurements) of every way to hold the merged model."""
    found = [
        (f"{name}{' (this folder)' if name == facts['chosen'] else ''}", one)
        for name, one in facts["candidates"].items()
    ]
    again = facts.get("requantized")
    return [*found, *([(f"{facts['chosen']}, re-quantized to {facts['base']['quantize']}", again)] if again else [])]


def loss_text(value: float | None) -> str:
    """A loss for people."""
    return "not measured" if value is None else f"{value:.4f}"

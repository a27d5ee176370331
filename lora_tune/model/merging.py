"""Folding an adapter into its base, and how far two models' answers are apart."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import torch

from lora_tune.errors import CheckFailed, Problem
from lora_tune.model.methods import SavedAdapter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


Combination = Literal["linear", "svd", "ties", "dare_linear", "dare_ties"]
_PEFT_NAMES: dict[str, str] = {
    "linear": "cat", "svd": "svd", "ties": "ties", "dare_linear": "dare_linear", "dare_ties": "dare_ties",
}  # fmt: skip
_CHUNK = 64  # positions that are compared in float64 at a time


@dataclass(frozen=True, slots=True)
class Divergence:
    """Two models over the same positions."""

    kl: float
    """Mean Kullback-Leibler divergence KL(reference ‖ other) over the positions, in nats."""
    worst_kl: float
    """The largest one."""
    top1: float
    """Share of positions at which both find the same token most likely."""
    positions: int


def merge_into(model: PeftModel) -> PreTrainedModel:
    """Fold the active adapter into its base and take PEFT's layers away; the base is changed in place.

    Raises: CheckFailed where a merged weight is not finite, or the base is quantized: its rounding would be merged.
    """
    base = cast("PreTrainedModel", model.get_base_model())
    if "quantization_config" in base.config.to_dict():
        raise CheckFailed(Problem("a quantized base cannot take the adapter in", "load it with quantize: none"))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise CheckFailed(Problem(f"the adapter cannot be merged: {error}", "verify the adapter")) from None
    return merged


@torch.no_grad()
def combine(
    model: PeftModel, weights: Mapping[str, float], *, method: Combination, density: float, seed: int
) -> SavedAdapter:
    """One adapter out of several that are on the same base, {name: weight}, by PEFT's `add_weighted_adapter`.

    `linear` is the exact sum of the weighted updates (ranks add up); `svd` its best approximation at the largest rank;
    `ties` (arXiv:2306.01708) keeps the share `density` of each adapter's numbers and those that agree in sign;
    `dare_linear`, `dare_ties` (arXiv:2311.03099) drop numbers at random, by the seed, and scale up the others.

    Raises: CheckFailed where the adapters cannot be combined.
    """
    from peft import get_peft_model_state_dict

    kept = None if method in ("linear", "svd") else density
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.add_weighted_adapter(
                list(weights), list(weights.values()), "combined", combination_type=_PEFT_NAMES[method], density=kept
            )
    except ValueError as error:
        raise CheckFailed(Problem(f"the adapters cannot be combined: {error}", "merge them one by one")) from None
    tensors = get_peft_model_state_dict(model, adapter_name="combined", save_embedding_layers=False)
    config = {**model.peft_config["combined"].to_dict(), "task_type": "CAUSAL_LM", "peft_type": "LORA"}
    config["target_modules"] = sorted(config["target_modules"])
    return SavedAdapter(config, {key: tensor.clone() for key, tensor in tensors.items()})


@torch.no_grad()
def position_log_probs(model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-probabilities (positions, V), float32 on the CPU, after every id of every prompt; one prompt at a time."""
    rows = []
    for ids in prompts:
        row = torch.tensor([list(ids)], device=torch.device(model.device))
        logits = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0]
        rows.append(logits.float().log_softmax(dim=-1).cpu())
    return torch.cat(rows)


def _kl(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (reference.exp() * (reference - other)).sum(dim=-1).clamp_min(0.0)


def divergence(reference: torch.Tensor, other: torch.Tensor) -> Divergence:
    """How far `other` is from `reference`, both log-probabilities (positions, V)."""
    pairs = zip(reference.split(_CHUNK), other.split(_CHUNK), strict=True)
    kl = torch.cat([_kl(first.double(), second.double()) for first, second in pairs])
    same = reference.argmax(dim=-1) == other.argmax(dim=-1)
    return Divergence(float(kl.mean()), float(kl.max()), float(same.float().mean()), len(kl))

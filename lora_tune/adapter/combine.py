"""Several adapters of one base as one: same base, same words, brought to one rank, then combined by PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_tune.adapter.canonical import canonical
from lora_tune.adapter.folder import read_manifest
from lora_tune.adapter.load import attach_saved, read_adapter
from lora_tune.adapter.lora_config import read_settings
from lora_tune.errors import CheckFailed, Problem, UsageError
from lora_tune.model.merging import Combination, combine
from lora_tune.model.methods import SavedAdapter
from lora_tune.model.source import BaseSource
from lora_tune.model.streaming import hollow, sketch


def combined(
    folders: Sequence[Path],
    source: BaseSource,
    *,
    weights: Sequence[float],
    method: Combination,
    density: float,
    seed: int,
) -> SavedAdapter:
    """The weighted combination of verified adapter folders, without a weight of their base being read.

    Raises:
        CheckFailed: other bases, templates or parts (DoRA, modules trained in full) than plain LoRA.
        UsageError: not one weight for each adapter.
    """
    if len(weights) != len(folders):
        raise UsageError(f"{len(folders)} adapters need {len(folders)} weights, got {len(weights)}", "such as 0.5,0.5")
    _refuse_strangers(folders)
    saved = [read_adapter(folder) for folder in folders]
    settings = [read_settings(one.config) for one in saved]
    rank = max(max(one.rank, *one.rank_pattern.values(), 1) for one in settings)
    model = hollow(sketch(source))
    names = {f"adapter_{number}": weight for number, weight in enumerate(weights)}
    for name, one in zip(names, saved, strict=True):
        model = attach_saved(model, canonical(one, least_rank=rank).adapter, name=name)  # type: ignore[assignment]
    return combine(model, names, method=method, density=density, seed=seed)  # type: ignore[arg-type]  # wrapped above


def _refuse_strangers(folders: Sequence[Path]) -> None:
    first = read_manifest(folders[0])
    for folder in folders[1:]:
        manifest = read_manifest(folder)
        fields = ("fingerprint", "quantize", "double_quant", "compute_dtype")
        for field in fields:
            if getattr(manifest.base, field) != getattr(first.base, field):
                reason = f"was trained on a base with another {field} than {folders[0]}"
                raise CheckFailed(Problem(reason, "combine adapters of one base, held alike", str(folder)))
        if manifest.chat.template_sha256 != first.chat.template_sha256:
            reason = f"was trained with another chat template than {folders[0]}"
            raise CheckFailed(Problem(reason, "combine adapters of one template", str(folder)))

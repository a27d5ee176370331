"""The same adapter in the one form that every engine reads alike: one rank, one scale of 1, no patterns.

Engines disagree on the scale: alpha / r for all, alpha / sqrt(r) for rsLoRA, another alpha or rank for some modules.
Here each module's own scale goes into its B, and A and B are padded with zeros to the largest rank R; then r = alpha =
R, and the scale is 1 everywhere. The product scale · B·A stays what it was, exactly but for one rounding of B.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lora_tune.adapter.lora_config import LoraSettings, read_settings
from lora_tune.errors import CheckFailed, Problem
from lora_tune.model.methods import SavedAdapter

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16"]
_A = re.compile(r"(?P<key>base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_)(?:A\.weight|embedding_A)")
_DROPPED = ("rank_pattern", "alpha_pattern", "use_rslora")


@dataclass(frozen=True, slots=True)
class Canonical:
    """An adapter in canonical form, and how far it is from the one it was made of.

    `error` is the largest change of a module's update, ‖new − old‖ / ‖old‖ (Frobenius), from rounding to the dtype.
    """

    adapter: SavedAdapter
    rank: int
    error: float


def canonical(saved: SavedAdapter, *, dtype: Dtype = "float32", least_rank: int = 1) -> Canonical:
    """Fold the scales into B and pad to one rank, at least `least_rank`; tensors come out in `dtype`.

    Raises: CheckFailed for DoRA, modules trained in full and trained tokens, which have no such form.
    """
    import torch

    settings = read_settings(saved.config)
    _refuse(settings)
    modules = {match["module"]: match for key in saved.tensors if (match := _A.fullmatch(key))}
    rank = max(least_rank, *(settings.rank_of(module) for module in modules))
    tensors: dict[str, torch.Tensor] = {}
    worst = 0.0
    for module, match in modules.items():
        key_a, key_b = match[0], _b_key(match[0])
        a_RI, b_OR = saved.tensors[key_a], saved.tensors[key_b]
        scaled_OR = b_OR.double() * settings.scale_of(module)
        new_a = _padded(a_RI, rank, dimension=0).to(getattr(torch, dtype))
        new_b = _padded(scaled_OR, rank, dimension=1).to(getattr(torch, dtype))
        worst = max(worst, _change(a_RI.double(), scaled_OR, new_a.double(), new_b.double()))
        tensors |= {key_a: new_a.contiguous(), key_b: new_b.contiguous()}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise CheckFailed(f"its update does not fit into {dtype}", "export it with --dtype float32 or bfloat16")
    return Canonical(SavedAdapter(_config(saved.config, rank, modules), tensors), rank, worst)


def _refuse(settings: LoraSettings) -> None:
    for has, what in (
        (settings.dora, "DoRA's magnitudes"),
        (settings.modules_to_save, "modules trained in full"),
        (settings.trained_tokens, "trained token embeddings"),
    ):
        if has:
            raise CheckFailed(Problem(f"not supported: {what} are no B·A", "merge it: lora-tune merge"))


def _b_key(a_key: str) -> str:
    return a_key.removesuffix("A") + "B" if a_key.endswith("embedding_A") else a_key.replace(".lora_A.", ".lora_B.")


def _padded(matrix: torch.Tensor, rank: int, *, dimension: int) -> torch.Tensor:
    """The matrix with zeros added up to `rank` along one dimension."""
    import torch

    shape = list(matrix.shape)
    shape[dimension] = rank - shape[dimension]
    return torch.cat([matrix, matrix.new_zeros(shape)], dim=dimension)


def _change(a_RI: torch.Tensor, b_OR: torch.Tensor, a_new: torch.Tensor, b_new: torch.Tensor) -> float:
    """‖B′A′ − BA‖ / ‖BA‖ from the small matrices of both, stacked: the difference is [B′ −B] · [A′; A]."""
    import torch

    before = _product_norm(b_OR, a_RI)
    difference = _product_norm(torch.cat([b_new, -b_OR], dim=1), torch.cat([a_new, a_RI], dim=0))
    return difference / before if before > 0 else difference


def _product_norm(b_OR: torch.Tensor, a_RI: torch.Tensor) -> float:
    """‖BA‖ by triangular factors, rank × rank each, without the loss of digits of Gram matrices."""
    import torch

    return float(torch.linalg.norm(torch.linalg.qr(b_OR).R @ torch.linalg.qr(a_RI.T).R.T))


def _config(config: dict[str, Any], rank: int, modules: dict[str, Any]) -> dict[str, Any]:
    """The configuration with one rank and a scale of 1; targets as a list of names."""
    kept = {name: value for name, value in config.items() if name not in _DROPPED}
    targets = config["target_modules"]
    names = sorted({module.rpartition(".")[2] for module in modules}) if isinstance(targets, str) else targets
    return {
        **kept,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": names,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }

"""Initial values of an adapter computed from the base's full-precision weights or from its activations.

The base itself is never changed. Where a method moves part of the weight into the adapter (PiSSA, OLoRA), the same part
is subtracted again by frozen rows beside the trained ones (`AnchoredLinear`), so that training starts from the base as
it is and the difference is an ordinary LoRA of twice the rank. Letters: W (out, in), A (rank, in), B (out, rank).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from lora_tune.errors import UsageError
from lora_tune.model.source import BaseSource
from lora_tune.model.weights import TensorInfo, tensor_infos

_EXACT_SVD = 1024  # up to this smaller side the SVD is exact; above, randomised and hundreds of times quicker
_OVERSAMPLE, _POWER_STEPS = 16, 8
_TOKENS_PER_BATCH = 512  # rows of a batch that enter the SVD of the layer inputs
_SAME_WEIGHT = 0.5  # relative distance above which a stored weight is not the one that was quantized (nf4: 0.1)


def _svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `rank` largest singular triplets U (m, rank), S (rank,), Vh (rank, n); randomised for large matrices."""
    if min(matrix.shape) <= _EXACT_SVD:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    width = min(rank + _OVERSAMPLE, *matrix.shape)
    left, values, right = torch.svd_lowrank(matrix, q=width, niter=_POWER_STEPS)
    return left[:, :rank], values[:rank], right.T[:rank]


def pissa_factors(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B such that scale·B·A is the best rank-r approximation of W (PiSSA, arXiv 2404.02948, section 3)."""
    left, values, right = _svd(weight, rank)
    root = (values / scale).sqrt()
    return root[:, None] * right, left * root


def olora_factors(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The first r columns of Q and rows of R of W = Q·R, whatever the scale (OLoRA, arXiv 2406.01775, section 3)."""
    basis, triangle = torch.linalg.qr(weight)
    return triangle[:rank], basis[:, :rank]


def loftq_factors(residual: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B such that scale·B·A is the best rank-r approximation of W - dequantize(quantize(W)).

    LoftQ with one alternating step (arXiv 2310.08659, algorithm 1, T = 1), whose quantized base is the ordinary one.
    """
    return pissa_factors(residual, rank, scale)


class StoredWeights:
    """Full-precision weights of a base, read one tensor at a time from its safetensors files."""

    def __init__(self, source: BaseSource) -> None:
        self._name = source.name
        self._infos: Mapping[str, TensorInfo] = tensor_infos(source.folder)

    def read(self, module_name: str, *, like: torch.Tensor) -> torch.Tensor:
        """W of a module as float32 (out, in) on the device of `like`, the dequantized weight it must resemble.

        Raises:
            UsageError: the checkpoint has no tensor of that name and content (fused or renamed at load).
        """
        from safetensors import safe_open

        key = self._key(module_name)
        if key is not None:
            with safe_open(self._infos[key].file, framework="pt") as file:
                weight = file.get_tensor(key).to(like.device, torch.float32)
            for candidate in (weight, weight.T):
                if candidate.shape == like.shape and (candidate - like).norm() <= _SAME_WEIGHT * like.norm():
                    return candidate
        raise UsageError(
            f"base {self._name!r}: the full-precision weight of {module_name} is not in its files under a known name",
            "set lora.method: lora",
        )

    def _key(self, module_name: str) -> str | None:
        wanted = module_name + ".weight"
        if wanted in self._infos:
            return wanted
        ends = [key for key in self._infos if wanted.endswith("." + key) or key.endswith("." + wanted)]
        return ends[0] if len(ends) == 1 else None


class AnchoredLinear(nn.Module):
    """Half of a LoRA pair whose first part is trained and whose second part, the anchor, stays as it was at the start.

    With A = [A_t; A_0] and B = [B_t, -B_0] the update is B_t·A_t - B_0·A_0: zero at the start, where both are equal.
    `dim` is the axis of the rank in the weight (0 for A, 1 for B). State dictionaries hold the whole weight under the
    name `weight`, so that saving and loading see an ordinary linear layer of twice the rank; optimizers see the trained
    part alone.
    """

    anchor: torch.Tensor

    def __init__(self, start: torch.Tensor, *, dim: Literal[0, 1]) -> None:
        super().__init__()
        rounded = start.to(torch.bfloat16).to(torch.float32)  # equal in both parts whatever dtype either is cast to
        self.dim = dim
        self.trained = nn.Parameter(rounded.clone())
        self.register_buffer("anchor", -rounded if dim == 1 else rounded.clone(), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The whole weight: (2·rank, in) for A, (out, 2·rank) for B, in the dtype of the trained part."""
        return torch.cat([self.trained, self.anchor.to(self.trained.dtype)], dim=self.dim)

    @property
    def bias(self) -> None:
        """LoRA pairs have no bias here."""
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x·weightᵀ."""
        return nn.functional.linear(x, self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight = self.weight
        destination[prefix + "weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and 2 * self.trained.shape[self.dim] == weight.shape[self.dim]:
            trained, anchor = weight.chunk(2, dim=self.dim)
            with torch.no_grad():
                self.trained.copy_(trained)
                self.anchor.copy_(anchor)
        else:
            missing_keys = args[2]
            missing_keys.append(prefix + "weight")


@torch.no_grad()
def compact(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Another A and B of the same shapes and product B·A, balanced, with the components in falling order.

    The parts of an anchored pair are nearly equal, so their difference would drown in the rounding of 16-bit servers;
    after this the factors are as small as the update itself. Computed in float64.
    """
    left, left_triangle = torch.linalg.qr(b.double())
    right, right_triangle = torch.linalg.qr(a.double().T)
    u, values, vh = torch.linalg.svd(left_triangle @ right_triangle.T, full_matrices=False)
    root = values.sqrt()
    new_a, new_b = torch.zeros_like(a, dtype=torch.float64), torch.zeros_like(b, dtype=torch.float64)
    new_a[: root.numel()] = root[:, None] * (right @ vh.T).T
    new_b[:, : root.numel()] = (left @ u) * root
    return new_a.to(a.dtype), new_b.to(b.dtype)


class _InputDirections:
    """The leading right singular vectors of everything that went into one layer, batch after batch."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.sketch = torch.empty(0)  # (k, in): singular values times right singular vectors

    def add(self, rows: torch.Tensor) -> None:
        stacked = torch.cat([self.sketch.to(rows.device), rows]) if len(self.sketch) else rows
        values, vectors = torch.linalg.eigh(stacked @ stacked.T)  # of the small side: rows, not features
        keep = torch.arange(len(values) - 1, -1, -1, device=values.device)[: self.rank]
        keep = keep[values[keep] > values[-1].clamp_min(0) * 1e-6]
        self.sketch = vectors[:, keep].T @ stacked

    def directions(self) -> torch.Tensor:
        """(k, in) orthonormal rows, k at most the rank."""
        if self.sketch is None:
            raise ValueError("no inputs were seen yet")
        return nn.functional.normalize(self.sketch, dim=1)


@torch.no_grad()
def input_directions(
    model: nn.Module, layers: Mapping[str, int], batches: Iterable[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """For each layer the leading right singular vectors of its inputs over the batches: {name: (k <= rank, in)}.

    `layers` gives the rank for each module name. Padding (attention_mask 0) does not count; of each batch at most 512
    tokens enter, evenly spread. Layers fed by the same tensor share one SVD. After EVA (arXiv 2410.07170), without
    its redistribution of ranks.
    """
    found: dict[str, _InputDirections] = {}
    shared: dict[str, str] = {}
    seen: list[tuple[torch.Tensor, str]] = []
    chosen: list[torch.Tensor] = []

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            leader = next((other for tensor, other in seen if tensor is inputs[0]), None)
            if leader is not None and layers[leader] == layers[name]:
                shared[name] = leader
                return
            seen.append((inputs[0], name))
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])[chosen[0]].to(torch.float32)
            found.setdefault(name, _InputDirections(layers[name])).add(rows)

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook_of(name)) for name in layers]
    device = next(model.parameters()).device
    try:
        for batch in batches:
            inputs = {key: value.to(device) for key, value in batch.items() if key in _FORWARD_KEYS}
            seen.clear()
            chosen[:] = [_rows_of(inputs)]
            model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found[shared.get(name, name)].directions() for name in layers if shared.get(name, name) in found}


_FORWARD_KEYS = ("input_ids", "attention_mask", "position_ids")


def _rows_of(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Indices into the flattened tokens: those that are no padding, at most 512, evenly spread."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        mask = torch.ones_like(inputs["input_ids"])
    rows = mask.reshape(-1).nonzero()[:, 0]
    step = max(1, -(-len(rows) // _TOKENS_PER_BATCH))
    return rows[::step]

"""Rotary position embedding as one autograd function that saves nothing of its input, and where a model applies it.

The backward pass rotates by the negative angle. Each pass works in place on one copy: the tensor that it was given may
have other readers.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_tune.model.kernels.choice import rope

APPLIED_AS = "apply_rotary_pos_emb"  # the function of each model's file by which its attention rotates q and k
Rotation = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Rotate(torch.autograd.Function):
    """`Rotate.apply(x, cos, sin)`: x · cos + rotate_half(x) · sin for x (batch, heads, tokens, head size).

    `cos` and `sin` are (1 or batch, tokens, R); what lies beyond R stays as it is.
    """

    @staticmethod
    def forward(ctx: Any, x_BNTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The rotated heads, laid out in memory as x is."""
        ctx.save_for_backward(cos, sin)
        rotated = x_BNTD.clone()
        rope(rotated, cos, sin)
        return rotated

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """The gradient, rotated back."""
        cos, sin = ctx.saved_tensors
        back = gradient.clone()
        rope(back, cos, sin, direction="backward")
        return back, None, None


@dataclass(frozen=True, slots=True)
class _Known:
    """A function found to rotate halves against each other; `partial`: also where R is less than the head size."""

    own: Rotation
    partial: bool

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotated queries and keys; of what is not known to be the same, as the model's own function gives them."""
        known = unsqueeze_dim == 1 and q.dtype == k.dtype == cos.dtype and cos.dim() == 3 and cos.shape[-1] % 2 == 0
        if not known or not torch.is_grad_enabled() or (cos.shape[-1] != q.shape[-1] and not self.partial):
            return self.own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return Rotate.apply(q, cos, sin), Rotate.apply(k, cos, sin)


def rotating(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """The modules that rotate queries and keys, each with its own forward pass in which `Rotate` does it.

    A module is found by the function that its forward pass calls, which is compared with `Rotate` by its numbers.
    """
    made: dict[Any, Any] = {}
    for module in model.modules():
        forward = type(module).forward
        if APPLIED_AS not in getattr(getattr(forward, "__code__", None), "co_names", ()) or "forward" in vars(module):
            continue
        if forward not in made:
            made[forward] = _with(forward)
        if made[forward] is not None:
            yield module, types.MethodType(made[forward], module)


def _with(forward: Any) -> Any:
    """The same function over globals in which the rotation is ours; None where it rotates in another way."""
    own = forward.__globals__.get(APPLIED_AS)
    if own is None or not _rotates_halves(own, size=8, part=8):
        return None
    known = _Known(own, partial=_rotates_halves(own, size=8, part=4))
    copy = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, APPLIED_AS: known},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


@torch.no_grad()
def _rotates_halves(own: Rotation, *, size: int, part: int) -> bool:
    """Whether the function gives what `rope` does, for heads of this size of which `part` is rotated."""
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 3, size, generator=draw) for heads in (4, 2))
    cos, sin = (torch.randn(1, 3, part, generator=draw) for _ in range(2))
    try:
        found = own(q, k, cos, sin)
    except (TypeError, RuntimeError, ValueError):
        return False
    for before, after in zip((q, k), found, strict=True):
        rope(before, cos, sin)
        if before.shape != after.shape or not torch.allclose(before, after, rtol=1e-5, atol=1e-6):
            return False
    return True

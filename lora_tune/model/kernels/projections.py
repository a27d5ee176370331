"""Several LoRA projections of one input as one autograd function, and a gated MLP with SwiGLU as another.

With X (T tokens, h), a frozen W (out, h), A (r, h), B (out, r) and s = alpha/r a projection is Y = X Wᵀ + s (X Aᵀ) Bᵀ.
Its backward pass, for dY: dB = s dYᵀ (X Aᵀ), dA = s (dY B)ᵀ X, dX = dY W + s (dY B) A. Saved are X, once for all
projections that read it, and X Aᵀ (T, r); a quantized W is dequantized in the forward and again in the backward pass
and never kept. Nothing is computed for parts whose gradient nobody needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

Weight = Callable[[torch.dtype], torch.Tensor]  # dtype -> the frozen matrix (out, in) in it


@dataclass(frozen=True, slots=True)
class Frozen:
    """The frozen part of an adapted layer: how its matrix is read, its bias (out) or None, the scale of its update."""

    weight: Weight
    bias: torch.Tensor | None
    scale: float


class Projections(torch.autograd.Function):
    """`Projections.apply(x, frozen, dtype, A1, B1, A2, B2, …)`: one output (…, out_i) for each of `frozen`.

    x has the shape (…, h). Products are computed in `dtype`; gradients of A and B come in their own dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, frozen: Sequence[Frozen], dtype: torch.dtype, *factors: torch.Tensor) -> Any:
        """The outputs, in `dtype`."""
        with torch.autocast(x.device.type, enabled=False):
            x_TH = x.reshape(-1, x.shape[-1]).to(dtype)
            inner_TR = x_TH @ _stacked(factors[0::2], dtype).T
            parts = inner_TR.split([a.shape[0] for a in factors[0::2]], dim=1)
            outputs = []
            for part, inner, b in zip(frozen, parts, factors[1::2], strict=True):
                y_TO = _plus(part, x_TH, inner, b.to(dtype))
                outputs.append(y_TO.view(*x.shape[:-1], y_TO.shape[-1]))
        ctx.save_for_backward(x_TH, inner_TR, *factors)
        ctx.frozen, ctx.shape, ctx.x_dtype = frozen, x.shape, x.dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        """Gradients of x and of the factors."""
        x_TH, inner_TR, *factors = ctx.saved_tensors
        dx_TH, d_factors = _backward(x_TH, inner_TR, factors, ctx.frozen, gradients, needs=ctx.needs_input_grad)
        dx = None if dx_TH is None else dx_TH.view(ctx.shape).to(ctx.x_dtype)
        return (dx, None, None, *d_factors)


class GatedMlp(torch.autograd.Function):
    """`GatedMlp.apply(x, (gate, up, down), dtype, Ag, Bg, Au, Bu, Ad, Bd)`: down(silu(gate(x)) · up(x)).

    x has the shape (…, h), so has the output. Saved are x, gate(x) and up(x); silu and the product (T, I) are computed
    again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, frozen: Sequence[Frozen], dtype: torch.dtype, *factors: torch.Tensor) -> Any:
        """The output, in `dtype`."""
        with torch.autocast(x.device.type, enabled=False):
            x_TH = x.reshape(-1, x.shape[-1]).to(dtype)
            inner_TR = x_TH @ _stacked(factors[0:4:2], dtype).T
            parts = inner_TR.split([a.shape[0] for a in factors[0:4:2]], dim=1)
            gate_TI, up_TI = (
                _plus(part, x_TH, inner, b.to(dtype))
                for part, inner, b in zip(frozen[:2], parts, factors[1:4:2], strict=True)
            )
            h_TI = functional.silu(gate_TI).mul_(up_TI)
            inner_down_TR = h_TI @ factors[4].to(dtype).T
            y_TH = _plus(frozen[2], h_TI, inner_down_TR, factors[5].to(dtype))
        ctx.save_for_backward(x_TH, inner_TR, gate_TI, up_TI, inner_down_TR, *factors)
        ctx.frozen, ctx.shape, ctx.x_dtype = frozen, x.shape, x.dtype
        return y_TH.view(*x.shape[:-1], y_TH.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Gradients of x and of the six factors."""
        x_TH, inner_TR, gate_TI, up_TI, inner_down_TR, *factors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        silu_TI = functional.silu(gate_TI)
        h_TI = silu_TI * up_TI
        dh_TI, d_down = _backward(
            h_TI, inner_down_TR, factors[4:], ctx.frozen[2:], (gradient,), needs=(True, False, False, *needs[7:])
        )
        del h_TI
        if dh_TI is None:
            raise RuntimeError("the gradient of the product was asked for")
        d_up_TI = silu_TI.mul_(dh_TI)
        d_gate_TI = torch.ops.aten.silu_backward(dh_TI.mul_(up_TI), gate_TI)
        dx_TH, d_first = _backward(
            x_TH, inner_TR, factors[:4], ctx.frozen[:2], (d_gate_TI, d_up_TI), needs=(*needs[:3], *needs[3:7])
        )
        dx = None if dx_TH is None else dx_TH.view(ctx.shape).to(ctx.x_dtype)
        return (dx, None, None, *d_first, *d_down)


def _stacked(matrices: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """All A below each other, (sum of ranks, h): one product with the input instead of one each."""
    return matrices[0].to(dtype) if len(matrices) == 1 else torch.cat([matrix.to(dtype) for matrix in matrices])


def _plus(part: Frozen, x_TH: torch.Tensor, inner_TR: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """X Wᵀ + bias + s (X Aᵀ) Bᵀ, the update added in place."""
    y_TO = functional.linear(x_TH, part.weight(x_TH.dtype), None if part.bias is None else part.bias.to(x_TH.dtype))
    return y_TO.addmm_(inner_TR, b.T, alpha=part.scale)


def _backward(
    x_TH: torch.Tensor,
    inner_TR: torch.Tensor,
    factors: Sequence[torch.Tensor],
    frozen: Sequence[Frozen],
    gradients: Sequence[torch.Tensor | None],
    *,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """dX (T, h) or None, and dA, dB of every projection; `needs` as autograd's: x, two others, then the factors."""
    dtype, ranks = x_TH.dtype, [a.shape[0] for a in factors[0::2]]
    d_inner_TR = torch.zeros_like(inner_TR) if any(found is None for found in gradients) else torch.empty_like(inner_TR)
    d_factors: list[torch.Tensor | None] = [None] * len(factors)
    dx_TH: torch.Tensor | None = None
    parts, d_parts = inner_TR.split(ranks, dim=1), d_inner_TR.split(ranks, dim=1)
    for number, (part, gradient) in enumerate(zip(frozen, gradients, strict=True)):
        if gradient is None:
            continue
        dy_TO = gradient.reshape(-1, gradient.shape[-1]).to(dtype)
        b = factors[2 * number + 1]
        torch.mul(dy_TO @ b.to(dtype), part.scale, out=d_parts[number])
        if needs[3 + 2 * number + 1]:
            d_factors[2 * number + 1] = (dy_TO.T @ parts[number]).to(b.dtype).mul_(part.scale)
        if needs[0]:
            weight = part.weight(dtype)
            dx_TH = dy_TO @ weight if dx_TH is None else dx_TH.addmm_(dy_TO, weight)
            del weight
    if any(needs[3::2]):
        d_a = (d_inner_TR.T @ x_TH).split(ranks)
        for number, found in enumerate(d_a):
            if needs[3 + 2 * number]:
                d_factors[2 * number] = found.to(factors[2 * number].dtype)
    if dx_TH is not None:
        dx_TH.addmm_(d_inner_TR, _stacked(factors[0::2], dtype))
    return dx_TH, d_factors

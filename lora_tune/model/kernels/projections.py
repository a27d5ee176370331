"""Several LoRA projections of one input as one autograd function, and a gated MLP (SwiGLU, GeGLU) as another.

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

from lora_tune.model.kernels.choice import Activation, gated, gated_backward

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
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
        dx_TH, d_factors = _backward(x_TH, inner_TR, factors, ctx.frozen, gradients, needs=needs)
        dx = None if dx_TH is None else dx_TH.view(ctx.shape).to(ctx.x_dtype)
        return (dx, None, None, *d_factors)


class GatedMlp(torch.autograd.Function):
    """`GatedMlp.apply(x, frozen, dtype, activation, *factors)`: down(activation(gate(x)) · up(x)).

    `frozen` is (gate, up, down), or (gate and up below each other, down), and `factors` are A and B of each. x has the
    shape (…, h), so has the output. Saved are x, gate(x) and up(x); their gated product (T, I) is computed again in the
    backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        frozen: Sequence[Frozen],
        dtype: torch.dtype,
        activation: Activation,
        *factors: torch.Tensor,
    ) -> Any:
        """The output, in `dtype`."""
        x_TH = x.reshape(-1, x.shape[-1]).to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            inner_TR, made = gate_and_up(x_TH, frozen, factors)
            y_TH, inner_down_TR = gated_down(made, frozen[-1], factors[-2:], activation=activation)
        ctx.save_for_backward(x_TH, inner_TR, inner_down_TR, *made, *factors)
        ctx.frozen, ctx.activation, ctx.shape, ctx.x_dtype = frozen, activation, x.shape, x.dtype
        return y_TH.view(*x.shape[:-1], y_TH.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Gradients of x and of the factors."""
        x_TH, inner_TR, inner_down_TR, *rest = ctx.saved_tensors
        made, factors = rest[: len(ctx.frozen) - 1], rest[len(ctx.frozen) - 1 :]
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        dx_TH, d_factors = mlp_backward(
            gradient, (x_TH, inner_TR, made, inner_down_TR), factors, ctx.frozen, activation=ctx.activation, needs=needs
        )
        dx = None if dx_TH is None else dx_TH.view(ctx.shape).to(ctx.x_dtype)
        return (dx, None, None, None, *d_factors)


def gate_and_up(
    x_TH: torch.Tensor, frozen: Sequence[Frozen], factors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """X Aᵀ of the layers before the last of `frozen`, (T, sum of ranks), and what they put out, (T, I) each."""
    first = factors[:-2]
    inner_TR = x_TH @ _stacked(first[0::2], x_TH.dtype).T
    parts = inner_TR.split([a.shape[0] for a in first[0::2]], dim=1)
    made = [
        _plus(part, x_TH, inner, b.to(x_TH.dtype))
        for part, inner, b in zip(frozen[:-1], parts, first[1::2], strict=True)
    ]
    return inner_TR, made


def gated_down(
    made: Sequence[torch.Tensor], down: Frozen, factors: Sequence[torch.Tensor], *, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of an MLP (T, h), and the gated product times the last A, (T, r)."""
    a, b = factors
    h_TI = gated(*_halves(made), activation=activation)
    inner_TR = h_TI @ a.to(h_TI.dtype).T
    return _plus(down, h_TI, inner_TR, b.to(h_TI.dtype)), inner_TR


def mlp_backward(
    gradient: torch.Tensor,
    saved: tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor], torch.Tensor | None],
    factors: Sequence[torch.Tensor],
    frozen: Sequence[Frozen],
    *,
    activation: Activation,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """dX (T, h) or None, and dA, dB of every projection; `needs` says which of x and the factors need one.

    `saved`: X, X Aᵀ, what gate and up put out, and the gated product times the last A (None: not computed yet).
    """
    x_TH, inner_TR, made, inner_down_TR = saved
    gate_TI, up_TI = _halves(made)
    h_TI = gated(gate_TI, up_TI, activation=activation)
    if inner_down_TR is None:
        inner_down_TR = h_TI @ factors[-2].to(h_TI.dtype).T
    dh_TI, d_down = _backward(h_TI, inner_down_TR, factors[-2:], frozen[-1:], (gradient,), needs=(True, *needs[-2:]))
    del h_TI
    if dh_TI is None:
        raise RuntimeError("the gradient of the product was asked for")
    d_made: tuple[torch.Tensor, ...] = gated_backward(dh_TI, gate_TI, up_TI, activation=activation)
    del dh_TI
    if len(made) == 1:
        d_made = (torch.cat(d_made, dim=1),)
    dx_TH, d_first = _backward(x_TH, inner_TR, factors[:-2], frozen[:-1], d_made, needs=needs[:-2])
    return dx_TH, d_first + d_down


def _halves(made: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two outputs (T, I), or the halves of one (T, 2I)."""
    if len(made) == 1:
        gate_TI, up_TI = made[0].chunk(2, dim=1)
        return gate_TI, up_TI
    return made[0], made[1]


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
    """dX (T, h) or None, and dA, dB of every projection; `needs` says which of x and the factors need one."""
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
        if needs[2 + 2 * number]:
            d_factors[2 * number + 1] = (dy_TO.T @ parts[number]).to(b.dtype).mul_(part.scale)
        if needs[0]:
            weight = part.weight(dtype)
            dx_TH = dy_TO @ weight if dx_TH is None else dx_TH.addmm_(dy_TO, weight)
            del weight
    if any(needs[1::2]):
        d_a = (d_inner_TR.T @ x_TH).split(ranks)
        for number, found in enumerate(d_a):
            if needs[1 + 2 * number]:
                d_factors[2 * number] = found.to(factors[2 * number].dtype)
    if dx_TH is not None:
        dx_TH.addmm_(d_inner_TR, _stacked(factors[0::2], dtype))
    return dx_TH, d_factors

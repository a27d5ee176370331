"""RMSNorm with a frozen weight that saves its input and one number a token, not two more copies of the input."""

from __future__ import annotations

from typing import Any

import torch


class RmsNorm(torch.autograd.Function):
    """`RmsNorm.apply(x, weight, epsilon)`: weight · x / sqrt(mean(x²) + epsilon), over the last axis.

    Mean and quotient are computed in float32, whatever the dtype of x. The weight gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """The normalized input, in the dtype of x."""
        size = x.shape[-1]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(size).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale, out=torch.empty_like(x)).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """dX = scale · (w·dY) − x · scale³ · mean(x · w·dY)."""
        x, weight, scale = ctx.saved_tensors
        weighted = gradient * weight
        mean = torch.mul(weighted, x).sum(dim=-1, keepdim=True, dtype=torch.float32).div_(x.shape[-1])
        dx = torch.mul(weighted, scale, out=weighted)
        return dx.addcmul_(x, mean.mul_(scale.pow(3)).to(x.dtype), value=-1), None, None

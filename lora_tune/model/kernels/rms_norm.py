"""RMSNorm with a frozen weight that saves its input and one number a token, not two more copies of the input."""

from __future__ import annotations

from typing import Any

import torch

from lora_tune.model.kernels.choice import rms_norm, rms_norm_backward


class RmsNorm(torch.autograd.Function):
    """`RmsNorm.apply(x, weight, epsilon, offset)`: (offset + weight) · x / sqrt(mean(x²) + epsilon) of the last axis.

    Mean and quotient are computed in float32, whatever the dtype of x. The weight gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float) -> torch.Tensor:
        """The normalized input, in the dtype of x."""
        found, scale = rms_norm(x, weight, epsilon, offset=offset)
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return found

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """The gradient of x."""
        x, weight, scale = ctx.saved_tensors
        return rms_norm_backward(gradient, x, weight, scale, offset=ctx.offset), None, None, None

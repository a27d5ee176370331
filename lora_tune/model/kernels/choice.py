"""Which kernels compute the parts of a training step that are not products of matrices: Triton's or PyTorch's.

Everything here is an ordinary function of tensors, without autograd; the functions of `projections.py`, `rms_norm.py`
and the loss head call them in their forward and backward passes. A tensor on a CUDA GPU with Triton is computed by
`triton_*.py`, anything else by PyTorch: the same arguments, the same results but for the last rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch.nn import functional

Activation = Literal["silu", "gelu_tanh"]  # of a gated MLP: Llama, Mistral, Qwen and Phi have silu, Gemma gelu_tanh
Direction = Literal["forward", "backward"]


class FourBitState(Protocol):
    """What bitsandbytes keeps beside a packed 4-bit weight (its `QuantState`); nested where scales are quantized."""

    absmax: torch.Tensor  # the scale of each block: float32, or uint8 where they are quantized themselves
    shape: Any  # (out, in)
    code: torch.Tensor  # the 16 values, float32
    dtype: torch.dtype  # of the weight before it was quantized
    blocksize: int
    quant_type: str
    offset: torch.Tensor | None  # the mean of the scales, a scalar
    state2: Any  # of the scales: absmax (float32), code (256 values), blocksize


def dequantize(
    packed: torch.Tensor, state: FourBitState, dtype: torch.dtype, *, otherwise: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """The matrix (out, in) of a 4-bit weight in `dtype`, rounded to the dtype of `state` before; NF4 and FP4.

    On a GPU one launch writes it into a buffer that the next call writes over: use it before, and keep no reference.
    `otherwise` dequantizes where there is no kernel for it.
    """
    return otherwise().to(dtype)


def gated(gate_TI: torch.Tensor, up_TI: torch.Tensor, *, activation: Activation = "silu") -> torch.Tensor:
    """activation(gate) · up, in a new tensor of their shape and dtype."""
    return _activated(gate_TI, activation).mul_(up_TI)


def gated_backward(
    dh_TI: torch.Tensor, gate_TI: torch.Tensor, up_TI: torch.Tensor, *, activation: Activation = "silu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients (of gate, of up), given that of their gated product, which is consumed: one of the two may be it.

    d_up = dh · activation(gate), d_gate = dh · up · activation'(gate).
    """
    d_up_TI = _activated(gate_TI, activation).mul_(dh_TI)
    dh_TI.mul_(up_TI)
    if activation == "silu":
        return torch.ops.aten.silu_backward(dh_TI, gate_TI), d_up_TI
    return torch.ops.aten.gelu_backward(dh_TI, gate_TI, approximate="tanh"), d_up_TI


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(offset + weight) · x / sqrt(mean(x²) + epsilon) over the last axis, and 1/sqrt(…) as float32 (…, 1).

    The dtype is that of x. Without an offset the quotient is rounded to it before the product (Llama); with one only
    the result is (Gemma).
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    if offset:
        return (x * scale).mul_(weight.float() + offset).to(x.dtype), scale
    return torch.mul(x, scale, out=torch.empty_like(x)).mul_(weight), scale


def rms_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *, offset: float = 0.0
) -> torch.Tensor:
    """The gradient of x, in a new tensor: scale · (w·dY) − x · scale³ · mean(x · w·dY), w being offset + weight."""
    factor = (weight.float() + offset) if offset else weight
    weighted = (gradient * factor).to(x.dtype)
    mean = torch.mul(weighted, x).sum(dim=-1, keepdim=True, dtype=torch.float32).div_(x.shape[-1])
    dx = torch.mul(weighted, scale, out=weighted)
    return dx.addcmul_(x, mean.mul_(scale.pow(3)).to(x.dtype), value=-1)


def rope(x_BNTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, direction: Direction = "forward") -> None:
    """Rotate the heads (batch, heads, tokens, head size) in place, backward by the negative angle.

    `cos` and `sin` are (1 or batch, tokens, R), R even and at most the head size; what lies beyond R stays. The two
    halves of R are rotated against each other (`rotate_half`), x may be a transposed view.
    """
    half = cos.shape[-1] // 2
    first, second = x_BNTD[..., :half], x_BNTD[..., half : 2 * half]
    (cos_1, cos_2), (sin_1, sin_2) = (
        (table.unsqueeze(1)[..., :half], table.unsqueeze(1)[..., half:]) for table in (cos, sin)
    )
    if direction == "backward":
        sin_1, sin_2 = -sin_2, -sin_1
    before = first.clone()
    first.mul_(cos_1).addcmul_(second, sin_1, value=-1)
    second.mul_(cos_2).addcmul_(before, sin_2)


def loss_tile(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, *, softcap: float = 0.0, multiplier: float = 1.0
) -> torch.Tensor:
    """Cross-entropy (N, nats, float32) of N tokens over the whole vocabulary; the logits become their own gradient.

    The loss is that of z = multiplier · logits, or softcap · tanh(multiplier · logits / softcap) where softcap is not
    0. Afterwards `logits_NV` holds d loss_n / d logits_nv in its dtype: (softmax(z) − one(target)) · dz / dlogits.
    A negative target is not trained: loss 0, gradient 0.
    """
    z_NV = logits_NV.float() if multiplier == 1.0 else logits_NV.float() * multiplier
    slope_NV: torch.Tensor | None = None
    if softcap:
        bent_NV = torch.tanh(z_NV / softcap)
        z_NV, slope_NV = bent_NV * softcap, 1 - bent_NV.square()
    ignored_N = targets_N < 0
    chosen_N1 = targets_N.clamp_min(0).unsqueeze(1)
    lse_N1 = z_NV.logsumexp(dim=1, keepdim=True)
    loss_N = (lse_N1 - z_NV.gather(1, chosen_N1)).squeeze(1).masked_fill_(ignored_N, 0.0)
    d_NV = torch.exp(z_NV - lse_N1)
    d_NV.scatter_add_(1, chosen_N1, torch.full_like(lse_N1, -1.0))
    if slope_NV is not None:
        d_NV.mul_(slope_NV)
    d_NV.mul_(multiplier).masked_fill_(ignored_N.unsqueeze(1), 0.0)
    logits_NV.copy_(d_NV)
    return loss_N


def _activated(gate_TI: torch.Tensor, activation: Activation) -> torch.Tensor:
    """A new tensor."""
    return functional.silu(gate_TI) if activation == "silu" else functional.gelu(gate_TI, approximate="tanh")

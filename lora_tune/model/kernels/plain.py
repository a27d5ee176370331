"""The parts of a training step that are not products of matrices, in PyTorch: on a CPU, and where Triton has no kernel.

`choice.py` says what each of them is; `dequantize` here is the definition, bitsandbytes' own is what runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

_BLOCK = {"cpu": 2**16, "cuda": 2**24}  # values of a norm that are worked on at once in float32
_WHOLE = 8  # blocks that are not worth it


def dequantize(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """The matrix of a 4-bit weight by table lookup: of each byte the high half comes first."""
    values = state.shape.numel()
    scales = state.absmax
    if state.state2 is not None:
        nested = state.state2
        own = nested.absmax.repeat_interleave(nested.blocksize)[: scales.numel()]
        scales = nested.code[scales.view(-1).long()] * own + state.offset
    pairs = packed.reshape(-1).view(torch.uint8).long()
    codes = torch.stack([state.code[pairs >> 4], state.code[pairs & 15]], dim=1).view(-1)[:values]
    matrix = codes * scales.view(-1).repeat_interleave(state.blocksize)[:values]
    return matrix.to(state.dtype).to(dtype).view(state.shape)


def gated(gate_TI: torch.Tensor, up_TI: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) · up, in a new tensor."""
    return _activated(gate_TI, activation).mul_(up_TI)


def gated_backward(
    dh_TI: torch.Tensor, gate_TI: torch.Tensor, up_TI: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and of up; `dh_TI` is consumed."""
    d_up_TI = _activated(gate_TI, activation).mul_(dh_TI)
    dh_TI.mul_(up_TI)
    if activation == "silu":
        return torch.ops.aten.silu_backward(dh_TI, gate_TI), d_up_TI
    return torch.ops.aten.gelu_backward(dh_TI, gate_TI, approximate="tanh"), d_up_TI


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalized input, and 1/sqrt(mean(x²) + epsilon) as float32 (…, 1).

    What is made of 16 bit in float32 on the way is made by blocks of rows, which stay in the cache of a processor.
    """
    size = x.shape[-1]
    rows = _rows_at_once(x, size)
    if x.dtype == torch.float32 or not x.is_contiguous() or x.numel() <= _WHOLE * rows * size:
        scale = _scale(x, epsilon)
        if offset:
            return (x * scale).mul_(weight.float() + offset).to(x.dtype), scale
        return torch.mul(x, scale, out=torch.empty_like(x)).mul_(weight), scale
    y, scale = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    x_NH, y_NH, scale_N1, factor = x.view(-1, size), y.view(-1, size), scale.view(-1, 1), weight.float() + offset
    for start in range(0, x_NH.shape[0], rows):
        block = slice(start, start + rows)
        scale_N1[block] = found = _scale(x_NH[block], epsilon)
        if offset:
            y_NH[block] = (x_NH[block] * found).mul_(factor)
        else:
            torch.mul(x_NH[block], found, out=y_NH[block]).mul_(weight)
    return y, scale


def _scale(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


def _rows_at_once(x: torch.Tensor, size: int) -> int:
    return max(1, _BLOCK.get(x.device.type, _BLOCK["cuda"]) // size)


def rms_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offset: float
) -> torch.Tensor:
    """The gradient of x, in a new tensor: in float32, by blocks of rows that stay in the cache of a processor."""
    size, factor = x.shape[-1], weight.float() + offset
    x_NH, gradient_NH, scale_N1 = x.reshape(-1, size), gradient.reshape(-1, size), scale.reshape(-1, 1)
    dx_NH = torch.empty(x_NH.shape, dtype=x.dtype, device=x.device)
    rows = _rows_at_once(x, size)
    for start in range(0, x_NH.shape[0], rows):
        block, scale_R1 = slice(start, start + rows), scale_N1[start : start + rows]
        normal_RH = x_NH[block].float() * scale_R1
        weighted_RH = gradient_NH[block].float() * factor
        mean_R1 = torch.linalg.vecdot(weighted_RH, normal_RH).unsqueeze(1).div_(size)
        dx_NH[block] = weighted_RH.addcmul_(normal_RH, mean_R1, value=-1).mul_(scale_R1)
    return dx_NH.view(x.shape)


def rope(x_BNTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: str) -> None:
    """Rotate the two halves of each head's first R values against each other, in place."""
    half = cos.shape[-1] // 2
    first, second = x_BNTD[..., :half], x_BNTD[..., half : 2 * half]
    cos_1, cos_2 = cos.unsqueeze(1).split(half, dim=-1)
    sin_1, sin_2 = sin.unsqueeze(1).split(half, dim=-1)
    if direction == "backward":
        sin_1, sin_2 = -sin_2, -sin_1
    before = first.clone()
    first.mul_(cos_1).addcmul_(second, sin_1, value=-1)
    second.mul_(cos_2).addcmul_(before, sin_2)


def _activated(gate_TI: torch.Tensor, activation: str) -> torch.Tensor:
    """A new tensor."""
    return functional.silu(gate_TI) if activation == "silu" else functional.gelu(gate_TI, approximate="tanh")

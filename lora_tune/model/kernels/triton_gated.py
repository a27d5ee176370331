"""The gated product of an MLP and its gradient, one Triton launch each: silu (Llama) or gelu's tanh form (Gemma)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _activate(x, SILU: tl.constexpr):
    """The activation and its derivative, in float32."""
    if SILU:
        sigma = tl.sigmoid(x)
        slope = sigma * (1.0 + x * (1.0 - sigma))
    else:
        square = x * x
        inner = 0.7978845608028654 * x * (1.0 + 0.044715 * square)  # sqrt(2 / π) · (x + 0.044715 x³)
        sigma = tl.sigmoid(2.0 * inner)  # (1 + tanh(inner)) / 2
        slope = sigma + 2.0 * x * sigma * (1.0 - sigma) * 0.7978845608028654 * (1.0 + 0.134145 * square)
    return x * sigma, slope


@triton.jit
def _gated(
    gate,
    up,
    out,
    columns,
    gate_stride,
    up_stride,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    across = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    row, column = program // across, program % across * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0)
    y = tl.load(up + row * up_stride + column, mask=inside, other=0.0)
    active, _ = _activate(x.to(tl.float32), SILU)
    h = active.to(x.dtype).to(tl.float32) * y.to(tl.float32)
    tl.store(out + row * columns + column, h.to(x.dtype), mask=inside)


@triton.jit
def _gated_backward(
    dh,
    gate,
    up,
    d_gate,
    columns,
    gate_stride,
    up_stride,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    across = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    row, column = program // across, program % across * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0)
    y = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dh + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    active, slope = _activate(x.to(tl.float32), SILU)
    tl.store(d_gate + row * columns + column, (d * y * slope).to(x.dtype), mask=inside)
    tl.store(dh + row * columns + column, (d * active.to(x.dtype).to(tl.float32)).to(x.dtype), mask=inside)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) · up, contiguous; the two have one shape and dtype."""
    shape, (gate, up) = gate.shape, _rows(gate, up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _gated[_grid(gate)](
        gate, up, out, gate.shape[1], gate.stride(0), up.stride(0), SILU=activation == "silu", BLOCK=_BLOCK
    )
    return out.view(shape)


def gated_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and of up; the second overwrites `dh` where that is contiguous."""
    shape, (gate, up) = gate.shape, _rows(gate, up)
    d_up = dh.contiguous().view(gate.shape)
    d_gate = torch.empty_like(d_up)
    _gated_backward[_grid(gate)](
        d_up, gate, up, d_gate, gate.shape[1], gate.stride(0), up.stride(0), SILU=activation == "silu", BLOCK=_BLOCK
    )
    return d_gate.view(shape), d_up.view(shape)


def _rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """As matrices whose rows lie apart by a stride: one row if all are contiguous, halves of a wider matrix as is."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(1, -1) for tensor in tensors]
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    return [row if row.stride(1) == 1 else row.contiguous() for row in rows]


def _grid(rows: torch.Tensor) -> tuple[int]:
    return (rows.shape[0] * triton.cdiv(rows.shape[1], _BLOCK),)

"""RMSNorm and its gradient for a frozen weight as Triton kernels: each row is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = 2048  # values that a program takes at least: several short rows (the heads of Qwen3) or one long one


@triton.jit
def _norm(
    x,
    weight,
    y,
    scale,
    rows,
    columns,
    x_stride,
    epsilon,
    offset,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    wide = value.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / columns + epsilon)
    factor = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    normal = wide * r[:, None]
    if not OFFSET:
        normal = normal.to(value.dtype).to(tl.float32)
    found = normal * (factor + offset)
    tl.store(y + row[:, None] * columns + column[None, :], found.to(value.dtype), mask=inside)
    tl.store(scale + row, r, mask=row < rows)


@triton.jit
def _norm_backward(
    gradient,
    x,
    weight,
    scale,
    dx,
    rows,
    columns,
    gradient_stride,
    x_stride,
    offset,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    wide = value.to(tl.float32)
    dy = tl.load(gradient + row[:, None] * gradient_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :] + offset
    r = tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
    weighted = dy * factor
    mean = (tl.sum(weighted * wide, axis=1) / columns)[:, None]
    found = r * (weighted - wide * (r * r * mean))
    tl.store(dx + row[:, None] * columns + column[None, :], found.to(value.dtype), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalized rows, contiguous, and 1/sqrt(mean(x²) + epsilon) as float32 (…, 1)."""
    shape, x = x.shape, _rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    grid, sizes, warps = _layout(x)
    _norm[grid](
        x, weight, y, scale, *x.shape, x.stride(0), epsilon, offset, OFFSET=bool(offset), **sizes, num_warps=warps
    )
    return y.view(shape), scale.view(*shape[:-1], 1)


def rms_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offset: float
) -> torch.Tensor:
    """The gradient of x, contiguous; `scale` is what `rms_norm` gave."""
    shape, x, gradient = x.shape, _rows(x), _rows(gradient)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, sizes, warps = _layout(x)
    strides = gradient.stride(0), x.stride(0)
    _norm_backward[grid](
        gradient, x, weight, scale.contiguous(), dx, *x.shape, *strides, offset, **sizes, num_warps=warps
    )
    return dx.view(shape)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _layout(rows: torch.Tensor) -> tuple[tuple[int], dict[str, int], int]:
    """The grid, the sizes of a program's tile, and its warps: about 16 values for each thread."""
    block = triton.next_power_of_2(rows.shape[1])
    several = max(_TILE // block, 1)
    warps = min(max(several * block // 512, 4), 32)
    return (triton.cdiv(rows.shape[0], several),), {"ROWS": several, "BLOCK": block}, warps

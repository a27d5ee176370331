"""Rotary positions in place by one Triton launch: a program rotates all heads of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = 2048  # pairs that a program rotates at a time


@triton.jit
def _rope(
    x,
    cos,
    sin,
    tokens,
    heads,
    half,
    x_batch,
    x_head,
    x_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // tokens, program % tokens
    column = tl.arange(0, HALF)
    real = column < half
    cos += batch * cos_batch + token * cos_token
    sin += batch * sin_batch + token * sin_token
    cos_1 = tl.load(cos + column, mask=real, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos + half + column, mask=real, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin + column, mask=real, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin + half + column, mask=real, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:
        sin_1, sin_2 = -sin_2, -sin_1
    x += batch * x_batch + token * x_token
    for begin in range(0, heads, HEADS):
        head = (begin + tl.arange(0, HEADS)).to(tl.int64)
        inside = (head < heads)[:, None] & real[None, :]
        place = x + head[:, None] * x_head + column[None, :]
        first = tl.load(place, mask=inside, other=0.0)
        second = tl.load(place + half, mask=inside, other=0.0)
        one, two = first.to(tl.float32), second.to(tl.float32)
        tl.store(place, (one * cos_1 - two * sin_1).to(first.dtype), mask=inside)
        tl.store(place + half, (two * cos_2 + one * sin_2).to(first.dtype), mask=inside)


def rope(x_BNTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: str) -> None:
    """Rotate the first R columns of every head in place; the columns of all three lie next to each other.

    x is (batch, heads, tokens, head size) with any other strides, cos and sin are (1 or batch, tokens, R).
    """
    batch, heads, tokens, _ = x_BNTD.shape
    half = cos.shape[-1] // 2
    block = triton.next_power_of_2(half)
    strides = [*x_BNTD.stride()[:3]]
    for table in (cos, sin):
        strides += [table.stride(0) if table.shape[0] > 1 else 0, table.stride(1)]
    several = min(triton.next_power_of_2(heads), max(_TILE // block, 1))
    _rope[(batch * tokens,)](
        x_BNTD, cos, sin, tokens, heads, half, *strides, BACKWARD=direction == "backward", HEADS=several, HALF=block
    )

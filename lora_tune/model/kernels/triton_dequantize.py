"""4-bit weights made whole by one Triton kernel: codes, their scales and, where those are quantized, the scales' own.

A byte holds two values of a row, the first in its high half. Values come in blocks of 64 (or another power of two) with
a scale each; scales that are quantized themselves (double quantization) are bytes in blocks of 256, a scale each, and
one mean for all. Everything is computed in float32 in the order of bitsandbytes, without fused multiply-adds, so that
the result is the same bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_TILE = 4096  # values for each program: 2 KiB read, 8 KiB of bfloat16 written


@triton.jit
def _dequantize(
    packed,
    scales,
    codes,
    scale_scales,
    scale_codes,
    mean,
    out,
    values,
    bytes_,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    ROUND_TO: tl.constexpr,
):
    half: tl.constexpr = BLOCK // 2
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    exists = block * BLOCK < values
    if SCALE_BLOCK > 0:
        code = tl.load(scales + block, mask=exists, other=0).to(tl.int32)
        scale = tl.load(scale_codes + code)
        scale = scale * tl.load(scale_scales + block // SCALE_BLOCK, mask=exists, other=0.0)
        scale = scale + tl.load(mean)
    else:
        scale = tl.load(scales + block, mask=exists, other=0.0)
    byte = block[:, None] * half + tl.arange(0, half)[None, :]
    pair = tl.load(packed + byte, mask=byte < bytes_, other=0).to(tl.int32)
    first = tl.load(codes + (pair >> 4)) * scale[:, None]
    second = tl.load(codes + (pair & 15)) * scale[:, None]
    value = tl.interleave(first, second).to(ROUND_TO).to(out.dtype.element_ty)
    place = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + place, value, mask=place < values)


def dequantize(packed: torch.Tensor, state: Any, out: torch.Tensor) -> None:
    """Write the values of a packed weight into `out` (contiguous, as many elements), rounded to `state.dtype` first.

    `packed` are contiguous bytes, the tensors of `state` (bitsandbytes' `QuantState`) contiguous on the same device.
    """
    values, block = out.numel(), state.blocksize
    nested = state.state2
    blocks = max(_TILE // block, 1)
    _dequantize[(triton.cdiv(values, block * blocks),)](
        packed,
        state.absmax,
        state.code,
        state.code if nested is None else nested.absmax,
        state.code if nested is None else nested.code,
        state.code if nested is None else state.offset,
        out,
        values,
        (values + 1) // 2,
        BLOCK=block,
        BLOCKS=blocks,
        SCALE_BLOCK=0 if nested is None else nested.blocksize,
        ROUND_TO=_TYPES[state.dtype],
        enable_fp_fusion=False,
    )


_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

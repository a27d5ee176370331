"""Cross-entropy of whole rows of logits and, in their place, its gradient: one Triton launch, a program for each token.

A program reads its row twice: once for the maximum and the sum of exponentials (carried along, so that any vocabulary
fits), once to write softmax minus one. Nothing else of the size of the vocabulary is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096  # of the vocabulary at a time


@triton.jit
def _bent(logits, softcap, multiplier, SOFTCAP: tl.constexpr):
    """What the loss is taken of, and its slope, in float32; tanh(v) = 2 sigmoid(2 v) − 1."""
    z = logits.to(tl.float32) * multiplier
    if SOFTCAP:
        tanh = 2.0 * tl.sigmoid(2.0 * (z / softcap)) - 1.0
        z = softcap * tanh
        slope = multiplier * (1.0 - tanh * tanh)
    else:
        slope = multiplier + tl.zeros_like(z)
    return z, slope


@triton.jit
def _loss(
    logits,
    targets,
    losses,
    stride,
    vocabulary,
    softcap,
    multiplier,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    logits += row * stride
    lanes = tl.arange(0, BLOCK)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    chosen = tl.zeros((), tl.float32)
    for begin in range(0, vocabulary, BLOCK):
        column = begin + lanes
        inside = column < vocabulary
        z, _ = _bent(tl.load(logits + column, mask=inside, other=0.0), softcap, multiplier, SOFTCAP)
        z = tl.where(inside, z, float("-inf"))
        now = tl.maximum(highest, tl.max(z, axis=0))
        level = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(highest - level) + tl.sum(tl.exp(z - level), axis=0)
        chosen += tl.sum(tl.where(column == target, z, 0.0), axis=0)
        highest = now
    lse = highest + tl.log(total)
    chosen = tl.where(target < vocabulary, chosen, float("nan"))  # a target beyond the vocabulary must not pass
    trained = target >= 0
    tl.store(losses + row, tl.where(trained, lse - chosen, 0.0))
    for begin in range(0, vocabulary, BLOCK):
        column = begin + lanes
        inside = column < vocabulary
        raw = tl.load(logits + column, mask=inside, other=0.0)
        z, slope = _bent(raw, softcap, multiplier, SOFTCAP)
        d = (tl.exp(z - lse) - tl.where(column == target, 1.0, 0.0)) * slope
        tl.store(logits + column, tl.where(trained, d, 0.0).to(raw.dtype), mask=inside)


def loss_tile(logits_NV: torch.Tensor, targets_N: torch.Tensor, softcap: float, multiplier: float) -> torch.Tensor:
    """The losses (N, float32); the logits, whose columns lie next to each other, become their gradient."""
    rows, vocabulary = logits_NV.shape
    losses_N = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    _loss[(rows,)](
        logits_NV,
        targets_N.contiguous(),
        losses_N,
        logits_NV.stride(0),
        vocabulary,
        softcap,
        multiplier,
        SOFTCAP=bool(softcap),
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)),
        num_warps=8,
    )
    return losses_N

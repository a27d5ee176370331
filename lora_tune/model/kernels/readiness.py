"""Whether Triton's kernels can be trusted on a device: each is run once on a few numbers and compared with PyTorch's.

A kernel that does not compile there (no C compiler, a GPU that is too old or too new) or answers differently is never
used in that process; a warning says why, once.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace

import torch

from lora_tune.model.kernels import plain
from lora_tune.model.kernels.loss_tile import loss_tile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run in Python, on a CPU too
_OLDEST = (7, 5)  # compute capability: Turing
_BFLOAT16 = (8, 0)  # Ampere
_ALLOWED = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # difference to PyTorch's, relative
_log = logging.getLogger(__name__)

Pair = tuple[torch.Tensor, torch.Tensor]  # the same by Triton and by PyTorch


@cache
def why_not(kernel: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a kernel of Triton is not used for tensors of a dtype on a device, or nothing; said once in the log.

    `kernel` is one of `CHECKS`. The random state of no device changes.
    """
    reason = _unfit(device, dtype) or _tried(kernel, device, dtype)
    if reason:
        _log.warning("%s: Triton's %s for %s is not used: %s; PyTorch computes it", device, kernel, dtype, reason)
    return reason


def _unfit(device: torch.device, dtype: torch.dtype) -> str:
    try:
        import triton  # noqa: F401  (whether it is there)
    except ImportError:
        return "triton is not installed"
    if INTERPRETED:
        return ""
    if torch.version.hip is not None:
        return "it was never tried on ROCm"
    capability = torch.cuda.get_device_capability(device)
    needed = _BFLOAT16 if dtype == torch.bfloat16 else _OLDEST
    if capability < needed:
        return f"it needs compute capability {needed[0]}.{needed[1]}, got {capability[0]}.{capability[1]}"
    return ""


@torch.no_grad()
def _tried(kernel: str, device: torch.device, dtype: torch.dtype) -> str:
    from triton.errors import TritonError

    try:
        with guard(device), torch.autocast(device.type, enabled=False):  # a norm is called under that of the training
            worst = max(_difference(*pair) for pair in CHECKS[kernel](device, dtype))
    except (TritonError, RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return f"it does not run here: {type(error).__name__} {first}".strip()
    if not worst <= _ALLOWED[dtype]:
        return f"it differs from PyTorch's by {worst:.1e} of its size, more than {_ALLOWED[dtype]:.0e}"
    return ""


def guard(device: torch.device) -> torch.cuda.device:
    """The context in which Triton starts its kernels on this device; it takes the current one otherwise."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    size = expected.float().norm().clamp_min(1e-12)
    return float((found.float() - expected.float()).norm() / size)


def _drawn(sizes: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Normal numbers of these shapes, the same every time, drawn beside the random states of the training."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(*size, generator=draw).to(device, dtype) for size in sizes]


def _check_dequantize(device: torch.device, dtype: torch.dtype) -> list[Pair]:
    from lora_tune.model.kernels import triton_dequantize

    draw = torch.Generator().manual_seed(0)
    packed, absmax = (torch.randint(256, (size,), generator=draw, dtype=torch.uint8) for size in (64 * 75, 150))
    code, codes, own, mean = (torch.randn(size, generator=draw) for size in (16, 256, 3, 1))
    nested = SimpleNamespace(absmax=own.to(device), code=codes.to(device), blocksize=64)
    state = SimpleNamespace(
        absmax=absmax.to(device),
        shape=torch.Size([75, 128]),
        code=code.to(device),
        dtype=dtype,
        blocksize=64,
        offset=mean[0].to(device),
        state2=nested,
    )
    out = torch.empty(state.shape, dtype=dtype, device=device)
    triton_dequantize.dequantize(packed.to(device), state, out)
    return [(out, plain.dequantize(packed.to(device), state, dtype))]


def _check_gated(device: torch.device, dtype: torch.dtype) -> list[Pair]:
    from lora_tune.model.kernels import triton_gated

    wide, dh = _drawn([(3, 2100), (3, 1050)], device, dtype)
    gate, up = wide.chunk(2, dim=1)
    pairs: list[Pair] = []
    for activation in ("silu", "gelu_tanh"):
        pairs.append((triton_gated.gated(gate, up, activation), plain.gated(gate, up, activation)))
        found = triton_gated.gated_backward(dh.clone(), gate, up, activation)
        pairs += zip(found, plain.gated_backward(dh.clone(), gate, up, activation), strict=True)
    return pairs


def _check_norm(device: torch.device, dtype: torch.dtype) -> list[Pair]:
    from lora_tune.model.kernels import triton_norm

    x, dy, weight = _drawn([(5, 1100), (5, 1100), (1100,)], device, dtype)
    pairs: list[Pair] = []
    for offset in (0.0, 1.0):
        found, expected = (way.rms_norm(x, weight, 1e-6, offset) for way in (triton_norm, plain))
        pairs += zip(found, expected, strict=True)
        pairs.append(
            (
                triton_norm.rms_norm_backward(dy, x, weight, expected[1], offset),
                plain.rms_norm_backward(dy, x, weight, expected[1], offset),
            )
        )
    return pairs


def _check_rope(device: torch.device, dtype: torch.dtype) -> list[Pair]:
    from lora_tune.model.kernels import triton_rope

    x, cos, sin = _drawn([(2, 5, 3, 80), (1, 5, 64), (1, 5, 64)], device, dtype)
    found, expected = x.clone().transpose(1, 2), x.clone().transpose(1, 2)
    for direction in ("forward", "backward"):
        triton_rope.rope(found, cos, sin, direction)
        plain.rope(expected, cos, sin, direction)
    return [(found, expected)]


def _check_loss(device: torch.device, dtype: torch.dtype) -> list[Pair]:
    from lora_tune.model.kernels import triton_loss

    (logits,) = _drawn([(4, 5000)], device, dtype)
    targets = torch.tensor([0, 4999, -100, 17], device=device)
    pairs: list[Pair] = []
    for softcap, multiplier in ((0.0, 1.0), (3.0, 0.5)):
        found, expected = logits.clone(), logits.clone()
        losses = triton_loss.loss_tile(found, targets, softcap, multiplier)
        pairs += [(losses, loss_tile(expected, targets, softcap=softcap, multiplier=multiplier)), (found, expected)]
    return pairs


CHECKS: dict[str, Callable[[torch.device, torch.dtype], list[Pair]]] = {
    "dequantize": _check_dequantize,
    "gated": _check_gated,
    "norm": _check_norm,
    "rope": _check_rope,
    "loss": _check_loss,
}

"""Which kernels compute the parts of a training step that are not products of matrices: Triton's or PyTorch's.

Everything here is an ordinary function of tensors, without autograd; the functions of `projections.py`, `rms_norm.py`
and the loss head call them in their forward and backward passes. A tensor on a CUDA GPU is computed by `triton_*.py`
where Triton is there and has shown that it answers as PyTorch does (`readiness.py`); what it does not take (other
dtypes, layouts, subclasses of tensors, code that is being compiled) is computed by `plain.py`, and so is the CPU. Both
take the same arguments and give the same but for the last rounding. With TRITON_INTERPRET=1 in the environment the
kernels run on the CPU too, in Triton's interpreter, which is how they are tested.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch

from lora_tune.model.kernels import loss_tile as plain_loss
from lora_tune.model.kernels import plain
from lora_tune.model.kernels.readiness import INTERPRETED, guard, why_not

Activation = Literal["silu", "gelu_tanh"]  # of a gated MLP: Llama, Mistral, Qwen and Phi have silu, Gemma gelu_tanh
Direction = Literal["forward", "backward"]
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_PLAIN = (torch.Tensor, torch.nn.Parameter)  # not DTensor, nor what a tracer hands around
_WIDEST_NORM = 16384  # columns of a row, which one program holds in registers
_WIDEST_ROPE = 4096  # rotated values of a head
_BUFFERS: dict[tuple[torch.device, torch.dtype, int], torch.Tensor] = {}  # of weights made whole, one for each stream


class FourBitState(Protocol):
    """What bitsandbytes keeps beside a packed 4-bit weight (its `QuantState`); nested where scales are quantized."""

    absmax: torch.Tensor  # the scale of each block: float32, or uint8 where they are quantized themselves
    shape: Any  # (out, in)
    code: torch.Tensor  # the 16 values, float32
    dtype: torch.dtype  # of the weight before it was quantized
    blocksize: int
    offset: torch.Tensor | None  # the mean of the scales, a scalar
    state2: Any  # of the scales: absmax (float32), code (256 values), blocksize


def dequantize(
    packed: torch.Tensor, state: FourBitState, dtype: torch.dtype, *, otherwise: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """The matrix (out, in) of a 4-bit weight in `dtype`, rounded to the dtype of `state` before; NF4 and FP4.

    On a GPU one launch writes it into a buffer that the next call on the same stream writes over: use it before, and
    keep no reference. `otherwise` dequantizes where there is no kernel for it.
    """
    if not isinstance(state.shape, torch.Size) or not _takes("dequantize", packed, dtype=dtype):
        return otherwise().to(dtype)
    if not _is_whole(packed, state):
        return otherwise().to(dtype)
    from lora_tune.model.kernels import triton_dequantize

    out = _buffer(state.shape.numel(), packed.device, dtype)
    with guard(packed.device):
        triton_dequantize.dequantize(packed.view(-1).view(torch.uint8), state, out)
    return out.view(state.shape)


def gated(gate_TI: torch.Tensor, up_TI: torch.Tensor, *, activation: Activation = "silu") -> torch.Tensor:
    """activation(gate) · up, in a new tensor of their shape and dtype."""
    if not _takes("gated", gate_TI, up_TI) or not _alike(gate_TI, up_TI):
        return plain.gated(gate_TI, up_TI, activation)
    from lora_tune.model.kernels import triton_gated

    with guard(gate_TI.device):
        return triton_gated.gated(gate_TI, up_TI, activation)


def gated_backward(
    dh_TI: torch.Tensor, gate_TI: torch.Tensor, up_TI: torch.Tensor, *, activation: Activation = "silu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients (of gate, of up), given that of their gated product, which is consumed: one of the two may be it.

    d_up = dh · activation(gate), d_gate = dh · up · activation'(gate).
    """
    if not _takes("gated", dh_TI, gate_TI, up_TI) or not _alike(dh_TI, gate_TI, up_TI):
        return plain.gated_backward(dh_TI, gate_TI, up_TI, activation)
    from lora_tune.model.kernels import triton_gated

    with guard(gate_TI.device):
        found = triton_gated.gated_backward(dh_TI, gate_TI, up_TI, activation)
    _written(dh_TI)
    return found


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(offset + weight) · x / sqrt(mean(x²) + epsilon) over the last axis, and 1/sqrt(…) as float32 (…, 1).

    The dtype is that of x. Without an offset the quotient is rounded to it before the product (Llama); with one only
    the result is (Gemma).
    """
    if not _takes("norm", x, weight) or not _is_norm(x, weight):
        return plain.rms_norm(x, weight, epsilon, offset)
    from lora_tune.model.kernels import triton_norm

    with guard(x.device):
        return triton_norm.rms_norm(x, weight, epsilon, offset)


def rms_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *, offset: float = 0.0
) -> torch.Tensor:
    """The gradient of x, in a new tensor: scale · (w·dY) − x · scale³ · mean(x · w·dY), w being offset + weight."""
    if not _takes("norm", x, weight, gradient, scale) or not _is_norm(x, weight) or gradient.shape != x.shape:
        return plain.rms_norm_backward(gradient, x, weight, scale, offset)
    from lora_tune.model.kernels import triton_norm

    with guard(x.device):
        return triton_norm.rms_norm_backward(gradient, x, weight, scale, offset)


def rope(x_BNTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, direction: Direction = "forward") -> None:
    """Rotate the heads (batch, heads, tokens, head size) in place, backward by the negative angle.

    `cos` and `sin` are (1 or batch, tokens, R), R even and at most the head size; what lies beyond R stays. The two
    halves of R are rotated against each other (`rotate_half`), x may be a transposed view.
    """
    if not _takes("rope", x_BNTD, cos, sin) or not _is_rope(x_BNTD, cos, sin):
        plain.rope(x_BNTD, cos, sin, direction)
        return
    from lora_tune.model.kernels import triton_rope

    with guard(x_BNTD.device):
        triton_rope.rope(x_BNTD, cos, sin, direction)
    _written(x_BNTD)


def loss_tile(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, *, softcap: float = 0.0, multiplier: float = 1.0
) -> torch.Tensor:
    """Cross-entropy (N, nats, float32) of N tokens over the whole vocabulary; the logits become their own gradient.

    The loss is that of z = multiplier · logits, or softcap · tanh(multiplier · logits / softcap) where softcap is not
    0. Afterwards `logits_NV` holds d loss_n / d logits_nv in its dtype: (softmax(z) − one(target)) · dz / dlogits.
    A negative target is not trained: loss 0, gradient 0.
    """
    rows = logits_NV.dim() == 2 and logits_NV.stride(1) == 1 and targets_N.shape == logits_NV.shape[:1]
    if not _takes("loss", logits_NV) or not rows or targets_N.device != logits_NV.device:
        return plain_loss.loss_tile(logits_NV, targets_N, softcap=softcap, multiplier=multiplier)
    from lora_tune.model.kernels import triton_loss

    with guard(logits_NV.device):
        losses_N = triton_loss.loss_tile(logits_NV, targets_N, softcap, multiplier)
    _written(logits_NV)
    return losses_N


def free_buffers() -> None:
    """Give back the memory of the buffers that weights are made whole in, until they are needed again."""
    _BUFFERS.clear()


def _takes(kernel: str, *tensors: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Triton's kernel is used for these tensors; `dtype` is what it works in, else that of the first."""
    device = tensors[0].device
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return False
    if torch.compiler.is_compiling():  # the compiler makes kernels of PyTorch's operations by itself
        return False
    for tensor in tensors:
        if tensor.device != device or type(tensor) not in _PLAIN or not tensor.numel():
            return False
        if dtype is None and tensor.dtype not in _FLOATS:
            return False
    work = tensors[0].dtype if dtype is None else dtype
    return work in _FLOATS and not why_not(kernel, device, work)


def _alike(*tensors: torch.Tensor) -> bool:
    return all(tensor.shape == tensors[0].shape and tensor.dtype == tensors[0].dtype for tensor in tensors)


def _is_norm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    columns = x.shape[-1]
    return weight.shape == (columns,) and weight.is_contiguous() and columns <= _WIDEST_NORM


def _is_rope(x_BNTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """The shapes are those of `rope`, rows lie as they must, and no two values of x share their place."""
    if x_BNTD.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return False
    batch, _, tokens, size = x_BNTD.shape
    rotated = cos.shape[-1]
    apart = all(stride > 0 or length == 1 for length, stride in zip(x_BNTD.shape, x_BNTD.stride(), strict=True))
    rows = x_BNTD.stride(3) == cos.stride(2) == sin.stride(2) == 1
    fits = cos.shape[0] in (1, batch) and cos.shape[1] == tokens and rotated <= min(size, _WIDEST_ROPE)
    return apart and rows and fits and rotated % 2 == 0


def _is_whole(packed: torch.Tensor, state: FourBitState) -> bool:
    """The kernel reads this weight: parts in one place, contiguous, of the sizes and dtypes that belong together."""
    values, block, nested = state.shape.numel(), state.blocksize, state.state2
    blocks = -(-values // block)
    parts = [(packed, -(-values // 2), None), (state.code, 16, torch.float32)]
    if nested is None:
        parts.append((state.absmax, blocks, torch.float32))
    elif state.offset is None or nested.state2 is not None or nested.dtype != torch.float32 or nested.blocksize < 1:
        return False
    else:
        parts += [(state.absmax, blocks, torch.uint8), (nested.code, 256, torch.float32)]
        parts += [(nested.absmax, -(-blocks // nested.blocksize), torch.float32), (state.offset, 1, torch.float32)]
    for tensor, needed, dtype in parts:
        size = tensor.numel() * (tensor.element_size() if dtype is None else 1)
        if tensor.device != packed.device or not tensor.is_contiguous() or size < needed:
            return False
        if dtype is not None and tensor.dtype != dtype:
            return False
    upright = packed.dim() == 2 and packed.shape[0] != 1  # bitsandbytes gives a lying one back transposed
    return upright and state.dtype in _FLOATS and block in (32, 64, 128, 256, 512, 1024, 2048, 4096)


def _buffer(values: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Room for so many values: always the same on a stream, so that weights are never kept beside each other."""
    stream, capturing = 0, False
    if device.type == "cuda":
        stream, capturing = torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()
    place = (device, dtype, stream)
    held = _BUFFERS.get(place)
    if held is None or held.numel() < values:
        held = torch.empty(values, dtype=dtype, device=device)
        if not capturing:  # what is allocated while a graph is captured belongs to the graph
            _BUFFERS[place] = held
    _written(held)
    return held[:values]


def _written(tensor: torch.Tensor) -> None:
    """Tell autograd that the tensor was changed, which a kernel of Triton does not: a stale saved one then raises."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)

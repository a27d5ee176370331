"""A base divided over processes: each holds its part of every weight; what is read or written of it is whole.

Under fsdp2 (torch's `fully_shard`) these are rows, in a DTensor; under zero3 flat parts (`zero3.py`). A decoder layer
is one group of `fully_shard`, put together for its forward and its backward pass; embeddings, last norm and head are
another. Weights of 4 bits are divided as numbers of their storage type, which must be a floating one: bytes would stay
whole on every process without a word. What is divided is counted, and anything less than all of it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from lora_tune.errors import CheckFailed
from lora_tune.model import zero3


def divide(model: nn.Module, *, device: torch.device) -> int:
    """Divide every parameter over all processes, which hold it on `device` then; returns how many they are.

    Raises:
        CheckFailed: a parameter stayed whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    move_buffers(model, device)
    whole_ones = [name for name, parameter in model.named_parameters() if not _is_part(parameter)]
    if whole_ones:
        reason = f"{len(whole_ones)} weights are not divided, such as {whole_ones[0]}"
        raise CheckFailed(reason, "set hardware.strategy: ddp, or base.quantize: none")
    with torch.no_grad():  # torch finds out which group is the outermost one when it is called first
        model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=False)
    model.reshard()  # type: ignore[operator]
    return sum(1 for _ in model.parameters())


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Bring what is not divided to the device: buffers, and the scales of 4-bit weights, which are no buffers."""
    from lora_tune.model.base import linear4bit_modules

    for name, buffer in [(name, buffer) for name, buffer in model.named_buffers() if buffer.device != device]:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, buffer.to(device))
    for _, module in linear4bit_modules(model):
        for holder in (module, module.weight):
            if getattr(holder, "quant_state", None) is not None:
                holder.quant_state.to(device)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, parts of a divided model may be called alone, as generation and evaluation do; all processes must.

    Layers are put together when they are called, the rest for the whole time.
    """
    from torch.distributed.fsdp import FSDPModule

    if any(zero3.is_part(parameter) for parameter in model.parameters()):
        with zero3.called_in_parts(model):
            yield
        return
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def handle(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter detached; as it is where DeepSpeed divides it, since its detached form has lost its parts."""
    return parameter if zero3.is_part(parameter) else parameter.detach()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with all of its parts, where each process holds one of them; every process must ask for it.

    Of a parameter this asks for its `handle`.
    """
    if zero3.is_part(tensor):
        return zero3.whole(tensor)
    found: torch.Tensor = tensor.full_tensor() if _is_part(tensor) else tensor  # type: ignore[attr-defined]
    return found


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter as a whole."""
    found: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return found


def kept(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, or of this process' part on its device."""
    if zero3.is_part(tensor):
        return tensor.ds_tensor.clone()  # type: ignore[attr-defined, no-any-return]
    return tensor.clone() if _is_part(tensor) else tensor.cpu().clone()


def put_back(tensor: torch.Tensor, copy: torch.Tensor) -> None:
    """Give a parameter's handle the value that `kept` copied."""
    if zero3.is_part(tensor):
        tensor.ds_tensor.copy_(copy)  # type: ignore[attr-defined]
        zero3.take_part(tensor)
    else:
        tensor.copy_(copy)


def assign(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Give a parameter this whole value and its dtype; each process takes its part where it is divided."""
    if zero3.is_part(parameter):
        zero3.assign(parameter, value)
    else:
        parameter.data = as_divided(value, parameter)


@contextmanager
def standing(model: nn.Module, to: Literal["read", "write"] = "read") -> Iterator[None]:
    """Inside, trained parameters that DeepSpeed divides have their whole values; all processes must come here."""
    with zero3.standing(model, to):
        yield


def largest_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The largest absolute value in parameters' handles, on any process; NaN and infinity come through."""
    if tensors and zero3.is_part(tensors[0]):
        return zero3.largest(tensors)
    return whole(nn.utils.get_total_norm(tensors, norm_type=math.inf))


def as_divided(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device of `like`, and divided as `like` is where they have the same shape."""
    if not _is_part(like) or _is_part(tensor) or tensor.shape != like.shape:
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    part: Any = like
    return distribute_tensor(tensor.to(like.device), part.device_mesh, part.placements, src_data_rank=None)


def _is_part(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, which is not imported for that: it takes a second of the start of every command."""
    return hasattr(tensor, "full_tensor")

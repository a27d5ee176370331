"""A base divided over processes (FSDP2, torch's `fully_shard`): each holds its rows of every weight.

A decoder layer is one group, put together for its forward and its backward pass; embeddings, last norm and head are
another. Weights of 4 bits are divided as numbers of their storage type, which must be a floating one: bytes would stay
whole on every process without a word. What is divided is counted, and anything less than all of it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_tune.errors import CheckFailed


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
    for name, buffer in [(name, buffer) for name, buffer in model.named_buffers() if buffer.device != device]:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, buffer.to(device))
    whole_ones = [name for name, parameter in model.named_parameters() if not _is_part(parameter)]
    if whole_ones:
        reason = f"{len(whole_ones)} weights are not divided, such as {whole_ones[0]}"
        raise CheckFailed(reason, "set hardware.strategy: ddp, or base.quantize: none")
    with torch.no_grad():  # torch finds out which group is the outermost one when it is called first
        model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=False)
    model.reshard()  # type: ignore[operator]
    return sum(1 for _ in model.parameters())


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, parts of a divided model may be called alone, as generation and evaluation do; all processes must.

    Layers are put together when they are called, the rest for the whole time.
    """
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with all of its parts, where each process holds one of them; every process must ask for it."""
    found: torch.Tensor = tensor.full_tensor() if _is_part(tensor) else tensor  # type: ignore[attr-defined]
    return found


def kept(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, or of this process' part on its device."""
    return tensor.clone() if _is_part(tensor) else tensor.cpu().clone()


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

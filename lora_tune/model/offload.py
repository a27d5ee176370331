"""What a run keeps in the machine's memory instead of the GPU's: inputs of checkpointed layers, the embedding.

A checkpointed layer keeps its input (2 bytes for each token and unit of the hidden size) from the forward pass to its
own backward pass. Here it goes to pinned memory while the layer computes, and comes back while the layer above is
computed again: two inputs are on the GPU at a time, whatever the number of layers. Copies run on a stream of their own.
Numbers do not change, not in the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lora_tune.errors import UsageError


class Kept:
    """One input in the machine's memory: `host` has its values, `here` is its copy on the GPU that is on the way."""

    def __init__(self, store: Store, tensor: torch.Tensor, below: Kept | None) -> None:
        self.store = store
        self.shape, self.device = tensor.shape, tensor.device
        self.below = below
        self.here: torch.Tensor | None = None
        self.space = store.take(tensor)
        self.host = self.space[: tensor.numel()].view(tensor.shape)

    def __del__(self) -> None:
        self.store.free.append(self.space)


@dataclass(frozen=True, slots=True)
class Stays:
    """The input of the last of the layers, which is needed first: it stays, and those below are sent for in time."""

    tensor: torch.Tensor
    below: Kept | None


class Store:
    """Inputs of checkpointed layers on their way to the machine's memory and back; one for a model.

    Memory is pinned where there is a GPU, and used again for the next micro-batch.
    """

    def __init__(self) -> None:
        self.free: list[torch.Tensor] = []
        self.moved = 0  # inputs so far
        self._top: Kept | None = None  # of the forward pass that is going on
        self._stream: Any = None

    def put(self, tensor: torch.Tensor, *, place: Literal["first", "between", "last"]) -> Any:
        """Start copying an input away; `place` is that of its layer among those that are checkpointed."""
        below, self._top = (None if place == "first" else self._top), None
        if not tensor.is_floating_point() or place == "last":
            return Stays(tensor, below)
        kept = self._top = Kept(self, tensor, below)
        self.moved += 1
        if tensor.device.type == "cuda":
            stream = self._copies(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                kept.host.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
        else:
            kept.host.copy_(tensor)
        return kept

    def get(self, kept: Kept | Stays) -> torch.Tensor:
        """An input back on its device; that of the layer below is sent for, as it is needed next."""
        found = kept.tensor if isinstance(kept, Stays) else self._arrived(kept)
        if kept.below is not None and kept.below.here is None:
            kept.below.here = self._sent_for(kept.below)
        return found

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Flat memory for at least so many values, one that is free or a new one."""
        size, dtype = tensor.numel(), tensor.dtype
        for number, space in enumerate(self.free):
            if space.dtype == dtype and space.numel() >= size:
                return self.free.pop(number)
        self.free.clear()  # too small for the micro-batches that come now
        return pinned(size, dtype) if tensor.device.type == "cuda" else torch.empty(size, dtype=dtype)

    def _arrived(self, kept: Kept) -> torch.Tensor:
        found, kept.here = kept.here if kept.here is not None else self._sent_for(kept), None
        if kept.device.type == "cuda":
            torch.cuda.current_stream(kept.device).wait_stream(self._copies(kept.device))
        return found

    def _sent_for(self, kept: Kept) -> torch.Tensor:
        """A copy on the device, begun when all that it has to compute so far is done: its memory may be in use."""
        if kept.device.type != "cuda":
            return kept.host.clone()
        stream = self._copies(kept.device)
        found = torch.empty(kept.shape, dtype=kept.host.dtype, device=kept.device)
        stream.wait_stream(torch.cuda.current_stream(kept.device))
        with torch.cuda.stream(stream):
            found.copy_(kept.host, non_blocking=True)
        found.record_stream(stream)
        return found

    def _copies(self, device: torch.device) -> Any:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream


def offload_checkpoints(model: nn.Module) -> Store:
    """Let the checkpointed layers of a model keep their inputs in the machine's memory, but for the last of them.

    To be called after `checkpoint_layers`. Loss and gradients are the same numbers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    layers = [layer for layer in layers if layer.gradient_checkpointing]
    store = Store()
    for number, layer in enumerate(layers):
        place: Literal["first", "between", "last"] = "first" if number == 0 else "between"
        place = "last" if number == len(layers) - 1 else place
        layer._gradient_checkpointing_func = _through(store, layer._gradient_checkpointing_func, place)
    return store


def _through(store: Store, checkpoint: Callable[..., Any], place: Literal["first", "between", "last"]) -> Any:
    """A checkpoint function whose inputs go through the store; what the layer itself saves is none of its business."""

    def run(function: Callable[..., Any], *inputs: Any) -> Any:
        with saved_tensors_hooks(partial(store.put, place=place), store.get):
            return checkpoint(function, *inputs)

    return run


def pinned(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory that the GPU copies from and to by itself; ordinary memory where no more can be pinned."""
    try:
        return torch.empty(size, dtype=dtype, pin_memory=True)
    except RuntimeError:
        return torch.empty(size, dtype=dtype)


class HostEmbedding(nn.Module):
    """An embedding whose table stays in the machine's memory: the rows of a batch alone go to the GPU.

    The table is neither a parameter nor a module of the model, so that nothing moves it, and `model.device` is that of
    its layers. Reading the ids waits for the GPU once in every forward pass.
    """

    def __init__(self, inner: nn.Embedding) -> None:
        super().__init__()
        self._held = (inner.to("cpu").requires_grad_(False),)
        self.num_embeddings, self.embedding_dim = inner.num_embeddings, inner.embedding_dim

    @property
    def weight(self) -> torch.Tensor:
        """The table, on the CPU."""
        return self._held[0].weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of these ids, on their device."""
        rows: torch.Tensor = self._held[0](ids.to("cpu"))
        if ids.device.type != "cuda":
            return rows
        return rows.pin_memory().to(ids.device, non_blocking=True)


def keep_embedding_on_host(model: Any) -> None:
    """Take the table of a frozen input embedding out of the GPU's memory.

    Raises:
        UsageError: the head of the model has the same table, and needs it there.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, HostEmbedding):
        return
    if head is not None and getattr(head, "weight", None) is embedding.weight:
        raise UsageError("base.embeddings: the head of this base has the same table", "set it to device")
    model.set_input_embeddings(HostEmbedding(embedding))

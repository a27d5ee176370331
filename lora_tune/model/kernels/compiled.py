"""Decoder layers through `torch.compile`, one layer's graph for all of them (regional compilation).

What the compiler fuses are PEFT's own layers: with `train.compile: layers` the functions of `fuse.py` are not used.
Layers of one kind share a graph, because weights are inputs of it; the first one has a second graph, since what it is
given needs no gradient. Shapes that change are compiled for twice, then once for all sizes; with `base.attention:
varlen` and packing every batch has one shape.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_tune.errors import UsageError
from lora_tune.model import attention
from lora_tune.model.missing import compiler_problems


def compile_layers(model: nn.Module, *, backend: str = "inductor") -> int:
    """Let every decoder layer compute compiled while a gradient is asked for in training; returns how many.

    Evaluations and answers take the layers as they are. A layer that is computed twice (checkpointed) is checkpointed
    as a whole, around the graph.

    Raises:
        UsageError: this machine lacks what compiling needs, or the model has no decoder layers that are known.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if backend == "inductor":
        device = next(model.parameters()).device.type
        if lacking := list(compiler_problems("cuda" if device == "cuda" else "cpu")):
            raise UsageError(lacking)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError("train.compile: the base has no decoder layers that are known", "set it to off")
    attention.keep_out_of_graphs(model)
    compiled: dict[type, Callable[..., Any]] = {}
    for layer in layers:
        kind = type(layer)
        if kind not in compiled:
            inner = getattr(kind.forward, "__wrapped__", kind.forward)
            with warnings.catch_warnings():  # torch deprecates some of what it imports for this itself
                warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\..*")
                compiled[kind] = torch.compile(inner, backend=backend)
        layer.forward = partial(on_forward, layer, compiled[kind])  # type: ignore[method-assign]
    return len(layers)


def on_forward(layer: Any, compiled: Callable[..., Any], *inputs: Any, **given: Any) -> Any:
    """A layer's own forward pass, or the compiled one."""
    if not (layer.training and torch.is_grad_enabled()):
        return type(layer).forward(layer, *inputs, **given)
    run = partial(compiled, layer, **given)
    # up to transformers 5.17 a layer is checkpointed around `forward`, from 5.23 on inside of it
    if layer.gradient_checkpointing and hasattr(type(layer).forward, "__wrapped__"):
        return layer._gradient_checkpointing_func(run, *inputs)
    return run(*inputs)

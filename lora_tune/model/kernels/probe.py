"""What a module computes, asked with numbers in float32, since neither names nor classes tell it.

The layers of an MLP answer with numbers of ours while it is asked, over so wide a range that a limit shows; so nothing
is dequantized, and what is compared is the one thing in between. It is asked as it is trained, too, where it may drop
some. A norm is asked with a weight of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lora_tune.model.kernels import plain
from lora_tune.model.kernels.choice import Activation

ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")
_SAME = 1e-5  # of a row, relative
_SCALES = (1.0, 30.0, 1000.0)  # of what gate and up give
_NORMED = (1e-3, 1.0, 100.0)  # of what a norm is given: next to its epsilon, and far from it


@torch.no_grad()
def activation_of(parent: nn.Module, layers: Sequence[Any]) -> Activation | None:
    """The activation of a parent that computes down(activation(gate(x)) · up(x)) and nothing else; None of another.

    `layers` are gate, up and down with adapters, or gate and up in one, and down.
    """
    device = layers[0].base_layer.weight.device
    draw = torch.Generator().manual_seed(0)
    inputs, inner = (next(iter(layer.lora_A.values())).weight.shape[1] for layer in (layers[0], layers[-1]))
    x_RH, y_RH = (torch.randn(len(_SCALES) ** 2, inputs, generator=draw).to(device) for _ in range(2))
    rows = [(gate, up) for gate in _SCALES for up in _SCALES]
    gate_RI, up_RI = (
        (torch.randn(len(rows), inner, generator=draw) * torch.tensor(scales)[:, None]).to(device)
        for scales in zip(*rows, strict=True)
    )
    answers = [gate_RI, up_RI] if len(layers) == 3 else [torch.cat([gate_RI, up_RI], dim=1)]
    found = [_between(parent, layers, x_RH, [*answers, y_RH], mode) for mode in (False, True)]
    for activation in ACTIVATIONS:
        expected_RI = plain.gated(gate_RI, up_RI, activation)
        if all(product is not None and _same(product, expected_RI) for product in found):
            return activation
    return None


def _between(
    parent: nn.Module, layers: Sequence[Any], x_RH: torch.Tensor, answers: Sequence[torch.Tensor], training: bool
) -> torch.Tensor | None:
    """What the last layer is given while the layers give these answers; None if anything else is done on the way."""
    seen: list[torch.Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(_in_mode(parent, training))
        for layer, answer in zip(layers, answers, strict=True):
            stack.enter_context(_answering(layer, answer, seen))
        try:
            y_RH = parent(x_RH.clone())
        except (TypeError, RuntimeError, ValueError, IndexError):
            return None
    whole = isinstance(y_RH, torch.Tensor) and torch.equal(y_RH, answers[-1]) and len(seen) == len(layers)
    return seen[-1] if whole and all(torch.equal(given, x_RH) for given in seen[:-1]) else None


@contextmanager
def _answering(layer: Any, answer: torch.Tensor, seen: list[torch.Tensor]) -> Iterator[None]:
    """Inside, a layer gives this answer, and what it is given is kept."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return answer.clone()

    own = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


@contextmanager
def _in_mode(parent: nn.Module, training: bool) -> Iterator[None]:
    """Inside, all modules are in this mode; afterwards modes and random states are as they were."""
    modes = {module: module.training for module in parent.modules()}
    cards = [parameter.device for parameter in parent.parameters() if parameter.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=cards), torch.autocast(cards[0].type if cards else "cpu", enabled=False):
        try:
            parent.train(training)
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@torch.no_grad()
def offset_of(module: nn.Module, weight: torch.Tensor, epsilon: float) -> float | None:
    """What is added to the weight (0 or 1) where the module computes RMSNorm; None where it computes something else."""
    if [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    draw, size = torch.Generator().manual_seed(0), weight.shape[0]
    x_RH = torch.randn(len(_NORMED), size, generator=draw).add_(0.5) * torch.tensor(_NORMED)[:, None]
    x_RH, own_H = x_RH.to(weight.device), torch.randn(size, generator=draw).to(weight.device)
    found_RH = torch.func.functional_call(module, {"weight": own_H}, (x_RH.clone(),))
    kept = module(x_RH.to(weight.dtype))
    if not all(isinstance(found, torch.Tensor) for found in (found_RH, kept)) or kept.dtype != weight.dtype:
        return None
    normal_RH = x_RH * torch.rsqrt(x_RH.square().mean(-1, keepdim=True) + epsilon)
    return next((offset for offset in (0.0, 1.0) if _same(found_RH, normal_RH * (own_H + offset))), None)


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for rounding, row by row."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return bool(((found - expected).norm(dim=-1) <= _SAME * expected.norm(dim=-1)).all())

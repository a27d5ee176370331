"""The parameters that are trained, whose gradients are let go of without a walk through the base."""

from __future__ import annotations

from torch import nn


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters that are trained; from now on `model.zero_grad()` frees their gradients and looks for no others.

    transformers calls it after every optimizer step; its own would walk all modules, 2,665 of an adapted base of 32
    layers.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def free(set_to_none: object = None) -> None:
        for parameter in trained:
            parameter.grad = None

    model.zero_grad = free  # type: ignore[method-assign]
    return trained

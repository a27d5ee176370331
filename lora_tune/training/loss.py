"""The loss of a step: cross-entropy over its trained tokens, summed, and divided by how many they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_tune.training.batches import IGNORED


def summed_loss(
    model: nn.Module, inputs: Mapping[str, Any], *, head: nn.Module, fused: str
) -> tuple[torch.Tensor, Any]:
    """Cross-entropy (nats) summed over the trained tokens of a micro-batch, and the model's outputs.

    `fused` "yes" goes through TRL's fused head. On a CPU that computes every position in float32 and costs 40 % of the
    step, so that there the model's own `head` is given the trained positions alone.
    """
    labels_BT = inputs["labels"]
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    if fused == "yes":
        outputs = model(**rest, labels=labels_BT, use_cache=False, fused_lm_head=True)
        return -outputs.log_probs.sum(), outputs
    trained_BT = labels_BT[:, 1:] != IGNORED
    with _head_sees(head, trained_BT):
        outputs = model(**rest, use_cache=False)
    targets_N = labels_BT[:, 1:][trained_BT]
    return nn.functional.cross_entropy(outputs.logits.float(), targets_N, reduction="sum"), outputs


@contextmanager
def _head_sees(head: nn.Module, trained_BT: torch.Tensor) -> Iterator[None]:
    """Inside, the output layer gets the N positions that predict a trained token, and gives logits (N, vocabulary)."""

    def choose(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][:, :-1][trained_BT], *inputs[1:])

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()

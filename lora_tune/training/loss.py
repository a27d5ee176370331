"""The loss of a step: cross-entropy over its trained tokens, summed, and divided by how many they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_tune.model.kernels.loss_head import Head, input_of, summed
from lora_tune.training.batches import IGNORED

_PREDICTS, _TARGETS = "predicts", "targets"  # of a batch: what `WithTargets` adds
Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class WithTargets:
    """A collator whose batches say which of their B·T positions predict a trained token, and which token that is.

    So they are known before the batch is on the GPU, which is not waited for.
    """

    collate: Callable[[Rows], dict[str, Any]]

    @property
    def flat(self) -> Any:
        """TRL's collator below, which puts all documents of a batch into one row."""
        return getattr(self.collate, "flat", self.collate)

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """The batch, with `predicts` and `targets`, each (N,)."""
        batch = self.collate(rows)
        predicts_N, targets_N = trained_positions(batch["labels"])
        return {**batch, _PREDICTS: predicts_N, _TARGETS: targets_N}


def trained_positions(labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions in B·T tokens that predict a trained token (N), and those tokens (N)."""
    following_BT = nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED).flatten()
    predicts_N = (following_BT != IGNORED).nonzero().squeeze(1)
    return predicts_N, following_BT[predicts_N]


def summed_loss(
    model: nn.Module, inputs: Mapping[str, Any], *, layer: nn.Module, head: Head | None
) -> tuple[torch.Tensor, Any]:
    """Cross-entropy (nats) summed over the trained tokens of a micro-batch, and the model's outputs.

    With a `head` (`find_head`) the model's output `layer` is given no position and its input goes into the loss, tile
    by tile. Without one the layer is given the trained positions alone, and the loss is that of the model's own logits.
    """
    rest = {name: value for name, value in inputs.items() if name not in ("labels", _PREDICTS, _TARGETS)}
    known = _PREDICTS in inputs
    predicts_N, targets_N = (inputs[_PREDICTS], inputs[_TARGETS]) if known else trained_positions(inputs["labels"])
    if head is None:
        with _layer_sees(layer, predicts_N):
            outputs = model(**rest, use_cache=False)
        return nn.functional.cross_entropy(outputs.logits.float(), targets_N, reduction="sum"), outputs
    with input_of(layer) as seen:
        outputs = model(**rest, use_cache=False)
    return summed(seen.pop(), head, predicts_N, targets_N), outputs


@contextmanager
def _layer_sees(layer: nn.Module, predicts_N: torch.Tensor) -> Iterator[None]:
    """Inside, the output layer gets the N positions that predict a trained token, and gives logits (N, vocabulary)."""

    def choose(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].flatten(0, 1)[predicts_N], *inputs[1:])

    handle = layer.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()

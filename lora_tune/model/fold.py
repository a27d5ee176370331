"""An adapter's update folded into one weight of its base: W + scale · B·A, DoRA's magnitudes, modules trained in full.

One matrix at a time, so that a base of any size can be folded shard by shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Layout = Literal["linear", "transposed", "embedding"]
"""How the base stores the weight: (out, in), (in, out) as GPT-2 does, or the rows of an embedding (tokens, width)."""


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter does to a weight: A (rank, in), B (out, rank); of an embedding (rank, tokens), (width, rank)."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scale: float
    layout: Layout = "linear"
    magnitude_O: torch.Tensor | None = None
    """DoRA: the length of each output row of the result."""

    def delta(self) -> torch.Tensor:
        """scale · B·A in float32, laid out as the base stores its weight."""
        product = self.scale * (self.b_OR.float() @ self.a_RI.float())
        return product if self.layout == "linear" else product.T


@dataclass(frozen=True, slots=True)
class Folds:
    """All of an adapter by the names of the base's parameters: updates, and parameters that take their place."""

    updates: Mapping[str, Update]
    replaced: Mapping[str, torch.Tensor]

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the adapter folded in, in float32; one that the adapter leaves alone as it came."""
        if name in self.replaced:
            return self.replaced[name].float()
        update = self.updates.get(name)
        if update is None:
            return weight
        folded = weight.float() + update.delta()
        if update.magnitude_O is None:
            return folded
        rows = 0 if update.layout == "transposed" else 1  # DoRA measures along the inputs of each output
        length = folded.norm(dim=rows, keepdim=True)
        magnitude = update.magnitude_O.float()
        return folded * ((magnitude[None, :] if rows == 0 else magnitude[:, None]) / length)

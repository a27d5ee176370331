"""A gated MLP with adapters in float64, and its definition, for the tests of the fused functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lora_tune.model.kernels.choice import Activation
from lora_tune.model.kernels.projections import Frozen


@dataclass
class DoubleMlp:
    """A gated MLP in float64, and its definition: gate and up from two layers, or the halves of what one gives."""

    weights: list[torch.Tensor]
    factors: list[torch.Tensor]

    @property
    def parts(self) -> list[Frozen]:
        return [Frozen(weight.to, None, 0.5) for weight in self.weights]

    def of(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        joined = len(self.weights) == 2
        gate, up = self._linear(0, x).chunk(2, dim=-1) if joined else (self._linear(0, x), self._linear(1, x))
        act = nn.functional.silu(gate) if activation == "silu" else nn.functional.gelu(gate, approximate="tanh")
        return self._linear(len(self.weights) - 1, act * up)

    def _linear(self, number: int, x: torch.Tensor) -> torch.Tensor:
        a, b = self.factors[2 * number : 2 * number + 2]
        return x @ self.weights[number].T + 0.5 * (x @ a.T) @ b.T


def a_gated_mlp(h: int, inner: int, rank: int, *, joined: bool, seed: int) -> DoubleMlp:
    """Random weights and adapters."""
    draw = torch.Generator().manual_seed(seed + 1000)
    shapes = [(2 * inner, h), (h, inner)] if joined else [(inner, h), (inner, h), (h, inner)]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    weights = [random(*shape) for shape in shapes]
    factors = [factor for out, into in shapes for factor in (random(rank, into), random(out, rank))]
    return DoubleMlp(weights, [factor.requires_grad_() for factor in factors])

"""Which base to fold an adapter into: each candidate's answers against those of the adapter as it was trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from lora_tune.model.base import compute_dtype
from lora_tune.model.fold import Folds
from lora_tune.model.merging import Divergence, divergence
from lora_tune.model.source import BaseSource
from lora_tune.model.streaming import Change, StoredWeights, as_held, quantized_names, streamed_log_probs
from lora_tune.recipe import Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Candidate = Literal["stored", "dequantized"]
"""Fold into the base as its files hold it, or into what its 4-bit weights stand for, as training saw them."""
MOST_POSITIONS = 1024  # (positions, V) in float32 are held twice; 150,000 tokens make 0.6 GB each


@dataclass(frozen=True, slots=True)
class Row:
    """A row to measure on: its ids, and which of them are answers (their loss counts)."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Fidelity:
    """One way to hold the merged model, measured: divergence from the adapter as trained, and loss on answers."""

    name: str
    divergence: Divergence
    loss: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """All candidates, the loss of the adapter as trained, and what re-quantizing the best one would cost."""

    loss_as_trained: float | None
    candidates: tuple[Fidelity, ...]
    requantized: Fidelity | None

    def best(self) -> Fidelity:
        """The candidate nearest to the adapter as trained."""
        return min(self.candidates, key=lambda found: found.divergence.kl)


def change_for(candidate: Candidate, folds: Folds, base: Base, names: frozenset[str]) -> Change:
    """The weights of the merged model before they are rounded to the dtype of the files."""
    held = as_held(base, names, dtype=compute_dtype(base))

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        if not weight.is_floating_point():
            return weight
        return folds.apply(name, held(name, weight) if candidate == "dequantized" and name in names else weight)

    return change


def compare_candidates(
    model: PreTrainedModel, source: BaseSource, stored: dict[str, str], *, folds: Folds, base: Base, rows: Sequence[Row]
) -> Comparison:
    """Measure every candidate on the same rows, one streamed pass each; `model` is a sketch, `base` as trained."""
    names = quantized_names(model) if base.quantize != "none" else frozenset()
    held = as_held(base, names, dtype=compute_dtype(base))
    chosen = list(_within(rows, MOST_POSITIONS))
    ids, pad = [row.ids for row in chosen], 0

    def answers(change: Change) -> torch.Tensor:
        return streamed_log_probs(model, StoredWeights(source.folder, stored, change=change), ids, pad_id=pad)

    reference = answers(lambda name, weight: folds.apply(name, held(name, weight)))
    found, kinds = [], ("stored", "dequantized") if names else ("stored",)
    for kind in kinds:
        fold = change_for(kind, folds, base, names)  # type: ignore[arg-type]  # of the two words
        found.append(_fidelity(kind, reference, answers(_rounded(fold)), chosen))
    requantized = None
    if names:
        best = min(found, key=lambda one: one.divergence.kl)
        fold = _rounded(change_for(best.name, folds, base, names))  # type: ignore[arg-type]
        again = answers(lambda name, weight: held(name, fold(name, weight)))
        requantized = _fidelity("requantized", reference, again, chosen)
    return Comparison(_loss(reference, chosen), tuple(found), requantized)


def distances(
    model: PreTrainedModel,
    source: BaseSource,
    stored: dict[str, str],
    *,
    folds: Folds,
    others: Mapping[str, Folds],
    base: Base,
    rows: Sequence[Row],
) -> dict[str, Divergence]:
    """How far the combination `folds` is from each of the adapters it was made of, all on the base as trained."""
    names = quantized_names(model) if base.quantize != "none" else frozenset()
    held = as_held(base, names, dtype=compute_dtype(base))
    ids = [row.ids for row in _within(rows, MOST_POSITIONS)]

    def answers(adapter: Folds) -> torch.Tensor:
        weights = StoredWeights(
            source.folder, stored, change=lambda name, weight: adapter.apply(name, held(name, weight))
        )
        return streamed_log_probs(model, weights, ids, pad_id=0)

    mixed = answers(folds)
    return {name: divergence(answers(other), mixed) for name, other in others.items()}


def _rounded(change: Change) -> Change:
    """The change, rounded to the dtype in which the weight is stored."""
    return lambda name, weight: change(name, weight).to(weight.dtype)


def _within(rows: Sequence[Row], most: int) -> Iterator[Row]:
    """The first rows, up to this many positions together; at least one."""
    left = most
    for number, row in enumerate(rows):
        if number and len(row.ids) > left:
            return
        yield Row(row.ids[:most], row.trained[:most])
        left -= len(row.ids)


def _fidelity(name: str, reference: torch.Tensor, answers: torch.Tensor, rows: Sequence[Row]) -> Fidelity:
    return Fidelity(name, divergence(reference, answers), _loss(answers, rows))


def _loss(log_probs: torch.Tensor, rows: Sequence[Row]) -> float | None:
    """Mean negative log-probability of the answers' tokens; None where no row has any."""
    losses, start = [], 0
    for row in rows:
        part = log_probs[start : start + len(row.ids)]
        start += len(row.ids)
        targets = [(place - 1, token) for place, token in enumerate(row.ids) if place and row.trained[place]]
        losses += [-float(part[place, token]) for place, token in targets]
    return sum(losses) / len(losses) if losses else None

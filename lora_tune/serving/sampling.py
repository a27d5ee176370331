"""The next token of every row of a batch, each by its own settings and its own random numbers."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lora_tune.serving.job import Row

_COLDEST = 1e-5  # of temperatures above 0: what is smaller is no number in float32


def draws_of(seed: int | None, *, count: int) -> list[float]:
    """Uniform numbers for the tokens of one answer: they depend on the seed alone."""
    generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed % 2**63)
    drawn: list[float] = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    return drawn


def choose(logits_BV: torch.Tensor, rows: Sequence[Row], *, allowed: Mapping[int, torch.Tensor]) -> list[int]:
    """A token for every row: the most likely one, or a drawn one; `allowed` (V) hides tokens from some of the rows."""
    if allowed:
        logits_BV = logits_BV.clone()
        for index, mask_V in allowed.items():
            logits_BV[index].masked_fill_(~mask_V.to(logits_BV.device), float("-inf"))
    tokens_B = logits_BV.argmax(dim=-1)
    drawn = [index for index, row in enumerate(rows) if row.job.request.sampling.temperature > 0]
    if drawn:
        tokens_B[drawn] = _drawn(logits_BV[drawn], [rows[index] for index in drawn])
    tokens: list[int] = tokens_B.tolist()
    return tokens


def _drawn(logits_BV: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """The token at which the cumulated probability passes the draw of each row (B), after top-k and top-p."""
    settings = [row.job.request.sampling for row in rows]
    device, vocabulary = logits_BV.device, logits_BV.shape[1]

    def column(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, device=device, dtype=dtype).unsqueeze(1)

    temperature_B1 = column([max(one.temperature, _COLDEST) for one in settings])
    top_p_B1 = column([one.top_p for one in settings])
    top_k_B1 = column([one.top_k or vocabulary for one in settings], torch.long)
    draw_B1 = column([row.draws[len(row.made)] for row in rows])
    highest_B1 = logits_BV.amax(dim=-1, keepdim=True).float()
    scaled_BV = (logits_BV.float() - highest_B1) / temperature_B1  # no overflow at temperatures near 0
    sorted_BV, order_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
    places_V = torch.arange(vocabulary, device=device)
    chances_BV = sorted_BV.masked_fill(places_V >= top_k_B1, float("-inf")).softmax(dim=-1)
    before_BV = chances_BV.cumsum(dim=-1) - chances_BV
    chances_BV = chances_BV.masked_fill((before_BV >= top_p_B1) & (places_V > 0), 0.0)
    edges_BV = chances_BV.cumsum(dim=-1)
    passed_B1 = torch.searchsorted(edges_BV, draw_B1 * edges_BV[:, -1:], right=True)
    last_B1 = (chances_BV > 0).sum(dim=-1, keepdim=True) - 1
    return order_BV.gather(1, torch.minimum(passed_B1, last_B1).clamp(min=0)).squeeze(1)


def log_probabilities(
    logits_BV: torch.Tensor, tokens: Sequence[int], rows: Sequence[Row]
) -> dict[int, tuple[float, list[tuple[int, float]]]]:
    """{number of the row: (log-probability of its token, the most likely tokens with theirs)}, where a row asks.

    Of the model itself, before temperature, cuts and grammar.
    """
    asked = [index for index, row in enumerate(rows) if row.job.request.sampling.logprobs is not None]
    if not asked:
        return {}
    log_probs = logits_BV[asked].float().log_softmax(dim=-1)
    own = log_probs.gather(1, torch.tensor([[tokens[index]] for index in asked], device=log_probs.device))
    most = max(rows[index].job.request.sampling.logprobs or 0 for index in asked)
    top = log_probs.topk(min(max(most, 1), log_probs.shape[1]), dim=-1)
    found = {}
    columns = (own[:, 0].tolist(), top.values.tolist(), top.indices.tolist())
    for index, value, best, ids in zip(asked, *columns, strict=True):
        count = rows[index].job.request.sampling.logprobs or 0
        found[index] = (value, list(zip(ids[:count], best[:count], strict=True)))
    return found

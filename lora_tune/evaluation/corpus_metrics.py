"""BLEU and chrF: counts of each row by sacrebleu, and the score of any sum of such counts.

Neither is a mean over rows. A row contributes its counts of n-grams, and the score is a function of their sum, so that
the bootstrap draws rows and makes the score of the whole draw again (Koehn 2004).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

ORDER = 4  # BLEU's n-grams; over shorter texts alone it is 0, whatever they say
_CHARACTERS = 6  # chrF's n-grams
_BETA = 2.0


def bleu_counts(answer: str, references: Sequence[str]) -> list[float]:
    """Length of the answer and of the nearest reference, then matches and totals of 1- to 4-grams: 10 numbers.

    sacrebleu's default tokens (13a), case kept (Post 2018).
    """
    found = _bleu().sentence_score(answer, list(references))
    return [found.sys_len, found.ref_len, *found.counts, *found.totals]


def bleu_row(answer: str, references: Sequence[str]) -> float:
    """BLEU of one row alone, over the n-grams that it is long enough for."""
    return float(_bleu().sentence_score(answer, list(references)).score)


def bleu_of(sums: np.ndarray) -> np.ndarray:
    """BLEU (...) of summed counts (..., 10), smoothed as sacrebleu does by default ("exp", Chen & Cherry 2014)."""
    answer, reference = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2 : 2 + ORDER], sums[..., 2 + ORDER :]
    missed = (matches == 0) & (totals > 0)
    halvings = np.cumsum(missed, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(missed, 1 / (2.0**halvings * totals), matches / totals)
        logs = np.where(totals > 0, np.log(shares), -np.inf)
        brevity = np.where(answer < reference, np.exp(1 - reference / answer), 1.0)
    scores = 100 * brevity * np.exp(logs.mean(axis=-1))
    return np.where(matches.any(axis=-1) & (answer > 0), scores, 0.0)


def chrf_counts(answer: str, references: Sequence[str]) -> list[float]:
    """N-grams of the answer, of the best reference and of both, for 1 to 6 characters: 18 numbers."""
    (counts,) = _chrf()._extract_corpus_statistics([answer], [[reference] for reference in references])
    return [float(count) for count in counts]


def chrf_row(answer: str, references: Sequence[str]) -> float:
    """chrF of one row alone."""
    return float(_chrf().sentence_score(answer, list(references)).score)


def chrf_of(sums: np.ndarray) -> np.ndarray:
    """chrF2 (...) of summed counts (..., 18): the F-score of mean precision and recall (Popović 2015)."""
    answer, reference, shared = (sums[..., part::3] for part in range(3))
    counted = (answer > 0) & (reference > 0)
    orders = np.maximum(counted.sum(axis=-1), 1)
    precision = (shared / np.maximum(answer, 1) * counted).sum(axis=-1) / orders
    recall = (shared / np.maximum(reference, 1) * counted).sum(axis=-1) / orders
    weighted = _BETA**2 * precision + recall
    return 100 * (1 + _BETA**2) * precision * recall / np.where(weighted > 0, weighted, 1.0)


@functools.cache
def _bleu() -> BLEU:
    return BLEU(effective_order=True)


@functools.cache
def _chrf() -> CHRF:
    return CHRF(char_order=_CHARACTERS, word_order=0, beta=int(_BETA))

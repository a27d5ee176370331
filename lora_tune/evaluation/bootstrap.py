"""Paired statistics of adapter against base: how far a difference would move with other rows, and a test of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lora_tune.evaluation.metrics import RowScores, ratio

RESAMPLES = 10_000
_ELEMENTS = 2_000_000  # resampled row numbers held at once: 16 MB
_ROUNDING = 1e-9  # of a score: differences that are nearer than this are equal


def paired_interval(
    base: RowScores, adapter: RowScores, *, seed: int, resamples: int = RESAMPLES, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of score(adapter) - score(base) over the same rows (Efron & Tibshirani 1993, ch. 13).

    Rows are drawn with replacement, the same rows for both sides; a score is made again of the drawn rows' sums, so
    that a token-weighted loss or BLEU stays one. The generator is its own: the same seed gives the same interval and no
    other random number is touched. Raises ValueError without rows or with rows of different number.
    """
    rows = _rows(base, adapter)
    generator = np.random.default_rng(seed)
    differences = []
    for count in _chunks(resamples, rows):
        drawn_RN = generator.integers(0, rows, size=(count, rows))
        drawn_RN += rows * np.arange(count)[:, None]
        times_RN = np.bincount(drawn_RN.reshape(-1), minlength=count * rows).reshape(count, rows).astype(np.float64)
        differences.append(adapter.combine(times_RN @ adapter.sums) - base.combine(times_RN @ base.sums))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(differences), [tail, 1 - tail])
    return float(low), float(high)


def paired_p_value(base: RowScores, adapter: RowScores, *, seed: int, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value of a paired test that adapter and base do not differ.

    Where every row scores 0 or 1: McNemar's exact test (1947), the binomial over the rows that changed. Else the sides
    of rows are swapped at random (Fisher 1935; Noreen 1989 for BLEU and its like), in all 2**N ways where these are no
    more than `resamples`. Raises ValueError as `paired_interval` does.
    """
    from scipy import stats

    rows = _rows(base, adapter)
    changes_NK = adapter.sums - base.sums
    if not changes_NK.any() or rows == 1:
        return 1.0  # of one row, both ways of swapping are as far from zero
    mean = base.combine is ratio and np.array_equal(base.sums[:, 1], adapter.sums[:, 1])
    if mean and {*base.rows, *adapter.rows} <= {0.0, 1.0} and (base.sums[:, 1] == 1).all():
        gained, lost = int((changes_NK[:, 0] > 0).sum()), int((changes_NK[:, 0] < 0).sum())
        return float(stats.binomtest(gained, gained + lost).pvalue)
    if mean:
        found = stats.permutation_test(
            (changes_NK[:, 0],),
            lambda signed, axis: signed.sum(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=resamples - 1,
            batch=max(1, _ELEMENTS // rows),
            rng=np.random.default_rng(seed),
        )
        return min(1.0, float(found.pvalue))
    return _swapped(base, adapter, changes_NK, generator=np.random.default_rng(seed), resamples=resamples)


def _swapped(
    base: RowScores, adapter: RowScores, changes_NK: np.ndarray, *, generator: np.random.Generator, resamples: int
) -> float:
    """The share of swaps whose difference is at least as large as the one found, for scores that are no means."""
    rows = len(changes_NK)
    low_K, high_K = base.sums.sum(axis=0), adapter.sums.sum(axis=0)
    combine: Callable[[np.ndarray], np.ndarray] = base.combine
    measured = abs(float(combine(high_K) - combine(low_K)))
    at_least = measured - _ROUNDING * max(1.0, measured)
    every_way = 2**rows <= resamples
    extreme = 0
    numbers = np.arange(2**rows if every_way else resamples - 1)
    start = 0
    for count in _chunks(len(numbers), rows):
        if every_way:
            swaps_RN = (numbers[start : start + count, None] >> np.arange(rows)) & 1
        else:
            swaps_RN = generator.integers(0, 2, size=(count, rows))
        moved_RK = swaps_RN.astype(np.float64) @ changes_NK
        extreme += int((np.abs(combine(high_K - moved_RK) - combine(low_K + moved_RK)) >= at_least).sum())
        start += count
    return extreme / len(numbers) if every_way else (extreme + 1) / (len(numbers) + 1)


def _rows(base: RowScores, adapter: RowScores) -> int:
    rows = len(base.rows)
    if not rows or len(adapter.rows) != rows:
        raise ValueError(f"as many rows on both sides, and at least one, got {rows} and {len(adapter.rows)}")
    return rows


def _chunks(resamples: int, rows: int) -> Iterator[int]:
    """Numbers of resamples that are held at once."""
    most = max(1, _ELEMENTS // rows)
    for start in range(0, resamples, most):
        yield min(most, resamples - start)

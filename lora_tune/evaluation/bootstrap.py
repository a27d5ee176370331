"""Paired statistics of adapter against base: how far a difference would move with other rows, and a test of it."""

from __future__ import annotations

import numpy as np

from lora_tune.evaluation.metrics import RowScores

RESAMPLES = 10_000
_ELEMENTS = 2_000_000  # resampled row numbers held at once: 16 MB


def paired_interval(
    base: RowScores, adapter: RowScores, *, seed: int, resamples: int = RESAMPLES, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of score(adapter) - score(base) over the same rows (Efron & Tibshirani 1993, ch. 13).

    Rows are drawn with replacement, the same rows for both sides; a score is recomputed as the ratio of the sums of
    values and weights, so that a token-weighted loss stays one. The generator is its own: the same seed gives the
    same interval and no other random number is touched. Raises ValueError without rows or with rows of different
    number.
    """
    rows = len(base.values)
    if not rows or len(adapter.values) != rows:
        raise ValueError(f"as many rows on both sides, and at least one, got {rows} and {len(adapter.values)}")
    sums = np.array([base.values, base.weights, adapter.values, adapter.weights], dtype=np.float64)
    generator = np.random.default_rng(seed)
    differences = []
    chunk = max(1, _ELEMENTS // rows)
    for start in range(0, resamples, chunk):
        drawn = generator.integers(0, rows, size=(min(chunk, resamples - start), rows))
        base_values, base_weights, adapter_values, adapter_weights = (side[drawn].sum(axis=1) for side in sums)
        differences.append(adapter_values / adapter_weights - base_values / base_weights)
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(differences), [tail, 1 - tail])
    return float(low), float(high)


def paired_p_value(base: RowScores, adapter: RowScores, *, seed: int, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value of a paired test that adapter and base do not differ.

    Where every row scores 0 or 1: McNemar's exact test (1947), the binomial over rows that changed. Else the sides of
    rows are swapped at random (Fisher 1935), all 2**N ways where they are few. Raises ValueError as `paired_interval`.
    """
    from scipy import stats

    rows = len(base.values)
    if not rows or len(adapter.values) != rows:
        raise ValueError(f"as many rows on both sides, and at least one, got {rows} and {len(adapter.values)}")
    differences = np.asarray(adapter.values) - np.asarray(base.values)
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    if not gained + lost:
        return 1.0
    if {*base.values, *adapter.values} <= {0.0, 1.0}:
        return float(stats.binomtest(gained, gained + lost).pvalue)
    found = stats.permutation_test(
        (differences,),
        lambda signed, axis: signed.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples - 1,
        batch=max(1, _ELEMENTS // rows),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)

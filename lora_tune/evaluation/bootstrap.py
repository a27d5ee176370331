"""Paired bootstrap: how far a difference between adapter and base would move with other held-out rows."""

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

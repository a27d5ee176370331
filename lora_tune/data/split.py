"""Which rows are trained and which are held out: by content, so that the order of the rows changes nothing.

A row's rank is a hash of the seed and its content. `max_rows` takes the lowest ranks, `hold_out` the lowest
of those. All copies of one content have one rank and fall on the same side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_tune.data.store import ConversationStore
from lora_tune.recipe import Mixing
from lora_tune.recipe_values import share_of


def ranks(digests: np.ndarray, *, seed: int) -> np.ndarray:
    """A pseudo-random uint64 for each of the content hashes (N,) of 16 bytes; equal content, equal rank.

    Source: the finalizer of SplitMix64 (Steele, Lea, Flood 2014) over hash and seed.
    """
    words = digests.view(np.uint64).reshape(-1, 2)
    with np.errstate(over="ignore"):
        x = (
            words[:, 0]
            ^ (words[:, 1] * np.uint64(0x9E3779B97F4A7C15))
            ^ (np.uint64(seed) * np.uint64(0xD1342543DE82EF95))
        )
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def at_most(store: ConversationStore, caps: Sequence[int | None], *, seed: int) -> np.ndarray:
    """Indices of the rows that the `max_rows` of their sources admit, in the order of the store."""
    taken = np.ones(len(store), dtype=bool)
    order = ranks(store.digests, seed=seed)
    for source, cap in enumerate(caps):
        rows = np.flatnonzero(store.sources == source)
        if cap is not None and len(rows) > cap:
            taken[rows[np.argsort(order[rows], kind="stable")[cap:]]] = False
    return np.flatnonzero(taken)


def hold_out_some(digests: np.ndarray, amount: int | str, *, seed: int) -> np.ndarray:
    """True (N,) for the rows to hold out: `amount` of them, or that share, at least one where a share is asked for.

    A content with more copies than rows are still wanted is passed over, so that fewer may be held out; at least one
    row is left to train on.
    """
    held_out = np.zeros(len(digests), dtype=bool)
    wanted = share_of(amount, len(digests))
    if isinstance(amount, str) and float(amount.rstrip(" %")) > 0:
        wanted = max(wanted, 1)
    wanted = min(wanted, len(digests) - 1)
    if wanted <= 0:
        return held_out
    _, first, group, sizes = np.unique(digests, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, ranks(digests[first], seed=seed)))
    chosen = np.zeros(len(sizes), dtype=bool)
    for number in order:
        if sizes[number] <= wanted:
            chosen[number] = True
            wanted -= int(sizes[number])
            if not wanted:
                break
    return chosen[group.reshape(-1)]


def repeats(digests: np.ndarray) -> np.ndarray:
    """True (N,) for each row whose content has stood in an earlier row."""
    _, first = np.unique(digests, return_index=True)
    repeated = np.ones(len(digests), dtype=bool)
    repeated[first] = False
    return repeated


def contradictions(store: ConversationStore, rows: np.ndarray) -> np.ndarray:
    """Indices (of the store) of rows whose prompt has stood in an earlier row of `rows` with another answer."""
    _, first = np.unique(store.digests[rows], return_index=True)
    distinct = rows[np.sort(first)]
    _, first = np.unique(store.prompts[distinct], return_index=True)
    later = np.ones(len(distinct), dtype=bool)
    later[first] = False
    return distinct[later]


def mixing_weights(rows: Sequence[int], mixing: Mixing) -> list[float]:
    """How often each source's rows stand in an epoch, by the number of its rows (sources,).

    Shares go with min(rows, cap) ** (1 / temperature); an epoch has as many rows as the capped sources together.
    Source: Raffel et al. 2020 (T5, arXiv 1910.10683), section 3.5.2; Wei et al. 2022 (FLAN, arXiv 2109.01652), 2.3.
    """
    if mixing.cap is None and mixing.temperature == 1:
        return [float(count > 0) for count in rows]
    capped = np.minimum(rows, mixing.cap or np.inf).astype(np.float64)
    rates = np.where(capped > 0, capped, 0.0) ** (1 / mixing.temperature)
    wanted = rates / max(rates.sum(), 1e-300) * capped.sum()
    return [float(weight) for weight in wanted / np.maximum(rows, 1)]


def epoch_copies(sources: np.ndarray, weights: Sequence[float], *, seed: int) -> np.ndarray:
    """How often each row (N,) stands in one epoch: `weight` times on average, rows x weight (rounded) per source."""
    copies = np.zeros(len(sources), dtype=np.int64)
    for source, weight in enumerate(weights):
        rows = np.flatnonzero(sources == source)
        copies[rows] = int(weight)
        rest = int(len(rows) * weight + 0.5) - len(rows) * int(weight)
        copies[np.random.default_rng((seed, source)).permutation(rows)[:rest]] += 1
    return copies

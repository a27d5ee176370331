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

_AT_ONCE = 1 << 16  # rows whose temporary arrays are in memory
_HALVES = np.dtype([("first", "<u8"), ("second", "<u8")])  # of a content hash


def ranks(digests: np.ndarray, *, seed: int) -> np.ndarray:
    """A pseudo-random uint64 for each of the content hashes (N,) of 16 bytes; equal content, equal rank.

    Source: the finalizer of SplitMix64 (Steele, Lea, Flood 2014) over hash and seed.
    """
    found = np.empty(len(digests), dtype=np.uint64)
    for start in range(0, len(digests), _AT_ONCE):
        block = digests[start : start + _AT_ONCE].view(_HALVES)
        with np.errstate(over="ignore"):
            x = (
                block["first"]
                ^ (block["second"] * np.uint64(0x9E3779B97F4A7C15))
                ^ (np.uint64(seed) * np.uint64(0xD1342543DE82EF95))
            )
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            found[start : start + _AT_ONCE] = x ^ (x >> np.uint64(31))
    return found


def at_most(store: ConversationStore, caps: Sequence[int | None], *, seed: int) -> np.ndarray:
    """Indices (int32) of the rows that the `max_rows` of their sources admit, in the order of the store."""
    if all(cap is None for cap in caps):
        return np.arange(len(store), dtype=np.int32)
    taken = np.ones(len(store), dtype=bool)
    order = ranks(store.digests, seed=seed)
    for source, cap in enumerate(caps):
        rows = np.flatnonzero(store.sources == source)
        if cap is not None and len(rows) > cap:
            taken[rows[np.argsort(order[rows], kind="stable")[cap:]]] = False
    return np.flatnonzero(taken).astype(np.int32)


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
    rank = ranks(digests, seed=seed)
    looked_at = min(4 * wanted + 1000, len(digests))
    while True:  # the rows of lowest rank, with all their copies; more of them where groups were passed over
        most = np.partition(rank, looked_at - 1)[looked_at - 1]
        lowest = np.flatnonzero(rank <= most)
        chosen, left = _lowest_groups(digests[lowest], rank[lowest], wanted)
        if not left or len(lowest) == len(digests):
            held_out[lowest[chosen]] = True
            return held_out
        looked_at = min(8 * looked_at, len(digests))


def _lowest_groups(digests: np.ndarray, rank: np.ndarray, wanted: int) -> tuple[np.ndarray, int]:
    """True (N,) for the rows of the groups of equal content that are chosen, lowest rank first; how many are wanted
    beyond those."""
    _, first, group, sizes = np.unique(digests, return_index=True, return_inverse=True, return_counts=True)
    chosen = np.zeros(len(sizes), dtype=bool)
    for number in np.lexsort((first, rank[first])):
        if sizes[number] <= wanted:
            chosen[number] = True
            wanted -= int(sizes[number])
            if not wanted:
                break
    return chosen[group.reshape(-1)], wanted


def _not_alone(words: np.ndarray) -> np.ndarray:
    """Indices of the numbers (N,) that stand more than once, in order; 8 bytes a number in memory for a moment."""
    ordered = np.sort(words)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    return among(words, twice)


def among(words: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Indices of the numbers (N,) that are `wanted` (sorted), in order."""
    found = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(words) if len(wanted) else 0, _AT_ONCE):
        block = words[start : start + _AT_ONCE]
        place = np.minimum(np.searchsorted(wanted, block), len(wanted) - 1)
        found.append(start + np.flatnonzero(wanted[place] == block))
    return np.concatenate(found)


def first_halves(digests: np.ndarray) -> np.ndarray:
    """The first 8 bytes of content hashes as numbers, (N,) uint64: equal content, equal number; not the reverse."""
    words: np.ndarray = digests.view(_HALVES)["first"]
    return words


def _later(values: np.ndarray, words: np.ndarray) -> np.ndarray:
    """True (N,) for each value that has stood before; `words` (N,) are equal wherever values are."""
    repeated = np.zeros(len(values), dtype=bool)
    some = _not_alone(words)
    _, first = np.unique(values[some], return_index=True)
    repeated[some] = True
    repeated[some[first]] = False
    return repeated


def repeats(digests: np.ndarray) -> np.ndarray:
    """True (N,) for each row whose content has stood in an earlier row."""
    return _later(digests, first_halves(digests))


def contradictions(store: ConversationStore, rows: np.ndarray, repeated: np.ndarray) -> np.ndarray:
    """Indices (of the store) of rows whose prompt has stood in an earlier row of `rows` with another answer.

    `repeated` are the `repeats` of these rows.
    """
    distinct = rows[~repeated]
    prompts = store.prompts[distinct]
    return distinct[_later(prompts, prompts)]


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
    copies = np.zeros(len(sources), dtype=np.int32)
    for source, weight in enumerate(weights):
        rows = np.flatnonzero(sources == source)
        copies[rows] = int(weight)
        rest = int(len(rows) * weight + 0.5) - len(rows) * int(weight)
        if rest:
            copies[np.random.default_rng((seed, source)).permutation(rows)[:rest]] += 1
    return copies

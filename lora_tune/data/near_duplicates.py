"""Near duplicates: rows that share most of their words in order, found by MinHash without comparing all pairs.

The similarity of two rows is the share of their 3-word shingles that they have in common (Jaccard). 128 minima of
hashes estimate it within about 0.04; rows that agree in one of 32 bands of 4 minima are compared. A pass of its own,
because it takes longer than reading the data.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import numpy as np

from lora_tune.data.conversation import Conversation
from lora_tune.data.store import StoredConversations

SIMILAR = 0.8  # of the shingles
_SHINGLE_WORDS, _MINIMA, _BAND = 3, 128, 4
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class NearDuplicates:
    """How many trained rows (exact duplicates aside) are near an earlier one, held-out rows near a trained one.

    `first` is a pair of places (`file:line`) of each kind, the earlier or trained row second.
    """

    train: int
    held_out: int
    seconds: float
    first_train: tuple[str, str] | None = None
    first_held_out: tuple[str, str] | None = None


def near_duplicates(train: StoredConversations, held_out: StoredConversations) -> NearDuplicates:
    """Count near-equal rows within `train`, and between `held_out` and `train`."""
    started = time.perf_counter()
    train, held_out = _distinct(train), _distinct(held_out)
    words: dict[str, int] = {}
    signatures = np.concatenate([_signatures(train, words), _signatures(held_out, words)])
    is_held_out = np.arange(len(signatures)) >= len(train)
    within: dict[int, int] = {}
    across: dict[int, int] = {}
    for band in range(0, _MINIMA, _BAND):
        for one, other in _candidates(signatures[:, band : band + _BAND], is_held_out):
            near = (signatures[one] == signatures[other]).mean(axis=1) >= SIMILAR
            for a, b in zip(one[near].tolist(), other[near].tolist(), strict=True):
                (across if is_held_out[a] else within).setdefault(a, b)

    def places(found: dict[int, int]) -> tuple[str, str] | None:
        if not found:
            return None
        a = min(found)
        return _place(train, held_out, a), _place(train, held_out, found[a])

    seconds = time.perf_counter() - started
    return NearDuplicates(len(within), len(across), seconds, places(within), places(across))


def _place(train: StoredConversations, held_out: StoredConversations, row: int) -> str:
    rows, index = (train, row) if row < len(train) else (held_out, row - len(train))
    return ":".join(map(str, rows.place(index)))


def _distinct(rows: StoredConversations) -> StoredConversations:
    _, first = np.unique(rows.digests, return_index=True)
    return StoredConversations(rows.store, rows.indices[np.sort(first)])


def _signatures(rows: StoredConversations, words: dict[str, int]) -> np.ndarray:
    """MinHash signatures (N, 128) uint32. Source: Broder, "On the resemblance and containment of documents", 1997."""
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 1 << 63, size=_MINIMA, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    mixers = rng.integers(0, 1 << 63, size=_SHINGLE_WORDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    found = np.zeros((len(rows), _MINIMA), dtype=np.uint32)
    for number, conversation in enumerate(rows):
        ids = [words.setdefault(word, len(words) + 1) for word in _WORD.findall(_text_of(conversation).lower())]
        ids += [0] * (_SHINGLE_WORDS - len(ids))
        with np.errstate(over="ignore"):
            word = np.array(ids, dtype=np.uint64)
            count = len(word) - _SHINGLE_WORDS + 1
            shingles = sum(word[i : i + count] * mixers[i] for i in range(_SHINGLE_WORDS))
            shingles ^= shingles >> np.uint64(29)
            hashes = (shingles[:, None] * factors[None, :]) >> np.uint64(32)
        found[number] = hashes.min(axis=0)
    return found


def _text_of(conversation: Conversation) -> str:
    return conversation.text or "\n".join(message.content for message in conversation.messages)


def _candidates(band: np.ndarray, is_held_out: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rows, trained rows to compare them with): the first of the bucket, and the one before."""
    with np.errstate(over="ignore"):
        keys = band[:, 0].astype(np.uint64)
        for column in range(1, band.shape[1]):
            keys = keys * np.uint64(0x9E3779B97F4A7C15) + band[:, column]
    order = np.lexsort((is_held_out, keys))  # in a bucket the trained rows come first, in the order of the data
    same = keys[order][1:] == keys[order][:-1]
    starts = np.concatenate([[True], ~same]) if len(order) else np.zeros(0, bool)
    first = np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0)) if len(order) else starts.astype(int)
    trained = np.where(is_held_out[order], 0, np.arange(len(order)))
    last_trained = np.maximum.accumulate(trained) if len(order) else trained
    before = np.where(is_held_out[order], last_trained, np.arange(len(order)) - 1)
    pairs = []
    for other in (first, before):
        usable = ~starts & (other >= first) & ~is_held_out[order[other]]
        pairs.append((order[usable], order[other[usable]]))
    return pairs

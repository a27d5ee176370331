"""Packing: documents (token rows) into sequences of at most max_length tokens.

    documents   a a a a a   b b   c c c   d          max_length 6
    sequences   a a a a a d | c c c b b
    positions   0 1 2 3 4 0 | 0 1 2 0 1               restart at each document: that isolates them

SFTTrainer's padding-free collator makes the positions from `seq_lengths`; transformers builds the block mask from them
(sdpa, eager) or hands the lengths to flash attention. With a key-value cache it does not, and documents see each
other without a word: a forward pass over packed rows needs `use_cache=False`, as SFTTrainer's has.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np

_AT_ONCE = 1 << 16


def best_fit_decreasing(lengths: np.ndarray, *, max_length: int) -> list[array[int]]:
    """Indices of `lengths` (N,) in sequences whose lengths sum up to at most `max_length`.

    Longest first, each into the fullest sequence that still has room; O(N) with a bit per free length. At most 11/9 of
    the optimal number of sequences plus one.

    Raises: ValueError for a length that is 0 or above max_length.
    Source: Johnson, "Near-optimal bin packing algorithms", 1973 (best fit decreasing).
    """
    if len(lengths) and (lengths.min() < 1 or lengths.max() > max_length):
        raise ValueError(f"lengths must be 1 to {max_length}, got {lengths.min()} to {lengths.max()}")
    sequences: list[array[int]] = []  # 4 bytes a document; lists of Python's numbers take ten times as much
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # sequences by tokens left
    rooms = 0  # bit r: some sequence has r tokens left
    for index in _numbers(np.argsort(-lengths, kind="stable")):
        length = int(lengths[index])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            sequences[number].append(index)
        else:
            room, number = max_length, len(sequences)
            sequences.append(array("i", [index]))
        if left := room - length:
            with_room[left].append(number)
            rooms |= 1 << left
    return sequences


def _numbers(values: np.ndarray) -> Iterator[int]:
    """The values as Python's numbers, some at a time."""
    for start in range(0, len(values), _AT_ONCE):
        yield from values[start : start + _AT_ONCE].tolist()


def pack(lengths: np.ndarray, alone: np.ndarray, *, max_length: int, seed: int) -> list[array[int]]:
    """Sequences of one epoch, as indices of documents, in an order shuffled by `seed`.

    `lengths` (N,) int; `alone` (N,) bool: this document shares its sequence with no other.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))  # equal lengths are packed in an order that the seed decides
    together = order[~alone[order]]
    single = order[alone[order]]
    groups = best_fit_decreasing(lengths[together], max_length=max_length)
    sequences = [array("i", together[np.frombuffer(group, np.intc)].astype(np.intc).tobytes()) for group in groups]
    sequences += [array("i", [index]) for index in _numbers(single)]
    return [sequences[i] for i in rng.permutation(len(sequences))]

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
from dataclasses import dataclass

import numpy as np

_AT_ONCE = 1 << 16


@dataclass(frozen=True, eq=False)
class Packed:
    """Sequences of documents: the i-th holds those at `indices[ends[i]:ends[i + 1]]`.

    `indices` (N,) int32, `ends` (S + 1,) int64: 4 bytes a document and 8 a sequence.
    """

    indices: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        for number in range(len(self)):
            yield self.indices[self.ends[number] : self.ends[number + 1]]


def best_fit_decreasing(lengths: np.ndarray, *, max_length: int) -> Packed:
    """Indices of `lengths` (N,) in sequences whose lengths sum up to at most `max_length`.

    Longest first, each into the fullest sequence that still has room; O(N) with a bit per free length. At most 11/9 of
    the optimal number of sequences plus one.

    Raises: ValueError for a length that is 0 or above max_length.
    Source: Johnson, "Near-optimal bin packing algorithms", 1973 (best fit decreasing).
    """
    if len(lengths) and (lengths.min() < 1 or lengths.max() > max_length):
        raise ValueError(f"lengths must be 1 to {max_length}, got {lengths.min()} to {lengths.max()}")
    counts = np.zeros(max_length + 1, dtype=np.int64)
    for start in range(0, len(lengths), _AT_ONCE):
        counts += np.bincount(lengths[start : start + _AT_ONCE], minlength=max_length + 1)
    # in the order in which documents are placed: the sequence that the next ones go to, and how many of them
    numbers, amounts = array("i"), array("i")
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # sequences by tokens left
    rooms = opened = 0  # bit r of rooms: some sequence has r tokens left
    for length in np.flatnonzero(counts)[::-1].tolist():
        waiting = int(counts[length])
        while waiting:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                number = with_room[room].pop()
                if not with_room[room]:
                    rooms ^= 1 << room
            else:
                room, number = max_length, opened
                opened += 1
            amount = min(waiting, room // length)  # it stays the fullest one that has room for this length
            numbers.append(number)
            amounts.append(amount)
            waiting -= amount
            if left := room - amount * length:
                with_room[left].append(number)
                rooms |= 1 << left
    order = _ordered(max_length - lengths, counts[::-1])
    sizes = np.zeros(opened, dtype=np.int64)
    np.add.at(sizes, np.frombuffer(numbers, np.intc), np.frombuffer(amounts, np.intc))
    places = _ordered(np.repeat(np.frombuffer(numbers, np.intc), np.frombuffer(amounts, np.intc)), sizes)
    return Packed(order[places], _ends(sizes))


def _ordered(keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Indices (N,) int32 that sort the numbers `keys`, each of which stands `counts[key]` times; equal ones in order.

    As a stable argsort, in 4 bytes a number instead of up to 16.
    """
    found = np.empty(len(keys), dtype=np.int32)
    starts = np.cumsum(counts) - counts  # where the next index of a key goes
    for start in range(0, len(keys), _AT_ONCE):
        block = keys[start : start + _AT_ONCE]
        order = np.argsort(block, kind="stable")
        ordered = block[order]
        first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        runs = np.diff(first, append=len(ordered))
        groups = ordered[first]
        found[np.repeat(starts[groups] - first, runs) + np.arange(len(ordered))] = order + start
        starts[groups] += runs
    return found


def _ends(sizes: np.ndarray) -> np.ndarray:
    """Where each of the runs of `sizes` (S,) ends, after a 0: (S + 1,) int64."""
    found = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=found[1:])
    return found


def pack(lengths: np.ndarray, alone: np.ndarray, *, max_length: int, seed: int) -> Packed:
    """Sequences of one epoch, as indices of documents, in an order shuffled by `seed`.

    `lengths` (N,) int; `alone` (N,) bool: this document shares its sequence with no other.
    """
    rng = np.random.default_rng(seed)
    order = _shuffled(len(lengths), rng)  # equal lengths are packed in an order that the seed decides
    single = order[alone[order]]
    together = order[~alone[order]] if len(single) else order
    groups = best_fit_decreasing(lengths[together], max_length=max_length)
    documents = np.concatenate([together[groups.indices], single])
    sizes = np.concatenate([np.diff(groups.ends), np.ones(len(single), dtype=np.int64)])
    starts = np.cumsum(sizes) - sizes
    del order, single, together, groups
    turn = _shuffled(len(sizes), rng)
    ends = _ends(sizes[turn])
    moves = np.repeat((starts[turn] - ends[:-1]).astype(np.int32), sizes[turn])
    moves += np.arange(len(moves), dtype=np.int32)
    return Packed(documents[moves], ends)


def _shuffled(count: int, rng: np.random.Generator) -> np.ndarray:
    """`rng.permutation(count)`, in half of its memory."""
    found = np.arange(count, dtype=np.int32)
    rng.shuffle(found)
    return found

"""Contamination: passages that evaluated rows share with training rows, and evaluated sources that were trained on.

An evaluated row is touched where a passage of n words (lower-cased, without punctuation) stands in a training row as
well; n is the length of the shortest rows, at least 8 and at most 13 words. A row of fewer words is looked for as a
whole. Passages that stand in more than ten training rows are a template's wording, and count for nothing.

Source: Brown et al. 2020 (GPT-3, arXiv 2005.14165), appendix C, for all of this; the bound of 70 % above which a row
counts as mostly seen is that of Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), section 8, there for 8 words.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_tune.data.cache import WORTH_ROWS, code_sha256, entry, keep_if_there_is_room, valid_note
from lora_tune.data.conversation import Conversation
from lora_tune.data.ledger import place_of
from lora_tune.data.sources import SourceIdentity
from lora_tune.data.store import StoredConversations
from lora_tune.errors import Problem

SHORTEST, LONGEST = 8, 13  # words of a passage
COMMON = 10  # training rows above which a passage is a template's wording
MOSTLY = 0.7  # of a row's passages
_WORDS_AT_ONCE = 1_000_000
_SHOWN_CHARACTERS = 300
_FILTER_BITS = 22
# a word of letters and digits; scripts without spaces count every letter as a word
_WORD = re.compile(
    r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class SharedRow:
    """An evaluated row at `place` (file:line): the share of its passages that stand in training rows, the training row
    with most of them, and the row's longest piece that was seen (its words)."""

    place: str
    share: float
    trained: str
    words: str


@dataclass(frozen=True, slots=True)
class Overlap:
    """How many of `rows` evaluated rows are touched (share a passage of `passage` words) and mostly seen (70 % of their
    passages), against `trained` training rows. `common` passages were left out as a template's wording."""

    passage: int
    rows: int
    trained: int
    touched: int
    mostly: int
    common: int
    worst: tuple[SharedRow, ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The numbers and the worst rows, without the time, so that the same data give the same account."""
        return {key: value for key, value in asdict(self).items() if key != "seconds"}

    def warnings(self) -> list[Problem]:
        """A warning where rows were mostly seen in training."""
        if not self.mostly:
            return []
        first = self.worst[0]
        reason = (
            f"{self.mostly:,} of {self.rows:,} held-out rows share {MOSTLY:.0%} or more of their passages of "
            f"{self.passage} words with training rows ({first.place} with {first.trained}): scores may flatter"
        )
        return [Problem(reason, "remove them on one side", severity="warning")]


def overlap(
    train: Iterable[Conversation], evaluated: Sequence[Conversation], *, passage: int | None = None, shown: int = 10
) -> Overlap:
    """Look for the passages of `evaluated` rows in the `train` rows; `passage` words long, else as the rows are.

    Reads each row once: about a second for 15,000 rows of 120 words. System turns are left out. `shown` rows with the
    highest share are returned, longest first among equals.
    """
    started = time.perf_counter()
    words: dict[str, int] = {}
    rows = [[words.setdefault(word, len(words) + 1) for word in _words(row)] for row in evaluated]
    size = passage or _passage([len(row) for row in rows])
    looked_for = _Passages(rows, size, len(words))
    places: list[str] | StoredConversations = train if isinstance(train, StoredConversations) else []
    trained = 0
    for first, block in _blocks(train, words, places):
        looked_for.search(block, first_row=first)
        trained = first + len(block)
    shares, owners, common = looked_for.found()
    touched = np.flatnonzero(shares > 0)
    lengths = np.array([-len(row) for row in rows])  # longest first
    order = touched[np.lexsort((touched, lengths[touched], -shares[touched]))][:shown]
    worst = tuple(
        SharedRow(
            place_of(evaluated[row].file, evaluated[row].line),
            round(float(shares[row]), 4),
            _place(places, int(owners[row])),
            looked_for.text(row, _words(evaluated[row])),
        )
        for row in order.tolist()
    )
    mostly = int((shares >= MOSTLY).sum())
    seconds = time.perf_counter() - started
    return Overlap(size, len(rows), trained, len(touched), mostly, common, worst, seconds)


def known_overlap(train: StoredConversations, evaluated: StoredConversations) -> Overlap:
    """As `overlap`; what was found between the same rows before is read from the cache."""
    if len(train) < WORTH_ROWS:
        return overlap(train, evaluated)
    parts = (code_sha256(), train.content_sha256(), evaluated.content_sha256())
    key = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:40]
    with suppress(OSError), entry("overlap", key) as path:
        if valid_note(path) is not None:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return Overlap(**{**stored, "worst": tuple(SharedRow(**row) for row in stored["worst"])})
    found = overlap(train, evaluated)

    def write(temporary: Path) -> dict[str, Any]:
        temporary.write_text(json.dumps(asdict(found)), encoding="utf-8")
        return {}

    with suppress(OSError), entry("overlap", key) as path:
        keep_if_there_is_room(path, write)
    return found


def trained_sources(evaluated: Sequence[SourceIdentity], trained: Mapping[str, str]) -> list[Problem]:
    """An error for every evaluated source whose content was trained on; `trained`: {sha256 of the content: name}."""
    fix = "evaluate on rows that were held out"
    return [
        Problem(
            f"this data was trained on (as {trained[source.sha256]}, sha256 {source.sha256[:16]}…)", fix, source.name
        )
        for source in evaluated
        if source.sha256 in trained
    ]


class _Passages:
    """The passages of the evaluated rows, and where training rows hold them."""

    def __init__(self, rows: Sequence[Sequence[int]], size: int, vocabulary: int) -> None:
        self._codes = np.random.default_rng(0).integers(1, 1 << 63, size=vocabulary + 1, dtype=np.uint64)
        self._size = size
        own, keys = [], []
        for number, row in enumerate(rows):
            length = min(size, len(row))
            if length:
                hashes = _hashes(self._codes[np.array(row)], length) + np.uint64(length)
                own.append(np.full(len(hashes), number))
                keys.append(hashes)
        self._rows = len(rows)
        self._own = np.concatenate(own) if own else np.zeros(0, np.int64)
        flat = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
        self._keys, self._place = np.unique(flat, return_inverse=True)
        self._lengths = sorted({min(size, len(row)) for row in rows if row})
        self._filter = np.zeros(1 << _FILTER_BITS, dtype=bool)
        self._filter[self._slots(self._keys)] = True
        self._held = np.zeros(len(self._keys), dtype=np.int64)  # training rows that hold each passage
        self._hits: list[np.ndarray] = []

    @staticmethod
    def _slots(keys: np.ndarray) -> np.ndarray:
        return (keys >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)

    def search(self, block: Sequence[Sequence[int]], *, first_row: int) -> None:
        """Note which passages stand in these training rows, numbered from `first_row`."""
        lengths = np.array([len(row) for row in block])
        flat = np.fromiter((word for row in block for word in row), dtype=np.int64, count=int(lengths.sum()))
        rows = np.repeat(np.arange(len(block)), lengths)
        left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(flat))  # words to the end of the row
        codes = self._codes[flat]
        for length in self._lengths:
            hashes = _hashes(codes, length) + np.uint64(length)
            near = np.flatnonzero(self._filter[self._slots(hashes)] & (left[: len(hashes)] >= length))
            place = np.searchsorted(self._keys, hashes[near])
            hit = self._keys[np.minimum(place, len(self._keys) - 1)] == hashes[near]
            pairs = np.unique(np.stack([place[hit], rows[near[hit]] + first_row]), axis=1)
            self._held += np.bincount(pairs[0], minlength=len(self._keys))
            self._hits.append(pairs[:, self._held[pairs[0]] <= COMMON])  # which rows hold a common one does not matter

    def found(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Share of the passages of each row that training rows hold (N,), the training row that holds most of them
        (-1: none), and how many passages were left out as common."""
        pairs = np.concatenate(self._hits, axis=1) if self._hits else np.zeros((2, 0), np.int64)
        held = self._held
        seen = (held > 0) & (held <= COMMON)
        self._seen = seen[self._place]
        total = np.bincount(self._own, weights=held[self._place] <= COMMON, minlength=self._rows)
        touched = np.bincount(self._own, weights=self._seen, minlength=self._rows)
        shares = touched / np.maximum(total, 1)
        pairs = pairs[:, seen[pairs[0]]]
        holders = pairs[1][np.argsort(pairs[0], kind="stable")]
        starts = np.concatenate([[0], np.cumsum(np.where(seen, held, 0))])
        owners = np.full(self._rows, -1)
        for row in np.flatnonzero(touched).tolist():
            mine = self._place[self._span(row)]
            trained = np.concatenate([holders[starts[key] : starts[key + 1]] for key in mine])
            owners[row] = np.bincount(trained).argmax()
        return shares, owners, int((held > COMMON).sum())

    def _span(self, row: int) -> slice:
        return slice(int(np.searchsorted(self._own, row)), int(np.searchsorted(self._own, row, side="right")))

    def text(self, row: int, words: Sequence[str]) -> str:
        """The longest run of words of the row whose passages are all held by training rows."""
        best = start = 0
        longest = 0
        for place, seen in enumerate([*self._seen[self._span(row)].tolist(), False]):
            if seen:
                if place - start + 1 > longest:
                    best, longest = start, place - start + 1
            else:
                start = place + 1
        return " ".join(words[best : best + longest + min(self._size, len(words)) - 1])[:_SHOWN_CHARACTERS]


def _words(conversation: Conversation) -> list[str]:
    """The words of a row, lower-cased."""
    turns = (message.content for message in conversation.messages if message.role != "system")
    return _WORD.findall((conversation.text or "\n".join(turns)).lower())


def _passage(lengths: Sequence[int]) -> int:
    """Words of a passage: the fifth percentile of the rows' lengths, within 8 and 13."""
    found = int(np.percentile(lengths, 5)) if lengths else LONGEST
    return min(max(found, SHORTEST), LONGEST)


def _place(places: list[str] | StoredConversations, row: int) -> str:
    return places[row] if isinstance(places, list) else place_of(*places.place(row))


def _blocks(
    train: Iterable[Conversation], words: Mapping[str, int], places: list[str] | StoredConversations
) -> Iterator[tuple[int, list[list[int]]]]:
    """Training rows as numbers of words (0: in no evaluated row), about a million words at a time; fills `places`
    where that is a list."""
    block: list[list[int]] = []
    held = first = 0
    for number, row in enumerate(train, 1):
        if isinstance(places, list):
            places.append(place_of(row.file, row.line))
        block.append([words.get(word, 0) for word in _words(row)])
        held += len(block[-1])
        if held >= _WORDS_AT_ONCE:
            yield first, block
            first, held, block = number, 0, []
    if block:
        yield first, block


def _hashes(codes: np.ndarray, length: int) -> np.ndarray:
    """A polynomial hash (uint64, wrapping) of every run of `length` codes."""
    count = max(len(codes) - length + 1, 0)
    found = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        found = found * _FACTOR + codes[offset : offset + count]
    return found ^ (found >> np.uint64(32))

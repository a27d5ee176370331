"""Numbers of many rows on disk; and what is made of them in little memory equals what the plain way makes."""

from __future__ import annotations

import io
import tempfile
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tune.data import columns, split, token_file
from lora_tune.data.chat_template import NOTES, RowError, TokenRow
from lora_tune.data.columns import Columns
from lora_tune.data.conversation import Conversation, Message
from lora_tune.data.fit import Pieces
from lora_tune.data.leakage import refuse_leaks
from lora_tune.data.overlap import COMMON, overlap
from lora_tune.data.split import at_most, contradictions, epoch_copies, hold_out_some, ranks, repeats
from lora_tune.data.store import ConversationStore, StoredConversations
from lora_tune.errors import DataError

FIELDS = (("end", "<i8"), ("digest", "V16"), ("prompt", "<u8"), ("source", "<i4"), ("size", "<u4"))
INT = st.integers(-(1 << 31), (1 << 31) - 1)
ROWS = st.lists(st.tuples(INT, st.binary(min_size=16, max_size=16), st.integers(0, (1 << 64) - 1), INT), max_size=40)


@given(ROWS, st.integers(40, 400), st.sampled_from([1, 3, 7]), st.integers(0, 5000))
@settings(max_examples=60, deadline=None)
def test_rows_come_back_whenever_they_are_asked_for(rows, block, every, before):
    """In memory or in the file, between two rows that are appended, written to another file behind other bytes."""
    whole, numbers = columns._BLOCK_BYTES, Columns(FIELDS)
    columns._BLOCK_BYTES = block
    try:
        given_ = [(*row, number) for number, row in enumerate(rows)]
        for number, row in enumerate(given_):
            numbers.append(*row)
            if number % every == 0:
                assert numbers.row(number // 2) == given_[number // 2] and numbers.row(number) == row
                assert numbers["prompt"].tolist() == [row[2] for row in given_[: number + 1]]
        file = io.BytesIO()
        numbers.write(file)
    finally:
        columns._BLOCK_BYTES = whole
    assert len(numbers) == len(rows) and file.getvalue() == numbers.rows().tobytes()
    with tempfile.TemporaryFile() as stored:
        stored.write(bytes(before) + file.getvalue() + b"texts")
        stored.seek(before)
        again = Columns.read(stored, FIELDS, rows=len(rows))
        assert stored.read() == b"texts" and len(again) == len(rows)
        assert again.rows().tolist() == numbers.rows().tolist()
        assert [again.row(number) for number in range(len(rows))] == given_
        copied = io.BytesIO()
        again.write(copied)
        assert copied.getvalue() == file.getvalue()


HASHES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=60)  # many repeat, some in one half alone


def as_digests(found):
    return np.array(found, dtype=np.uint64).reshape(-1, 2).view("V16").reshape(-1)


def plain_hold_out(digests, wanted, seed):
    """All groups of equal content, by rank."""
    held_out = np.zeros(len(digests), dtype=bool)
    wanted = min(wanted, len(digests) - 1)
    if wanted > 0:
        _, first, group, sizes = np.unique(digests, return_index=True, return_inverse=True, return_counts=True)
        for number in np.lexsort((first, ranks(digests[first], seed=seed))):
            if wanted and sizes[number] <= wanted:
                held_out |= group.reshape(-1) == number
                wanted -= sizes[number]
    return held_out


@given(HASHES, st.integers(0, 70), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_repeats_and_what_is_held_out_equal_the_plain_way(found, wanted, seed):
    digests = as_digests(found)
    values = [digest.tobytes() for digest in digests]
    assert repeats(digests).tolist() == [value in values[:number] for number, value in enumerate(values)]
    assert (hold_out_some(digests, wanted, seed=seed) == plain_hold_out(digests, wanted, seed)).all()


@pytest.mark.parametrize(("kinds", "wanted"), [(40, 900), (4000, 2), (400, 4999), (1 << 40, 1000)])
def test_of_many_rows_the_same_are_held_out(kinds, wanted):
    """Also where groups are passed over, so that more than the rows of lowest rank are looked at."""
    rng = np.random.default_rng(kinds)
    digests = as_digests(np.stack([rng.integers(0, kinds, 5000), rng.integers(0, 2, 5000)], axis=1))
    assert (hold_out_some(digests, wanted, seed=3) == plain_hold_out(digests, wanted, 3)).all()


def stored(texts):
    store = ConversationStore()
    for line, (question, answer) in enumerate(texts, 1):
        messages = (Message("user", f"q{question}"), Message("assistant", f"a{answer}"))
        store.append(Conversation(messages), source=line % 2, file="a.jsonl", line=line)
    return store


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3)), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_contradictions_are_other_answers_to_an_earlier_prompt(texts):
    store = stored(texts)
    rows = at_most(store, [None, None], seed=0)[::2]
    expected, seen = [], []
    for row in rows.tolist():
        if texts[row] not in seen and texts[row][0] in [question for question, _ in seen]:
            expected.append(row)
        seen.append(texts[row])
    assert contradictions(store, rows, repeats(store.digests[rows])).tolist() == expected


@given(st.lists(st.integers(0, 30), max_size=20), st.lists(st.integers(0, 30), max_size=6))
@settings(max_examples=60, deadline=None)
def test_leaks_are_found_with_the_last_trained_row_that_is_the_same(train, held_out):
    store = stored([(text, 0) for text in [*train, *held_out]])
    sides = np.arange(len(train)), np.arange(len(train), len(store))
    expected = [
        (len(train) + 1 + number, f"(a.jsonl:{len(train) - train[::-1].index(text)})")
        for number, text in enumerate(held_out)
        if text in train
    ]
    found = []
    try:
        refuse_leaks(store, *sides)
    except DataError as error:
        found = [(problem.line, problem.reason.split()[-1]) for problem in error.problems]
    assert found == expected


def test_which_rows_stand_more_often_is_drawn_as_ever():
    sources = np.random.default_rng(0).integers(0, 3, 500)
    expected = np.zeros(500, dtype=int)
    for source, weight in enumerate((1.0, 0.3, 2.5)):
        rows = np.flatnonzero(sources == source)
        rest = int(len(rows) * weight + 0.5) - len(rows) * int(weight)
        expected[rows] = int(weight)
        expected[np.random.default_rng((7, source)).permutation(rows)[:rest]] += 1
    assert (epoch_copies(sources, [1.0, 0.3, 2.5], seed=7) == expected).all()


def test_numbers_of_a_store_take_no_memory_of_the_process(monkeypatch):
    """Also while they are divided: the temporary arrays are of some bytes a row."""
    monkeypatch.setattr(columns, "_BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr("lora_tune.data.store._IN_MEMORY_BYTES", 1)
    monkeypatch.setattr(split, "_AT_ONCE", 1 << 9)
    kept, peaks = [], []
    for count in (2_000, 8_000):
        tracemalloc.start()
        store = stored([(number, 0) for number in range(count)])
        kept.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.reset_peak()
        rows = at_most(store, [None, None], seed=0)
        held_out = hold_out_some(store.digests, 100, seed=0)
        assert not len(contradictions(store, rows, repeats(store.digests))) and held_out.sum() == 100
        assert StoredConversations(store, rows).content_sha256()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (kept[1] - kept[0]) / 6_000 < 1 and (peaks[1] - peaks[0]) / 6_000 < 40


def test_a_passage_of_a_template_is_forgotten_when_it_is_common():
    """What was found is the same, whether its rows come in one block or one by one."""
    words = "one two three four five six seven eight nine"
    rows = [Conversation(text=f"{words} {'x' if i % 5 else words[::-1]} {i}", file="a", line=i) for i in range(40)]
    evaluated = [
        Conversation(text=f"{words} x", file="b", line=1),
        Conversation(text=f"{words[::-1]} 5", file="b", line=2),
    ]
    found = []
    for at_once in (1, 60, 1_000_000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lora_tune.data.overlap._WORDS_AT_ONCE", at_once)
            found.append(overlap(rows, evaluated, passage=8))
    assert [one.as_json() for one in found[1:]] == [found[0].as_json()] * 2
    assert found[0].common and found[0].touched == 1 and COMMON < 32


class Given:
    """In the place of a chat template: rows that are there already."""

    def __init__(self, entries):
        self.entries = entries

    def rows(self, numbers, *, loss_on):
        return [self.entries[number] for number in numbers]


def made_up(rng, lengths):
    return [
        TokenRow(rng.integers(0, 99, length).astype(np.int32), rng.random(length) < 0.5, 0, "a", 1, frozenset(notes))
        for length, notes in zip(lengths, ([], ["per_turn"], ["straddles", "control_tokens"]) * 9, strict=False)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_tokens_come_back_row_by_row_and_all_at_once(seed, tmp_path, monkeypatch):
    """Conversations of no row, one or some, rows without a token, refused ones; over many batches; cut to pieces."""
    rng, entries = np.random.default_rng(seed), []
    for _ in range(rng.integers(1, 60)):
        longest = rng.choice([1, 6, 40])  # below 1 and by chance: batches without any token
        lengths = rng.integers(0, longest, rng.integers(0, 4)).tolist()
        entries.append(made_up(rng, lengths) if rng.random() < 0.9 else RowError("refused"))
    monkeypatch.setattr(token_file, "_CHUNK", int(rng.integers(1, 9)))
    note = {**token_file._encode(tmp_path / "a", range(len(entries)), Given(entries), "all"), "sha256": ""}
    found = token_file._open(tmp_path / "a", note, errors=note["errors"])
    kept = [(number, row) for number, entry in enumerate(entries) if isinstance(entry, list) for row in entry]
    assert list(found.errors) == [number for number, entry in enumerate(entries) if isinstance(entry, RowError)]
    assert found.conversation.tolist() == [number for number, _ in kept] and len(found) == len(kept)
    for place, (_, row) in enumerate(kept):
        ids, mask = found.tokens(place)
        trained = row.mask & (np.arange(len(row.mask)) > 0)
        assert ids.tolist() == row.input_ids.tolist() and mask.tolist() == trained.tolist()
        assert (found.length[place], found.trained[place]) == (len(ids), trained.sum())
        assert {note for bit, note in enumerate(NOTES) if found.notes[place] >> bit & 1} == row.notes
    some = np.flatnonzero(found.length > 0)
    row = rng.permutation(np.repeat(some, 2)).astype(np.int32)
    start = (rng.random(len(row)) * found.length[row]).astype(np.int32)
    end = start + 1 + (rng.random(len(row)) * (found.length[row] - start)).astype(np.int32)
    pieces, indices = Pieces(row, start, end), rng.permutation(len(row))
    ids, mask = pieces.gathered(found, indices)
    one_by_one = [pieces.tokens(found, index) for index in indices.tolist()]
    assert ids.tolist() == [token for ids, _ in one_by_one for token in ids.tolist()]
    assert mask.tolist() == [token for _, mask in one_by_one for token in mask.tolist()]

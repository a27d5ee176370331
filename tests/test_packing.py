"""Packing: every document once, nothing too long, near the optimum; documents in one sequence do not see each other."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tune.data import packing
from lora_tune.data.packing import best_fit_decreasing, pack

LENGTHS = st.lists(st.integers(1, 64), max_size=200)


@given(LENGTHS)
@settings(max_examples=100, deadline=None)
def test_every_document_stands_in_one_sequence_that_is_not_too_long(lengths):
    found = best_fit_decreasing(np.array(lengths, dtype=np.int64), max_length=64)
    assert sorted(index for sequence in found for index in sequence) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in sequence) for sequence in found]
    assert all(total <= 64 for total in sums)
    lower_bound = -(-sum(lengths) // 64)
    assert len(found) <= 11 / 9 * max(lower_bound, sum(length > 32 for length in lengths)) + 4


@given(LENGTHS)
@settings(max_examples=50, deadline=None)
def test_each_document_goes_into_the_fullest_sequence_with_room(lengths):
    """The same packing by the plain quadratic algorithm."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, i) for i, room in enumerate(left) if room >= length]
        if fitting:
            left[min(fitting)[1]] -= length
        else:
            left.append(64 - length)
    found = best_fit_decreasing(np.array(lengths, dtype=np.int64), max_length=64)
    assert sorted(64 - sum(lengths[i] for i in sequence) for sequence in found) == sorted(left)


@given(LENGTHS, st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_documents_of_their_own_stay_alone_and_the_seed_decides_the_order(lengths, seed):
    sizes = np.array(lengths, dtype=np.int64)
    alone = np.arange(len(lengths)) % 3 == 0
    found = pack(sizes, alone, max_length=64, seed=seed)
    assert sorted(index for sequence in found for index in sequence) == list(range(len(lengths)))
    assert all(len(sequence) == 1 for sequence in found if any(alone[index] for index in sequence))
    again = pack(sizes, alone, max_length=64, seed=seed)
    assert [sequence.tolist() for sequence in found] == [sequence.tolist() for sequence in again]


def test_another_seed_gives_another_order():
    sizes, alone = np.arange(1, 60), np.zeros(59, dtype=bool)
    first, other = (pack(sizes, alone, max_length=64, seed=seed) for seed in (1, 2))
    assert first.indices.tolist() != other.indices.tolist()


@pytest.mark.parametrize("lengths", [[0], [65]])
def test_lengths_that_cannot_be_packed_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths must be 1 to 64"):
        best_fit_decreasing(np.array(lengths), max_length=64)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(tiny_base, attention):
    """Logits and losses of packed documents equal those of each document alone, through TRL's padding-free collator."""
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = AutoModelForCausalLM.from_pretrained(tiny_base, attn_implementation=attention, dtype=torch.float64).eval()
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 40, size=12)
    documents = [rng.integers(4, 260, size=length).tolist() for length in lengths]
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    compared = leaked = 0
    for sequence in pack(lengths, np.zeros(12, dtype=bool), max_length=96, seed=0):
        row = {
            "input_ids": [token for index in sequence for token in documents[index]],
            "labels": [token for index in sequence for token in [-100, *documents[index][1:]]],
            "seq_lengths": [int(lengths[index]) for index in sequence],
        }
        batch = collator([row])
        with torch.no_grad():
            packed = model(**{key: batch[key] for key in ("input_ids", "position_ids")}, use_cache=False).logits[0]
            together = model(
                **{key: batch[key] for key in ("input_ids", "position_ids", "labels")}, use_cache=False
            ).loss
            mixed = model(input_ids=batch["input_ids"], use_cache=False).logits[
                0
            ]  # the control: without positions documents do mix
            leaked += (mixed - packed).abs().max() > 1e-3
            start, losses = 0, []
            for index in sequence:
                ids = torch.tensor([documents[index]])
                single = model(input_ids=ids).logits[0]
                torch.testing.assert_close(packed[start : start + len(documents[index])], single, atol=1e-6, rtol=0)
                losses.append(torch.nn.functional.cross_entropy(single[:-1], ids[0, 1:], reduction="none"))
                start += len(documents[index])
                compared += 1
        torch.testing.assert_close(together.double(), torch.cat(losses).mean(), atol=1e-6, rtol=0)
    assert compared == 12 and leaked


def plain_pack(lengths, alone, *, max_length, seed):
    """Document by document, in lists: the longest first, each into the fullest sequence with room, the last opened or
    filled first."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    together, single = order[~alone[order]], order[alone[order]]
    sequences: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    for index in np.argsort(-lengths[together], kind="stable").tolist():
        length = int(lengths[together][index])
        room = next((room for room in range(length, max_length + 1) if with_room[room]), None)
        if room is None:
            room, number = max_length, len(sequences)
            sequences.append([])
        else:
            number = with_room[room].pop()
        sequences[number].append(int(together[index]))
        with_room[room - length].append(number)
    sequences += [[int(index)] for index in single]
    return [sequences[i] for i in rng.permutation(len(sequences))]


@given(st.integers(0, 300), st.integers(1, 64), st.sampled_from([0, 0.3, 1]), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_the_packing_is_that_of_one_document_after_another(count, longest, share, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count).astype(np.int32)
    alone = rng.random(count) < share
    for at_once in (7, 1 << 16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packing, "_AT_ONCE", at_once)
            found = pack(lengths, alone, max_length=64, seed=seed)
        assert [sequence.tolist() for sequence in found] == plain_pack(lengths, alone, max_length=64, seed=seed)


def test_packing_takes_some_bytes_a_document(monkeypatch):
    monkeypatch.setattr(packing, "_AT_ONCE", 1 << 9)
    sizes = np.random.default_rng(0).integers(10, 400, 20_000).astype(np.int32)
    tracemalloc.start()
    found = pack(sizes, np.zeros(len(sizes), dtype=bool), max_length=2048, seed=1)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(map(len, found)) == len(sizes) and kept / len(sizes) < 8 and peak / len(sizes) < 40

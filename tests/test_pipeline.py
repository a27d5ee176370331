"""From files to packed rows: split, weights, lengths, cache; and that every row and token is accounted for."""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_tune.data.checking import read_conversations
from lora_tune.data.near_duplicates import near_duplicates
from lora_tune.errors import DataError
from lora_tune.recipe import DataSource, Limits, Train

ANY = Limits(dropped_rows="100%", lost_tokens="100%", lost_end_tokens="100%")


@pytest.fixture(scope="module")
def chat(tiny_base, tmp_path_factory):
    from transformers import AutoTokenizer

    from lora_tune.data.chat_template import load_chat_template

    os.environ["LORA_TUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield load_chat_template(AutoTokenizer.from_pretrained(tiny_base))
    del os.environ["LORA_TUNE_CACHE"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count, *, words=1):
    return [{"prompt": f"question {i}", "completion": f"answer {i}" + " word" * words} for i in range(count)]


def source(path, **keys):
    return DataSource(source=str(path), **keys)


def prepare(chat, *data, hold_out=0, seed=1, limits=ANY, loss_on="assistant", **train):
    from lora_tune.data.pipeline import encode

    conversations = read_conversations(data, hold_out=hold_out, seed=seed)
    settings = Train(**{"max_length": 256, **train})
    return encode(conversations, chat, loss_on=loss_on, train=settings, limits=limits, seed=seed)


def documents_of(dataset):
    """Every document of the packed rows as (source, line, ids, labels)."""
    found = []
    for row in dataset:
        start = 0
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"])
        for length, place in zip(row["seq_lengths"], row["rows"], strict=True):
            ids, labels = (tuple(row[name][start : start + length]) for name in ("input_ids", "labels"))
            found.append((*place, ids, labels))
            start += length
    return found


def questions(conversations):
    return {conversation.messages[0].content for conversation in conversations}


def test_packed_rows_hold_exactly_the_documents(chat, tmp_path):
    found = prepare(chat, source(write(tmp_path / "a.jsonl", pairs(50))))
    assert found.train.column_names == ["input_ids", "labels", "seq_lengths", "rows"]
    assert max(map(len, found.train["input_ids"])) <= 256 and len(found.train) < 50
    expected = [(r.source, r.line, tuple(r.input_ids.tolist()), r.mask.tolist()) for r in found.documents]
    packed = documents_of(found.train)
    assert sorted(d[:3] for d in packed) == sorted(e[:3] for e in expected)
    for _, _, ids, labels in packed:
        assert labels[0] == -100 and all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        trained = chat.tokenizer.decode([label for label in labels if label != -100])
        assert trained.startswith("answer") and trained.endswith("<|im_end|>")
    assert {line for _, line, _, _ in packed} == set(range(1, 51))


def test_without_packing_each_row_is_a_sequence(chat, tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(20))
    found = prepare(chat, source(path), packing=False)
    assert [len(lengths) for lengths in found.train["seq_lengths"]] == [1] * 20
    together, alone = source(path), source(write(tmp_path / "b.jsonl", pairs(20)), pack=False)
    sequences = prepare(chat, together, alone).train["rows"]
    assert all(len(rows) == 1 for rows in sequences if any(place[0] == 1 for place in rows))
    assert any(len(rows) > 1 for rows in sequences)


def test_the_same_seed_gives_the_same_rows(chat, tmp_path):
    data = source(write(tmp_path / "a.jsonl", pairs(40)))
    first, again, other = (prepare(chat, data, seed=seed).train for seed in (1, 1, 2))
    assert first["input_ids"] == again["input_ids"] != other["input_ids"]
    assert first._fingerprint == again._fingerprint != other._fingerprint


@pytest.mark.parametrize(("weight", "expected"), [(2, 20), (0.5, 5), (1.25, 13), (1, 10)])
def test_weights_are_shares_of_the_epoch(chat, tmp_path, weight, expected):
    weighted = source(write(tmp_path / "a.jsonl", pairs(10)), weight=weight)
    plain = source(write(tmp_path / "b.jsonl", [{"prompt": f"b{i}", "completion": "c"} for i in range(7)]))
    found = prepare(chat, weighted, plain)
    copies = Counter((number, line) for number, line, *_ in documents_of(found.train))
    assert sum(n for (number, _), n in copies.items() if number == 0) == expected
    assert sum(n for (number, _), n in copies.items() if number == 1) == 7
    assert max(copies.values()) - min(copies.values()) <= 1 or weight >= 2
    assert [account.epoch_rows for account in found.ledger.sources] == [expected, 7]


def test_max_rows_takes_the_same_rows_in_any_order(tmp_path):
    rows = pairs(60)
    forward = read_conversations([source(write(tmp_path / "a.jsonl", rows), max_rows=20)], hold_out=0, seed=3)
    backward = read_conversations([source(write(tmp_path / "b.jsonl", rows[::-1]), max_rows=20)], hold_out=0, seed=3)
    other = read_conversations([source(write(tmp_path / "a.jsonl", rows), max_rows=20)], hold_out=0, seed=4)
    assert len(forward.train) == 20 and questions(forward.train) == questions(backward.train) != questions(other.train)
    assert forward.ledger.sources[0].left_by_max_rows == 40 and forward.ledger.balances()


@pytest.mark.parametrize(("hold_out", "expected"), [("2%", 2), ("0.1%", 1), (7, 7), (0, 0), ("0%", 0)])
def test_hold_out_is_stable_under_reordering(tmp_path, hold_out, expected):
    rows = pairs(100)
    forward, backward = (
        read_conversations([source(write(tmp_path / "a.jsonl", data))], hold_out=hold_out, seed=1)
        for data in (rows, rows[::-1])
    )
    assert len(forward.held_out) == expected and questions(forward.held_out) == questions(backward.held_out)
    assert not questions(forward.train) & questions(forward.held_out)
    assert len(forward.train) + expected == 100


def test_copies_of_one_content_fall_on_the_same_side(tmp_path):
    rows = [row for row in pairs(30) for _ in range(3)]
    found = read_conversations([source(write(tmp_path / "a.jsonl", rows))], hold_out="30%", seed=1)
    assert len(found.held_out) == 27 and not questions(found.train) & questions(found.held_out)
    assert found.ledger.sources[0].notes["duplicate"].rows == 60


@pytest.mark.parametrize("rows", [pairs(1), pairs(1) * 40])
def test_where_no_row_can_be_held_out_it_says_so(tmp_path, rows):
    found = read_conversations([source(write(tmp_path / "a.jsonl", rows))], hold_out="2%", seed=1)
    assert not found.held_out and len(found.train) == len(rows)
    assert any("no row can be held out" in warning.reason for warning in found.ledger.warnings())


def test_a_file_of_held_out_rows_is_kept_apart_and_leaks_are_refused(chat, tmp_path):
    train = source(write(tmp_path / "train.jsonl", pairs(10)))
    apart = write(tmp_path / "test.jsonl", [{"prompt": f"new {i}", "completion": "x"} for i in range(4)])
    found = prepare(chat, train, hold_out=str(apart))
    assert len(found.held_out) == 4 and len(found.held_out_rows) == 4 and found.ledger.balances()
    assert {place[0] for rows in found.train["rows"] for place in rows} == {0}
    leaking = write(tmp_path / "leak.jsonl", [{"prompt": "new", "completion": "x"}, *pairs(3)])
    with pytest.raises(DataError) as caught:
        read_conversations([train], hold_out=str(leaking), seed=1)
    assert [(os.path.basename(p.file), p.line) for p in caught.value.problems] == [("leak.jsonl", i) for i in (2, 3, 4)]
    assert all("train.jsonl:" in problem.reason for problem in caught.value.problems)


def test_truncation_keeps_the_start_and_counts_what_is_lost(chat, tmp_path):
    path = write(tmp_path / "a.jsonl", [*pairs(3), *pairs(1, words=100)])
    full = prepare(chat, source(path), max_length=1024)
    cut = prepare(chat, source(path))
    long_row, cut_row = full.documents[3], cut.documents[3]
    assert cut_row.input_ids.tolist() == long_row.input_ids.tolist()[:256]
    account = cut.ledger.sources[0]
    assert account.tokens_lost == len(long_row.input_ids) - 256 and account.notes["lost its end token"].rows == 1
    assert account.notes["truncated"].first == "a.jsonl:4" and cut.ledger.balances()
    with pytest.raises(DataError, match=r"limits\.lost_tokens"):
        prepare(chat, source(path), limits=Limits())


def test_split_keeps_every_token_and_drop_drops_the_row(chat, tmp_path):
    path = write(tmp_path / "a.jsonl", [*pairs(3), *pairs(1, words=100)])
    whole = prepare(chat, source(path), max_length=1024).documents[3].input_ids.tolist()
    split = prepare(chat, source(path), too_long="split")
    pieces = list(split.documents)[3:]
    assert [token for piece in pieces for token in piece.input_ids.tolist()] == whole and len(pieces) == 3
    assert split.ledger.total("tokens_lost") == 0 and all(not piece.mask[0] for piece in pieces)
    dropped = prepare(chat, source(path), too_long="drop")
    assert len(dropped.documents) == 3 and dropped.ledger.sources[0].dropped["longer than max_length"].rows == 1
    assert split.ledger.balances() and dropped.ledger.balances()


def test_text_is_always_split_and_every_token_but_the_first_is_trained(chat, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "abc " * 200}, {"text": "short"}])
    found = prepare(chat, source(path), too_long="drop", max_length=128)
    assert len(found.documents) == 8 and found.ledger.balances()
    assert all(row.mask.tolist() == [False] + [True] * (len(row.mask) - 1) for row in found.documents)
    assert found.ledger.total("tokens_trained") == found.ledger.total("tokens_kept") - len(found.documents)


def test_rows_that_the_template_refuses_are_named_or_dropped(tiny_base, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    from lora_tune.data.chat_template import load_chat_template

    monkeypatch.setenv("LORA_TUNE_CACHE", str(tmp_path / "cache"))
    strict = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = load_chat_template(AutoTokenizer.from_pretrained(tiny_base), template=strict)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": [*turns[:1], {"role": "assistant", "content": str(i)}]} for i in range(5)]
    path = write(tmp_path / "a.jsonl", [*rows, {"messages": [turns[0], *turns]}])
    with pytest.raises(DataError, match="roles must alternate") as caught:
        prepare(chat, source(path))
    assert caught.value.problems[0].line == 6
    found = prepare(chat, source(path, on_bad_row="drop"))
    assert len(found.documents) == 5 and found.ledger.balances()


def test_loss_on_changes_the_mask(chat, tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    write(path, [{"messages": turns}])
    trained = {
        where: int(prepare(chat, source(path), loss_on=where).documents[0].mask.sum())
        for where in ("last_assistant", "assistant", "all")
    }
    assert trained["last_assistant"] * 2 == trained["assistant"] < trained["all"]


def test_token_rows_are_cached_by_content_and_damage_is_found(chat, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_TUNE_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "a.jsonl", pairs(20))
    calls = []
    rows = type(chat).rows
    monkeypatch.setattr(type(chat), "rows", lambda self, *a, **k: calls.append(1) or rows(self, *a, **k))
    first = prepare(chat, source(path)).train["input_ids"]
    assert calls and (encoded := len(calls))
    os.utime(path, (1, 1))
    assert prepare(chat, source(path)).train["input_ids"] == first and len(calls) == encoded
    assert prepare(chat, source(path), max_length=128, packing=False) and len(calls) == encoded
    (stored,) = [p for p in (tmp_path / "cache" / "tokens").glob("*.arrow") if p.stat().st_size > 1000]
    whole = stored.read_bytes()
    half = len(whole) // 2
    flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
    zeros = whole[:half] + bytes(len(whole) - half)
    for damaged in (flipped, zeros, whole[:half], whole[:-1], b"", whole + b"x"):
        stored.write_bytes(damaged)
        assert prepare(chat, source(path)).train["input_ids"] == first and len(calls) > encoded
        assert stored.read_bytes() == whole
        encoded = len(calls)
    stored.unlink()
    assert prepare(chat, source(path)).train["input_ids"] == first and len(calls) > encoded
    encoded = len(calls)
    stored.with_suffix(".json").write_text("{")
    assert prepare(chat, source(path)).train["input_ids"] == first and len(calls) > encoded
    encoded = len(calls)
    before = path.stat()
    write(path, [{"prompt": "question 0", "completion": "answer X word"}, *pairs(20)[1:]])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p`, `rsync -t` and `tar x` leave it
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size
    assert prepare(chat, source(path)).train["input_ids"] != first and len(calls) > encoded
    assert not list((tmp_path / "cache" / "packed").iterdir())


def test_half_written_rows_of_killed_processes_are_cleared_away_and_those_of_living_ones_stay(
    chat, tmp_path, monkeypatch
):
    monkeypatch.setenv("LORA_TUNE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "tokens"
    folder.mkdir(parents=True)
    dead, living = folder / "dead.123.tmp", folder / "living.124.tmp"
    for half in (dead, living):
        half.write_bytes(b"half")
    with FileLock(folder / "living.lock"):
        prepare(chat, source(write(tmp_path / "a.jsonl", pairs(8))))
    assert not dead.exists() and living.exists()


ROWS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"prompt": st.sampled_from("abc"), "completion": st.sampled_from(["x", "y " * 60, ""])}),
        st.fixed_dictionaries({"prompt": st.just("p " * 150), "completion": st.sampled_from(["x", "z"])}),
        st.fixed_dictionaries({"prompt": st.integers(), "completion": st.just("x")}),
    ),
    min_size=1,
    max_size=25,
)


@given(
    rows=ROWS,
    too_long=st.sampled_from(["truncate", "drop", "split"]),
    hold_out=st.sampled_from([0, 2, "30%"]),
    max_rows=st.sampled_from([None, 3, 10]),
    weight=st.sampled_from([0.5, 1.0, 2.0]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_row_and_token_is_accounted_for(chat, tmp_path, rows, too_long, hold_out, max_rows, weight):
    path = write(tmp_path / "a.jsonl", rows)
    data = source(path, format="prompt_completion", on_bad_row="drop", max_rows=max_rows, weight=weight)
    conversations = read_conversations([data], hold_out=hold_out, seed=1)
    from lora_tune.data.pipeline import encode

    try:
        settings_ = Train(max_length=128, too_long=too_long)
        found = encode(conversations, chat, loss_on="assistant", train=settings_, limits=ANY, seed=1)
    except DataError as error:
        assert "no row is left" in str(error)
        assert conversations.ledger.balances()
        return
    account = found.ledger.sources[0]
    assert found.ledger.balances() and account.read == len(rows)
    documents = list(found.documents)
    assert account.tokens_kept == sum(len(row.input_ids) for row in documents)
    assert account.tokens_trained == sum(int(row.mask.sum()) for row in documents)
    assert account.token_rows == len(documents) and all(row.mask.any() for row in documents)
    assert account.kept == len({row.line for row in documents})
    assert len(found.held_out) == account.held_out and all(row.mask.any() for row in found.held_out_rows)
    trained = sum(label != -100 for labels in found.train["labels"] for label in labels)
    assert (trained > 0) == (account.epoch_rows > 0)


def test_near_duplicates_are_counted_within_and_across(tmp_path):
    text = [f"word{i}" for i in range(120)]
    rows = [{"prompt": " ".join(text), "completion": f"{i} {' '.join(text)}"} for i in range(6)]
    rows += [{"prompt": f"entirely other words number {i}", "completion": str(i) * 9} for i in range(20)]
    train = source(write(tmp_path / "a.jsonl", rows))
    apart = write(tmp_path / "b.jsonl", [{"prompt": " ".join(text), "completion": f"new {' '.join(text)}"}])
    found = read_conversations([train], hold_out=str(apart), seed=1)
    near = near_duplicates(found.train, found.held_out)
    assert (near.train, near.held_out) == (5, 1) and near.seconds > 0
    assert near.first_train[0].endswith("a.jsonl:2") and near.first_train[1].endswith("a.jsonl:1")
    assert near.first_held_out[0].endswith("b.jsonl:1")
    assert near_duplicates(found.held_out, found.held_out[:0]).train == 0

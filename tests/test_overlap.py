"""Contamination: the count equals a search word by word, templates do not count, trained sources are named."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.cli import main
from lora_tune.data.conversation import Conversation, Message
from lora_tune.data.held_out import rows_in, shared_with_training
from lora_tune.data.ledger import Ledger
from lora_tune.data.overlap import COMMON, MOSTLY, Overlap, overlap, trained_sources
from lora_tune.data.recorded import Finder, Recorded, content_hash
from lora_tune.data.sources import SourceIdentity
from lora_tune.recipe import DataSource, Recipe

ROWS = st.lists(st.lists(st.sampled_from("abc"), max_size=9), max_size=14)


def rows(texts: Sequence[str], file: str = "train.jsonl") -> list[Conversation]:
    """A plain-text row for each text; line n is the n-th."""
    return [Conversation(text=text, file=f"some/folder/{file}", line=n) for n, text in enumerate(texts, 1)]


def brute_force(train: Sequence[Sequence[str]], evaluated: Sequence[Sequence[str]], size: int) -> list[float]:
    """The share of each row's passages that stand in 1 to COMMON training rows, by comparing all of them."""
    shares = []
    for row in evaluated:
        length = min(size, len(row))
        found = [tuple(row[i : i + length]) for i in range(len(row) - length + 1)] if length else []
        held = [
            sum(any(tuple(other[i : i + length]) == gram for i in range(len(other))) for other in train)
            for gram in found
        ]
        counted = [count for count in held if count <= COMMON]
        shares.append(sum(count > 0 for count in counted) / len(counted) if counted else 0.0)
    return shares


@given(train=ROWS, evaluated=ROWS, size=st.integers(1, 5))
def test_it_equals_a_search_of_all_pairs(train: list[list[str]], evaluated: list[list[str]], size: int) -> None:
    found = overlap(
        rows([" ".join(row) for row in train]),
        rows([" ".join(row) for row in evaluated], "held.jsonl"),
        passage=size,
        shown=99,
    )
    shares = brute_force(train, evaluated, size)
    assert (found.rows, found.trained) == (len(evaluated), len(train))
    assert found.touched == sum(share > 0 for share in shares)
    assert found.mostly == sum(share >= MOSTLY for share in shares)
    assert {row.place: row.share for row in found.worst} == {
        f"held.jsonl:{line}": pytest.approx(share, abs=1e-4) for line, share in enumerate(shares, 1) if share
    }
    assert [row.share for row in found.worst] == sorted((row.share for row in found.worst), reverse=True)
    for row in found.worst:  # the training row that is named holds a passage of it
        other = train[int(row.trained.split(":")[1]) - 1]
        mine = evaluated[int(row.place.split(":")[1]) - 1]
        length = min(size, len(mine))
        grams = {tuple(mine[i : i + length]) for i in range(len(mine) - length + 1)}
        assert grams & {tuple(other[i : i + length]) for i in range(len(other))}
        assert row.words.replace(" ", "") in "".join(mine)


def words(count: int, seed: int) -> str:
    """`count` words that stand nowhere else."""
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(10**9)}" for _ in range(count))


def test_case_and_punctuation_hide_nothing_and_system_turns_do_not_count() -> None:
    text = words(20, 1)
    shouted = Conversation(
        (
            Message("system", words(20, 2)),
            Message("user", text.upper().replace(" ", ", ") + "!"),
            Message("assistant", "no"),
        )
    )
    system = Conversation((Message("system", words(20, 2)), Message("user", words(9, 3)), Message("assistant", "yes")))
    found = overlap([shouted], [*rows([text], "held.jsonl"), system])
    assert (found.touched, found.mostly) == (1, 1)
    assert found.worst[0].words == text and found.worst[0].place == "held.jsonl:1"


def test_a_templates_wording_is_no_contamination() -> None:
    template = words(15, 4)
    trained = rows([f"{template} {words(30, seed)}" for seed in range(10, 10 + COMMON + 1)])
    found = overlap(trained, rows([f"{template} {words(30, 99)}"], "held.jsonl"))
    assert (found.touched, found.common) == (0, 3)
    assert overlap(trained[:-1], rows([f"{template} {words(30, 99)}"], "held.jsonl")).touched == 1


@pytest.mark.parametrize("lengths, passage", [((3, 40), 8), ((10, 10), 10), ((50, 90), 13), ((), 13)])
def test_the_length_of_a_passage_follows_the_rows(lengths: tuple[int, ...], passage: int) -> None:
    assert overlap(rows(["a b"]), rows([words(n, n) for n in lengths])).passage == passage


def test_letters_of_scripts_without_spaces_are_words() -> None:
    shared = "我们今天一起去北京看长城然后回家吃饭"
    found = overlap(rows([f"他说：{shared}。"]), rows([f"问题，{shared}？"], "held.jsonl"))
    assert found.touched == 1 and found.worst[0].words.replace(" ", "") == shared


def test_fifty_thousand_rows_take_seconds() -> None:
    draw = random.Random(0)
    known = [f"w{number}" for number in range(20_000)]
    texts = [" ".join(draw.choices(known, k=60)) for _ in range(10_000)]
    held = rows([" ".join(draw.choices(known, k=60)) for _ in range(500)] + texts[4_321:4_322], "held.jsonl")
    started = time.process_time()
    found = overlap(rows(texts), held)
    assert time.process_time() - started < 4  # 0.35 s measured on a free core: 3 s for 50,000 rows of 120 words
    assert found.worst[0].trained == "train.jsonl:4322" and found.mostly == 1


def test_the_ledger_tells_and_warns() -> None:
    text = words(30, 5)
    found = overlap(rows([text]), rows([text, words(30, 6)], "held.jsonl"))
    ledger = Ledger(overlap=found)
    assert ledger.as_json()["overlap"]["mostly"] == 1
    (warning,) = [line for line in ledger.as_json()["warnings"] if "passages" in line]
    assert "1 of 2 held-out rows share 70%" in warning and "held.jsonl:1 with train.jsonl:1" in warning
    assert "some/folder" not in str(ledger.as_json())
    assert "overlap" not in Ledger().as_json()


def test_a_source_that_was_trained_on_is_named() -> None:
    mine = SourceIdentity("mine.jsonl", "alpaca", "ab" * 32, 10)
    other = SourceIdentity("other.jsonl", "alpaca", "cd" * 32, 10)
    (problem,) = trained_sources([mine, other], {"ab" * 32: "train.jsonl"})
    assert "mine.jsonl: this data was trained on (as train.jsonl" in str(problem)
    assert trained_sources([other], {"ab" * 32: "train.jsonl"}) == []


def test_nothing_evaluated_is_nothing_found() -> None:
    found = overlap(rows(["a"]), [])
    assert found == Overlap(13, 0, 1, 0, 0, 0, (), found.seconds)


def test_preview_gives_the_account_of_the_run(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of four held-out rows differs from a training row in its answer's last word alone."""
    monkeypatch.chdir(tmp_path)
    train = [{"prompt": words(12, n), "completion": words(4, 100 + n)} for n in range(20)]
    held = [{"prompt": words(12, 50 + n), "completion": words(4, 150 + n)} for n in range(3)]
    held.append({"prompt": train[7]["prompt"], "completion": train[7]["completion"] + " other"})
    for name, content in {"train.jsonl": train, "held.jsonl": held}.items():
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in content))
    recipe = {"base": {"name": str(tiny_base), "quantize": "none"}, "data": [{"source": "train.jsonl"}]}
    recipe |= {"eval": {"hold_out": "held.jsonl"}, "output": "out"}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    assert main(["preview", "recipe.yaml", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    found = answer["ledger"]["overlap"]
    assert (found["rows"], found["trained"], found["touched"], found["mostly"]) == (4, 20, 1, 1)
    assert found["worst"][0]["place"] == "held.jsonl:4" and found["worst"][0]["trained"] == "train.jsonl:8"
    assert any("1 of 4 held-out rows share 70% or more" in problem["reason"] for problem in answer["problems"])


def test_other_rows_are_compared_with_the_training_rows_where_they_are_at_hand(tmp_path: Path) -> None:
    train = [{"prompt": words(12, n), "completion": words(4, 100 + n)} for n in range(9)]
    other = [{"prompt": words(12, 70), "completion": words(4, 71)}, train[3]]
    for name, content in {"train.jsonl": train, "other.jsonl": other}.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    stored = {
        "base": {"name": "b"},
        "data": [{"source": "train.jsonl", "format": "prompt_completion"}],
        "output": "out",
    }
    recipe = Recipe.model_validate(stored)
    found, _ = rows_in([DataSource(source=str(tmp_path / "other.jsonl"))], seed=1)
    sha256 = content_hash(tmp_path / "train.jsonl") or ""
    recorded = [Recorded("train.jsonl", "prompt_completion", sha256)]
    (warning,) = shared_with_training(found, recipe, recorded, finder=Finder((), tmp_path))
    assert warning.severity == "warning" and "1 of 2 held-out rows" in warning.reason
    assert "other.jsonl:2 with train.jsonl:4" in warning.reason
    (tmp_path / "train.jsonl").write_text("changed\n")
    (note,) = shared_with_training(found, recipe, recorded, finder=Finder((), tmp_path))
    assert note.severity == "note" and "train.jsonl are not at hand" in note.reason

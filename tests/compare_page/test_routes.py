"""The routes of the compare page: its files, prompts as tokens, votes as rows; and the file that votes go to."""

from __future__ import annotations

import contextlib
import json
import resource
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_server import Servers, call
from serving_kit import base_section, write_adapter

from lora_tune.data.chat_template import load_chat_template
from lora_tune.data.conversation import Message
from lora_tune.model.source import find_base, load_tokenizer
from lora_tune.recipe import Base
from lora_tune.serving import votes as votes_module
from lora_tune.serving.local import LocalBackend
from lora_tune.serving.settings import ServeSettings
from lora_tune.serving.votes import (
    PreferenceRow,
    UndecidedRow,
    VotedAnswer,
    VotesFull,
    append_rows,
    facts_of_vote,
    preferences,
    undecided_file,
)
from lora_tune.serving.web import FILES, MOST_TOKENS, SHELL, pieces_of

TOKEN = "a-token-of-some-length"
PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Naïve 🙂 <|im_end|>?"}]
ANSWERS = [
    {"model": "base", "content": "Yes.", "finish_reason": "stop"},
    {"model": "one", "content": "No.", "finish_reason": "length"},
    {"model": "two", "content": "Yes.", "finish_reason": "stop"},
]
VOTE: dict[str, Any] = {
    "messages": PROMPT,
    "answers": ANSWERS[:2],
    "verdict": "better",
    "best": 1,
    "sampling": {"temperature": 0.5, "top_p": 0.9, "max_tokens": 8, "seed": 7},
}


@pytest.fixture(scope="module")
def served(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Three servers over one engine: with votes, without, and with a token."""
    folder = tmp_path_factory.mktemp("compare")
    adapter = write_adapter(folder / "adapter", tiny_base, seed=1)
    backend = LocalBackend.start(base_section(tiny_base), adapters={"one": adapter, "two": adapter}, name="base")
    votes = folder / "votes" / "votes.jsonl"
    servers = Servers()
    yield {
        "open": servers.start(backend, ServeSettings(votes=votes)).url,
        "no votes": servers.start(backend, ServeSettings()).url,
        "token": servers.start(backend, ServeSettings(token=TOKEN, votes=votes)).url,
        "votes": votes,
        "chat": backend.chat("one"),
    }
    servers.close()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def test_the_page_is_a_few_small_files_that_forbid_everything_else(served: dict[str, Any]) -> None:
    assert len(FILES) > 8 and sum(path.stat().st_size for path in FILES.values()) < 100_000
    for path in SHELL:
        for server in ("open", "token"):
            reply = call(served[server] + path[1:])
            assert reply.status == 200 and reply.body == FILES[path].read_bytes()
            policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
            assert policy["default-src"] == "'none'" and "unsafe" not in str(policy)
            assert policy["require-trusted-types-for"] == "'script'"
            assert reply.headers["x-content-type-options"] == "nosniff"
    again = call(served["open"], headers={"if-none-match": reply_tag(served["open"])})
    assert (again.status, again.body) == (304, b"")


def reply_tag(url: str) -> str:
    return call(url).headers["etag"]


@pytest.mark.parametrize("path", ["page/", "page/../web.py", "page/%2e%2e/web.py", "page/main.js/", "page/none.js"])
def test_nothing_else_is_given_out(path: str, served: dict[str, Any]) -> None:
    assert call(served["open"] + path).status == 404
    assert call(served["token"] + path).status == 401


def test_with_a_token_only_the_shell_is_for_everybody(served: dict[str, Any]) -> None:
    before = rows_of(served["votes"])
    for path, body in (("adapters", None), ("tokens", {"model": "one", "messages": PROMPT}), ("votes", VOTE)):
        for headers in ({}, {"authorization": "Bearer wrong"}):
            reply = call(f"{served['token']}compare/{path}", body, headers=headers)
            assert reply.status == 401 and b"one" not in reply.body
    assert rows_of(served["votes"]) == before
    right = {"authorization": f"Bearer {TOKEN}"}
    assert call(f"{served['token']}compare/adapters", headers=right).status == 200


def test_models_come_with_what_is_public_of_them(served: dict[str, Any], tmp_path: Path) -> None:
    found = call(served["open"] + "compare/adapters").json
    assert [(model["name"], model["parent"]) for model in found["models"]] == [
        ("base", None), ("one", "base"), ("two", "base"),
    ]  # fmt: skip
    assert found["models"][1]["rank"] == 4 and found["votes"] is True
    assert str(served["votes"].parent.parent) not in json.dumps(found)
    assert call(served["no votes"] + "compare/adapters").json["votes"] is False


def test_a_prompt_as_tokens_is_what_training_would_render(served: dict[str, Any]) -> None:
    found = call(served["open"] + "compare/tokens", {"model": "one", "messages": PROMPT}).json
    ids = served["chat"].prompt_ids([Message("system", "Be brief."), Message("user", "Naïve 🙂 <|im_end|>?")])
    assert [number for piece in found["pieces"] for number in piece["ids"]] == ids
    assert (found["count"], found["left_out"]) == (len(ids), 0)
    special = ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>"]
    assert [piece["text"] for piece in found["pieces"] if piece["special"]] == special  # the user's own is plain text
    texts = [piece["text"] for piece in found["pieces"]]
    assert "ï" in texts and "🙂" in texts and "�" not in "".join(texts)


def test_of_a_very_long_prompt_the_middle_is_left_out(served: dict[str, Any]) -> None:
    body = {"model": "one", "messages": [{"role": "user", "content": "x" * (3 * MOST_TOKENS)}]}
    found = call(served["open"] + "compare/tokens", body).json
    shown = sum(len(piece["ids"]) for piece in found["pieces"])
    assert shown == MOST_TOKENS == found["count"] - found["left_out"] and found["left_out_after"] == MOST_TOKENS // 2


WRONG = {
    "an unknown model": ({"model": "none", "messages": PROMPT}, 404),
    "a path as a model": ({"model": "../one", "messages": PROMPT}, 404),
    "no messages": ({"model": "one", "messages": []}, 400),
    "an unknown role": ({"model": "one", "messages": [{"role": "bot", "content": "x"}]}, 400),
    "a template": ({"model": "one", "messages": PROMPT, "chat_template": "{{ 1 }}"}, 400),
    "a list": ([1], 400),
    "no JSON": (b"{", 400),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_question_for_tokens_is_refused(case: str, served: dict[str, Any]) -> None:
    body, status = WRONG[case]
    reply = call(served["open"] + "compare/tokens", body)
    assert reply.status == status and reply.json["error"]["message"]


@pytest.fixture(scope="module")
def tokenizers(tiny_base: Path) -> list[Any]:
    """One token for each byte, and the quickstart's with merges."""
    quickstart = load_chat_template(load_tokenizer(find_base(Base(name="builtin:quickstart")))).tokenizer
    return [load_tokenizer(find_base(Base(name=str(tiny_base)))), quickstart]


@given(data=st.data())
def test_pieces_are_the_text_token_by_token(data: st.DataObject, tokenizers: list[Any]) -> None:
    for tokenizer in tokenizers:
        ids = tokenizer.encode(data.draw(st.text(max_size=30)), add_special_tokens=False)
        special = set(tokenizer.all_special_ids)
        for place in data.draw(st.lists(st.integers(0, len(ids)), max_size=3)):
            ids.insert(place, sorted(special)[place % len(special)])
        pieces = list(pieces_of(ids, special=special, decode=tokenizer.decode))
        assert [number for piece in pieces for number in piece.ids] == ids
        whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "�" not in whole:
            assert "".join(piece.text for piece in pieces) == whole
        assert all(len(piece.ids) == 1 for piece in pieces if set(piece.ids) & special)


def test_a_vote_is_a_row_that_preference_training_reads(served: dict[str, Any]) -> None:
    before = rows_of(served["votes"])
    assert call(served["open"] + "compare/votes", VOTE).json == {"rows": 1}
    (row,) = rows_of(served["votes"])[len(before) :]
    parsed = PreferenceRow.model_validate(row)
    assert (parsed.prompt, parsed.chosen_model, parsed.rejected_model) == (PROMPT, "one", "base")
    assert parsed.chosen == [{"role": "assistant", "content": "No."}] and parsed.rejected[0]["content"] == "Yes."
    assert (parsed.seed, parsed.temperature, parsed.top_p, parsed.max_tokens) == (7, 0.5, 0.9, 8)
    assert (parsed.chosen_column, parsed.chosen_finish, parsed.base) == (1, "length", "base")
    assert parsed.template_sha256 == served["chat"].sha256
    assert stat.S_IMODE(served["votes"].stat().st_mode) == 0o600


def test_trl_reads_the_file(served: dict[str, Any]) -> None:
    from datasets import load_dataset
    from trl.data_utils import apply_chat_template, is_conversational

    call(served["open"] + "compare/votes", VOTE)
    rows = load_dataset("json", data_files=str(served["votes"]), split="train")
    assert is_conversational(rows[-1])
    texts = apply_chat_template(rows[-1], served["chat"].tokenizer)
    assert "Be brief." in texts["prompt"] and texts["chosen"].startswith("No.") and texts["rejected"].startswith("Yes.")


def test_the_best_of_three_wins_against_each_that_differs(served: dict[str, Any]) -> None:
    before = len(rows_of(served["votes"]))
    assert call(served["open"] + "compare/votes", {**VOTE, "answers": ANSWERS}).json == {"rows": 2}
    assert call(served["open"] + "compare/votes", {**VOTE, "answers": ANSWERS, "best": 0}).json == {"rows": 1}
    first, second, third = rows_of(served["votes"])[before:]
    assert [row["rejected_model"] for row in (first, second, third)] == ["base", "two", "one"]
    assert first["id"] == second["id"] != third["id"]


@pytest.mark.parametrize("verdict", ["tie", "bad"])
def test_no_preference_stands_beside(verdict: str, served: dict[str, Any]) -> None:
    before, path = rows_of(served["votes"]), undecided_file(served["votes"])
    known = len(rows_of(path))
    body = {key: value for key, value in VOTE.items() if key != "best"} | {"verdict": verdict}
    assert call(served["open"] + "compare/votes", body).json == {"rows": 0}
    assert rows_of(served["votes"]) == before
    (row,) = rows_of(path)[known:]
    assert (UndecidedRow.model_validate(row).verdict, row["models"]) == (verdict, ["base", "one"])


WRONG_VOTES: dict[str, Any] = {
    "best of none": {"best": None},
    "best of a tie": {"verdict": "tie"},
    "best that is not there": {"best": 2},
    "a negative best": {"best": -1},
    "an unknown verdict": {"verdict": "left"},
    "one answer": {"answers": ANSWERS[:1], "best": 0},
    "four answers": {"answers": [*ANSWERS, ANSWERS[0]]},
    "equal answers": {"answers": [ANSWERS[0], ANSWERS[2]]},
    "an empty best": {"answers": [ANSWERS[0], {**ANSWERS[1], "content": " "}]},
    "a cancelled answer": {"answers": [ANSWERS[0], {**ANSWERS[1], "finish_reason": "cancelled"}]},
    "an unknown model": {"answers": [ANSWERS[0], {**ANSWERS[1], "model": "none"}]},
    "an unknown role": {"messages": [{"role": "bot", "content": "x"}]},
    "unknown sampling": {"sampling": {"temprature": 1}},
    "another prompt in the sampling": {"sampling": {"messages": [{"role": "user", "content": "y"}]}},
    "NaN": {"sampling": {"temperature": float("nan")}},
    "a field more": {"path": "/etc/passwd"},
}


@pytest.mark.parametrize("case", WRONG_VOTES)
def test_a_wrong_vote_is_refused_and_writes_nothing(case: str, served: dict[str, Any]) -> None:
    before = served["votes"].read_bytes() if served["votes"].exists() else b""
    reply = call(served["open"] + "compare/votes", VOTE | WRONG_VOTES[case])
    assert 400 <= reply.status < 500 and reply.json["error"]["message"]
    assert (served["votes"].read_bytes() if served["votes"].exists() else b"") == before


def test_a_server_without_a_file_takes_no_votes(served: dict[str, Any]) -> None:
    assert call(served["no votes"] + "compare/votes", VOTE).status == 404


def some_rows(text: str = "No.", count: int = 1) -> list[PreferenceRow]:
    sampling = (0.0, 1.0, None, None)
    facts = facts_of_vote(base="b", template_sha256="0", sampling=sampling, prompt=[Message("user", "x")])
    answers = [VotedAnswer(model="b", content=words, finish_reason="stop") for words in (text, "Yes.")]
    return preferences(answers, 0, facts) * count


def test_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: append_rows(path, some_rows(f"{i} " + "y" * 5000, count=2)), range(64)))
    rows = rows_of(path)
    texts = [row["chosen"][0]["content"].split()[0] for row in rows]
    assert sorted(texts) == sorted(str(i) for i in range(64) for _ in range(2))
    assert all(texts[i] == texts[i + 1] for i in range(0, 128, 2)), "the rows of a vote stand together"


def test_a_file_has_a_most_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "votes.jsonl"
    append_rows(path, some_rows())
    before = path.read_bytes()
    monkeypatch.setattr(votes_module, "MOST_BYTES", len(before) + 10)
    with pytest.raises(VotesFull, match="reached"):
        append_rows(path, some_rows())
    assert path.read_bytes() == before


def test_half_a_row_is_taken_back(tmp_path: Path) -> None:
    """The system allows 40 more bytes: a real short write, then a real error."""
    path = tmp_path / "votes.jsonl"
    append_rows(path, some_rows())
    before = path.read_bytes()
    with most_file_bytes(len(before) + 40), pytest.raises(VotesFull, match="cannot be written"):
        append_rows(path, some_rows())
    assert path.read_bytes() == before
    append_rows(path, some_rows())
    assert len(rows_of(path)) == 2


@contextlib.contextmanager
def most_file_bytes(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_that_somebody_left_unfinished_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    path.write_text('{"half": ')
    append_rows(path, some_rows())
    half, row = path.read_text(encoding="utf-8").splitlines()
    assert half == '{"half": ' and PreferenceRow.model_validate_json(row).base == "b"


def test_a_folder_that_cannot_be_written_is_said(served: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VotesFull) as caught:
        append_rows(tmp_path / "file" / "votes.jsonl", some_rows())
    assert str(tmp_path) not in str(caught.value)

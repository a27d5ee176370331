"""The chat's state and screen, as properties: what is remembered, what is saved, what reaches the terminal."""

from __future__ import annotations

import io
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from lora_tune.data.formats import FIELDS, FORMATS
from lora_tune.errors import UsageError
from lora_tune.serving.adapter_names import name_of, named_folders
from lora_tune.serving.backend import Sampling
from lora_tune.serving.chat_commands import COMMANDS, act
from lora_tune.serving.chat_screen import Column, Plain, SideBySide, wrapped
from lora_tune.serving.chat_session import Said, Session, changed, settings_line
from lora_tune.serving.settings import MODEL_NAME

WORDS = st.text(alphabet=st.characters(codec="utf-8"), max_size=30)
ENDS = st.sampled_from(["stop", "length", "cancelled"])
LINES = st.one_of(
    st.sampled_from(
        [
            "/base",
            "/adapter one",
            "/adapter two",
            "/both",
            "/both two",
            "/both one two",
            "/retry",
            "/new",
            "/system Be.",
        ]
    ),
    WORDS.filter(lambda text: text.strip() != ""),
)
FIELD_NAMES = {name: name for name in FIELDS["messages"]}
GREEDY = Sampling(max_new_tokens=16)


def session(**keys: object) -> Session:
    return Session("base", ("one", "two"), sampling=GREEDY, **keys)  # type: ignore[arg-type]


def played(lines: list[tuple[str, str, str]]) -> Session:
    """A session after these lines; each question is answered with a text and an end, by all who speak."""
    chat = session()
    for line, text, end in lines:
        try:
            outcome = act(chat, line)
        except UsageError:
            continue
        if outcome.then == "answer":
            for model in chat.speakers:
                chat.turns[-1].answers[model] = Said(f"{text}{model}" if text.strip() else text, end)  # type: ignore[arg-type]
    return chat


@given(st.lists(st.tuples(LINES, WORDS, ENDS), max_size=12), WORDS)
def test_what_a_model_is_told_is_a_conversation(lines: list[tuple[str, str, str]], next_words: str) -> None:
    chat = played(lines)
    for model in ("base", "one", "two"):
        told = chat.messages(model, last=next_words)
        turns = told[1:] if told[0].role == "system" else told
        assert (told[0].role == "system") == bool(chat.system)
        assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2) + ["user"]
        assert all(turn.content.strip() for turn in turns[1::2]) and turns[-1].content == next_words
        for asked, answer in zip(turns[:-1:2], turns[1::2], strict=True):  # its own words, where it said some
            known = [turn for turn in chat.turns if turn.asked == asked.content]
            said = [turn.answers[model].text for turn in known if model in turn.answers]
            own = [text for text in said if text.strip()]
            assert not own or answer.content in own or len(own) < len(known)


@given(st.lists(st.tuples(LINES, WORDS, ENDS), max_size=12))
def test_a_saved_row_is_one_that_training_reads_and_learns_whole_answers_of_alone(
    lines: list[tuple[str, str, str]],
) -> None:
    chat = played(lines)
    for model in ("base", "one", "two"):
        row = chat.row(model)
        whole = [turn for turn in chat.turns if (said := turn.answer_for(model)) is not None and said.whole]
        if row is None:
            assert not whole
            continue
        read = FORMATS["messages"](json.loads(json.dumps(row)), FIELD_NAMES)
        answers = [message for message in read.messages if message.role == "assistant"]
        assert sum(message.weight for message in answers) == len(whole)
        assert not answers or read.messages[-1].weight == 1


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5))
def test_both_sides_draw_with_one_seed_and_retry_with_another(seeds: list[int]) -> None:
    chat = session()
    act(chat, "/set temperature=1")
    for seed in seeds:
        act(chat, f"/set seed={seed}")
        act(chat, "x")
        assert chat.sampling_of(chat.turns[-1]).seed == seed
        act(chat, "/retry")
        assert chat.sampling_of(chat.turns[-1]).seed == (seed + 1) % 2**31


def test_without_a_seed_every_question_has_its_own() -> None:
    chat = session()
    for _ in range(5):
        act(chat, "x")
    assert len({turn.seed for turn in chat.turns}) == 5


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/bass", "did you mean /base"),
        ("/adapter thre", "no such model"),
        ("/adapter", "which one of one, two"),
        ("/adapter base", "is the base"),
        ("/both one one", "twice"),
        ("/both one two base", "two columns"),
        ("/retry", "nothing has been asked"),
        ("/save", "where to"),
        ("/save x.jsonl", "no whole answer"),
        ("/tokens", "nothing has been asked"),
        ("/base now", "takes no words"),
        ("/set temprature=1", "did you mean temperature="),
        ("/set temperature=warm", "0 to 10"),
        ("/set temperature=nan", "0 to 10"),
        ("/set top_p=0", "above 0"),
        ("/set max_new_tokens=0", "1 to"),
        ("/set seed=-1", "2147483647"),
        ("/zzz", "/help lists them"),
    ],
)
def test_a_line_that_cannot_be_carried_out_changes_nothing(line: str, reason: str) -> None:
    chat = session()
    with pytest.raises(UsageError, match=re.escape(reason)):
        act(chat, line)
    assert (chat.speakers, chat.turns, chat.sampling, chat.system) == (("one",), [], GREEDY, "")


def test_without_adapters_the_base_answers_and_the_rest_is_said() -> None:
    chat = Session("base", (), sampling=GREEDY)
    assert chat.speakers == ("base",)
    for line in ("/adapter", "/both"):
        with pytest.raises(UsageError, match="no adapter was loaded"):
            act(chat, line)


def test_words_that_begin_with_a_slash_take_two() -> None:
    chat = session()
    assert act(chat, "//etc/passwd").then == "answer" and chat.turns[-1].asked == "/etc/passwd"


def test_help_names_every_command() -> None:
    said = act(session(), "/help").note
    assert all(f"/{name}" in said and one.help in said for name, one in COMMANDS.items())
    assert max(map(len, said.splitlines())) <= 110


@given(
    st.floats(0, 10),
    st.floats(0.001, 1),
    st.integers(0, 100),
    st.integers(1, 9999),
    st.none() | st.integers(0, 2**31 - 1),
)
def test_the_settings_line_is_what_set_takes(
    temperature: float, top_p: float, top_k: int, tokens: int, seed: int | None
) -> None:
    sampling = Sampling(tokens, temperature, top_p, top_k, seed, stop=("END", "\n\n"))
    assert changed(GREEDY, tuple(settings_line(sampling).split())) == sampling


def test_save_appends_whole_lines_whatever_the_file_ends_with(tmp_path: Path) -> None:
    chat = session()
    act(chat, "Who?")
    chat.turns[-1].answers["one"] = Said("Ann, ä 🙂", "stop")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}')  # without a line's end
    for _ in range(2):
        assert "1 answers" in act(chat, f"/save {path}").note
    lines = path.read_text(encoding="utf-8").splitlines()
    expected = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann, ä 🙂"}]}
    assert [json.loads(line) for line in lines] == [{"a": 1}, expected, expected]
    with pytest.raises(UsageError, match="cannot be written"):
        act(chat, f"/save {tmp_path}")


# the screen


@given(st.text(max_size=200), st.integers(2, 30))
def test_a_wrapped_line_fits_and_loses_nothing_but_spaces(text: str, width: int) -> None:
    line = text.replace("\n", " ")
    rows = wrapped(line, width)
    assert all(cell_len(row.rstrip(" ")) <= width for row in rows)
    assert "".join(rows).replace(" ", "") == line.replace(" ", "")


@given(st.text(max_size=120), st.lists(st.integers(0, 120), max_size=8), st.integers(2, 30))
def test_rows_do_not_depend_on_the_pieces_and_never_change_once_shown(text: str, cuts: list[int], width: int) -> None:
    whole, growing = Column(width), Column(width)
    whole.feed(text)
    shown: list[str] = []
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for start, end in pairwise(places):
        growing.feed(text[start:end])
        assert growing.rows[: len(shown)] == shown
        shown = list(growing.rows)
    whole.end()
    growing.end()
    assert growing.rows == whole.rows


def screen_of(written: str) -> list[str]:
    """What a terminal shows that knows no more than returns and line ends."""
    rows, column = [""], 0
    for character in written:
        if character == "\n":
            rows.append("")
            column = 0
        elif character == "\r":
            column = 0
        else:
            rows[-1] = rows[-1][:column] + character + rows[-1][column + 1 :]
            column += 1
    return rows


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 1), st.text(alphabet="ab cd\nxyz", max_size=25)), max_size=12))
def test_two_columns_show_both_answers(pieces: list[tuple[int, str]]) -> None:
    out = io.StringIO()
    screen = SideBySide(out, ("base", "adapter"), width=40)
    texts = ["", ""]
    for column, text in pieces:
        screen.piece(column, text)
        texts[column] += text
    for column in (1, 0):
        screen.end(column, Said(texts[column], "stop"))
    rows = screen_of(out.getvalue())
    assert rows[0].split() == ["base", "│", "adapter"] and rows[-1].strip(" │") == ""
    assert all(len(row) < 40 for row in rows)
    for column in (0, 1):
        shown = "".join(row.split("│")[column] for row in rows[2:-1])
        assert shown.split() == "".join(texts[column]).split() or "".join(shown.split()) == "".join(
            texts[column].split()
        )


@given(st.lists(st.text(max_size=20), max_size=6))
def test_no_control_character_reaches_the_terminal(pieces: list[str]) -> None:
    for screen_type in ("plain", "columns"):
        out = io.StringIO()
        screen = Plain(out, ("a",)) if screen_type == "plain" else SideBySide(out, ("a", "b"), width=60)
        for piece in [*pieces, "\x1b[2J\x1b]0;title\x07\x9b31m\u202e"]:
            screen.piece(0, piece)
        for column in range(1 if screen_type == "plain" else 2):
            screen.end(column, Said("x", "stop"))
        allowed = "\n\t" if screen_type == "plain" else "\n\r"
        assert not [one for one in out.getvalue() if (ord(one) < 32 or 127 <= ord(one) < 160) and one not in allowed]
        assert "\u202e" not in out.getvalue()
        assert screen_type == "columns" or "\\x1b[2J" in out.getvalue()


# names of adapters


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=80))
def test_a_name_made_of_a_folder_is_one_or_is_refused(folder: str) -> None:
    name = name_of(Path("/x") / folder)
    assert MODEL_NAME.fullmatch(name) or not re.search("[a-z0-9]", name) or len(name) == 0


def test_folders_and_folders_of_folders(tmp_path: Path) -> None:
    for name in ("Alpaca 7B", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    assert list(named_folders([str(tmp_path)])) == ["alpaca-7b", "two"]
    assert named_folders([f"x={tmp_path / 'two'}", str(tmp_path / "two")]) == {
        "x": tmp_path / "two",
        "two": tmp_path / "two",
    }
    for wrong in (["x=/nowhere"], [str(tmp_path / "notes")], [f"Ä={tmp_path / 'two'}"], ["/nowhere"]):
        with pytest.raises(UsageError):
            named_folders(wrong)
    with pytest.raises(UsageError, match="two adapters would be called 'two'"):
        named_folders([f"two={tmp_path / 'Alpaca 7B'}", str(tmp_path / "two")])

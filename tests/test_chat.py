"""`lora-tune chat` on real models: through a pipe, and typed into a real pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import re
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from finished import write_finished

from lora_tune.adapter.at_hand import chat_of_folder
from lora_tune.adapter.load import load_adapter
from lora_tune.cli import main
from lora_tune.data.conversation import Message
from lora_tune.model.base import load_base
from lora_tune.model.generation import generate
from lora_tune.model.source import find_base
from lora_tune.recipe import Base
from lora_tune.serving.chat_prompt import history_file, line_reader
from lora_tune.terminal import printable

Told = Callable[..., tuple[int, str, str]]
TOKENS = 24


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Path]:
    """Two adapter folders over the tiny base."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, rank in (("one", 4), ("two", 2)):
        write_finished(folder / name, tiny_base, lora={"rank": rank, "alpha": 16})
    return {name: folder / name for name in ("one", "two")}


@pytest.fixture
def told(
    adapters: dict[str, Path],
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Told:
    """Pipes lines into `lora-tune chat`; exit code, stdout, stderr."""

    def tell(lines: str | bytes, *words: str) -> tuple[int, str, str]:
        data = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        folders = [str(folder) for folder in adapters.values()]
        given = [] if "--base" in words and "alone" in words else folders
        rest = [word for word in words if word != "alone"]
        rest += [] if "--base" in words else ["--base", str(tiny_base)]
        code = main(["chat", *given, f"--max-new-tokens={TOKENS}", *rest])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return tell


@pytest.fixture(scope="module")
def solo(adapters: dict[str, Path], tiny_base: Path) -> Callable[[str, list[Message]], str]:
    """What a model answers by itself, without the serving engine: greedy search of `model/generation.py`."""

    def answer(name: str, turns: list[Message]) -> str:
        base = Base.model_validate({"name": str(tiny_base), "quantize": "none", "compute_dtype": "float32"})
        model = load_base(find_base(base), base)
        chat = chat_of_folder(adapters["one"])
        loaded = load_adapter(model, adapters[name]) if name in adapters else model
        (found,) = generate(loaded, chat, [chat.prompt_ids(turns)], max_new_tokens=TOKENS)
        return str(chat.tokenizer.decode(found.ids, skip_special_tokens=True))

    return answer


def test_a_pipe_prints_the_answers_and_nothing_else(told: Told, solo: Callable[[str, list[Message]], str]) -> None:
    code, out, err = told("Hello\n\nAnd you?\n", "--json")
    assert (code, err) == (0, "")
    first, second = json.loads(out)["turns"]
    asked = Message("user", "Hello")
    assert first["answers"]["one"]["text"] == solo("one", [asked])
    assert second["prompt"] == "And you?"  # told with the first answer before it
    answer = Message("assistant", first["answers"]["one"]["text"])
    assert second["answers"]["one"]["text"] == solo("one", [asked, answer, Message("user", "And you?")])
    code, out, _ = told("Hello\nAnd you?\n")
    shown = [printable(turn["answers"]["one"]["text"]) for turn in (first, second)]
    assert code == 0 and out == "".join(text if text.endswith("\n") else f"{text}\n" for text in shown)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out)


def test_commands_of_a_pipe_change_who_answers_how(
    told: Told, solo: Callable[[str, list[Message]], str], adapters: dict[str, Path]
) -> None:
    lines = "/system Be brief.\n/base\nHi\n/new\n/adapter two\nHi\n/both one two\n/new\nHi\n"
    code, out, _ = told(lines, "--json")
    system, asked = Message("system", "Be brief."), Message("user", "Hi")
    (last,) = json.loads(out)["turns"]
    assert code == 0 and set(last["answers"]) == {"one", "two"}
    for name in ("one", "two"):
        assert last["answers"][name]["text"] == solo(name, [system, asked])
    code, out, err = told("/base\n/tokens Hi\n")
    chat = chat_of_folder(adapters["one"])
    ids = [int(found) for found in re.findall(r"·(\d+)(?=\s|$)", out)]
    assert code == 0 and ids == chat.prompt_ids([asked]) and "answers" in err


@pytest.mark.parametrize(
    ("lines", "words", "said"),
    [
        ("/frobnicate\n", (), "no such command, got /frobnicate"),
        ("x" * 900 + "\n", (), "tokens, and one holds 512 with the answer"),
        (b"\xff\xfe\n", (), "standard input:1: is no UTF-8 text"),
        ("Hi\n", ("--temperature=-1",), "temperature must be 0 to 10"),
        ("Hi\n", ("--quantize=nf5",), "--quantize"),
        ("Hi\n", ("--seed=x",), "seed must be"),
        ("Hi\n", ("/nowhere",), "no such adapter folder"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    told: Told, lines: str | bytes, words: tuple[str, ...], said: str
) -> None:
    code, out, err = told(lines, *words)
    assert code == 2 and said in err and out == "" and len(err.strip().splitlines()) == 1
    code, out, _ = told(lines, *words, "--json")
    assert code == 2 and said.split(": ")[-1] in str(json.loads(out)["problems"])


def test_the_base_alone_can_be_talked_to(
    told: Told, tiny_base: Path, solo: Callable[[str, list[Message]], str]
) -> None:
    code, out, _ = told("Hi\n", "--base", str(tiny_base), "alone", "--json")
    ((name, answer),) = json.loads(out)["turns"][0]["answers"].items()
    assert code == 0 and name == tiny_base.name and answer["text"] == solo("base", [Message("user", "Hi")])
    assert main(["chat"]) == 2


def test_answers_do_not_depend_on_who_answers_beside(told: Told) -> None:
    settings = ("--temperature=1", "--seed=7", "--json")
    together = json.loads(told("/both one two\nHi\n", *settings)[1])["turns"][0]["answers"]
    for name in ("one", "two"):
        alone = json.loads(told(f"/adapter {name}\nHi\n", *settings)[1])["turns"][0]["answers"]
        assert alone[name] == together[name]


# typed


class Terminal:
    """A chat in a pseudo-terminal: what it shows, and keys typed into it."""

    def __init__(self, words: list[str], *, columns: int, state: Path) -> None:
        import fcntl
        import pty
        import termios

        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        environment = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(state), "PROMPT_TOOLKIT_NO_CPR": "1"}
        environment.pop("COLUMNS", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lora_tune", "chat", *words],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.shown = ""
        self._read_to = 0

    def wait_for(self, pattern: str, *, seconds: float = 60) -> re.Match[str]:
        """Read on until something new matches."""
        end = time.monotonic() + seconds
        while True:
            text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]", "", self.shown[self._read_to :])
            if found := re.search(pattern, text, re.DOTALL):
                self._read_to = len(self.shown)
                return found
            assert time.monotonic() < end, f"{pattern!r} is not in {text[-600:]!r}"
            if select.select([self._master], [], [], 1)[0]:
                try:
                    self.shown += os.read(self._master, 65536).decode(errors="replace")
                except OSError:  # it has ended
                    assert re.search(pattern, self.shown), self.shown[-2000:]

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(tmp_path: Path, root: Path) -> Iterator[Callable[..., Terminal]]:
    """Opens a terminal; it is closed at the end of the test."""
    opened: list[Terminal] = []

    def start(*words: str, columns: int) -> Terminal:
        opened.append(Terminal(list(words), columns=columns, state=tmp_path))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_typed_chat(terminal: Callable[..., Terminal], root: Path, tmp_path: Path) -> None:
    """Streaming, Ctrl-C that stops an answer and not the chat, history, two columns, and both ways out."""
    place = terminal(str(root / "adapters" / "example"), columns=130)
    place.wait_for(r"/help lists the commands.*example> ?$")
    place.type("/set max_new_tokens=900 temperature=1 seed=3\r")
    place.wait_for(r"seed=3.*example> ?$")
    place.type("/base\r")
    place.wait_for("quickstart answers.*> ?$")
    place.type("Tell a story of the mushrooms.\r")
    place.wait_for(r"mushrooms\.\s.*\w+ \w+ \w+")  # words have come and no new prompt: it streams
    place.type("\x03")
    place.wait_for(r"stopped.*quickstart> ?$")
    assert place.process.poll() is None
    place.type("/set max_new_tokens=12\r")
    place.wait_for(r"max_new_tokens=12.*> ?$")
    place.type("/both\r")
    place.wait_for(r"builtin:quickstart \| example> ?$")
    place.type("\x1b[A\x1b[A\x1b[A\r")  # the line before /both and /set
    place.wait_for(r"builtin:quickstart +│ example +.*─┼─.*│.*builtin:quickstart \| example> ?$")
    place.type("/new\r/adapter\r/set temperature=0\rHello\r")
    place.wait_for(r"temperature=0.*example> Hello.*example> ?$")
    place.type(f"/save {tmp_path / 'rows.jsonl'}\r")
    place.wait_for("a row with 1 answers.*> ?$")
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] and "weight" not in row["messages"][1]
    place.type("\x03")
    place.wait_for("Ctrl-C once more.*> ?$")
    place.type("\x04")
    assert place.process.wait(timeout=60) == 0
    kept = [line[1:] for line in (tmp_path / "lora_tune" / "chat_history").read_text().splitlines() if line[:1] == "+"]
    assert kept.count("Tell a story of the mushrooms.") == 2 and kept[1] == "/base"
    assert (tmp_path / "lora_tune" / "chat_history").stat().st_mode & 0o077 == 0


def test_lines_are_kept_for_the_next_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for keys, line in (("first\x1b\rline\r", "first\nline"), ("/base\r", "/base")):
        with create_pipe_input() as given, create_app_session(input=given, output=DummyOutput()):
            given.send_text(keys)
            assert line_reader(["/base", "/both"])("> ").rstrip() == line
    kept = list(FileHistory(str(history_file())).load_history_strings())
    assert [line.rstrip() for line in kept] == ["/base", "first\nline"]  # the latest first, as Up finds them
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null/nowhere")
    assert history_file() is None

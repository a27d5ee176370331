"""`lora-tune generate`: the answers of the model one by one, whatever happened on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import finished
import pytest
import torch
from filelock import FileLock

from lora_tune.adapter.at_hand import chat_of_folder
from lora_tune.cli import main
from lora_tune.data.conversation import Message
from lora_tune.data.questions_file import read_questions
from lora_tune.errors import DataError
from lora_tune.evaluation.answers_file import AnswersFile
from lora_tune.interrupts import Stop
from lora_tune.model.generation import generate

ROWS: list[dict[str, Any]] = [
    {"prompt": "What is up?"},
    {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}], "id": "b"},
    {"instruction": "Add", "input": "1 and 2", "output": "3"},
    {"instruction": "Say hi"},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "an answer that is known"}]},
    *({"prompt": "word " * number} for number in range(1, 8)),
]
ASKED = [
    [("user", "What is up?")], [("system", "Be short."), ("user", "Hello")], [("user", "Add\n\n1 and 2")],
    [("user", "Say hi")], [("user", "Hello")], *([("user", "word " * number)] for number in range(1, 8)),
]  # fmt: skip
SHORT = ("--max-new-tokens", "12", "--batch-size", "4")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, Any]:
    """A folder with an adapter, its base and prompts; and the model."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "base").symlink_to(tiny_base)
    model = finished.write_finished(folder / "adapter", folder / "base")
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder, model


def ask(place: tuple[Path, Any], out: Path, *more: str) -> int:
    """The command on the prompts above."""
    folder = place[0]
    command = ["generate", str(folder / "adapter"), "--data", str(folder / "in.jsonl"), "--out", str(out)]
    return main([*command, "--base", str(folder / "base"), *SHORT, *more])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_hand(place: tuple[Path, Any], *, adapter: bool) -> list[str]:
    """The answers from the model itself, one prompt at a time."""
    folder, model = place
    chat = chat_of_folder(folder / "adapter")
    prompts = [chat.prompt_ids([Message(role, text) for role, text in turns]) for turns in ASKED]  # type: ignore[arg-type]
    if adapter:
        return [answer.text for answer in generate(model, chat, prompts, max_new_tokens=12, batch_size=1)]
    with model.disable_adapter():
        return [answer.text for answer in generate(model, chat, prompts, max_new_tokens=12, batch_size=1)]


def test_every_prompt_is_answered_in_order(place: tuple[Path, Any], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert ask(place, out) == 0
    found = lines(out)
    assert [row["answer"] for row in found] == by_hand(place, adapter=True)
    assert [row["line"] for row in found] == list(range(1, 13)) and found[1]["id"] == "b"
    assert found[0]["prompt"] == "What is up?" and found[1]["messages"][0]["role"] == "system"
    assert set(found[0]) == {"line", "prompt", "answer", "stopped", "tokens"}
    assert os.listdir(tmp_path) == ["out.jsonl"]
    alone = tmp_path / "base.jsonl"
    assert ask(place, alone, "--base-only") == 0
    assert [row["answer"] for row in lines(alone)] == by_hand(place, adapter=False)
    assert lines(alone) != found


@pytest.mark.parametrize("more", [(), ("--temperature", "0.9", "--top-p", "0.95", "--top-k", "50", "--seed", "7")])
@pytest.mark.parametrize("damage", ["none", "half a line", "a line of zeros", "one row of a batch"])
def test_a_stopped_command_goes_on_to_the_same_answers(
    place: tuple[Path, Any], tmp_path: Path, more: tuple[str, ...], damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert ask(place, whole, *more) == 0
    add, added = AnswersFile.add, list[int]()

    def once(self: AnswersFile, rows: dict[int, Any]) -> None:
        if added:
            raise Stop(signal.SIGTERM)
        added.append(len(rows))
        add(self, rows)

    monkeypatch.setattr(AnswersFile, "add", once)
    assert ask(place, out, *more) == 128 + signal.SIGTERM
    monkeypatch.undo()
    part = tmp_path / "out.jsonl.part"
    assert not out.exists() and len(part.read_text().splitlines()) == 1 + added[0]
    kept = added[0]
    if damage == "half a line":
        part.write_bytes(part.read_bytes() + b'{"row": 3, "answer": "ha')
    if damage == "a line of zeros":
        part.write_bytes(part.read_bytes() + bytes(40) + b"\n")
    if damage == "one row of a batch":
        part.write_bytes(b"".join(part.read_bytes().splitlines(keepends=True)[:-1]) + b'{"row"')
        kept -= 1
    before = part.read_bytes().splitlines()[: 1 + kept]
    seen: list[int] = []

    def watched(self: AnswersFile, rows: dict[int, Any]) -> None:
        seen.extend(set(rows) - set(self.done))
        add(self, rows)

    monkeypatch.setattr(AnswersFile, "add", watched)
    assert ask(place, out, *more) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert len(seen) == 12 - kept and len(before) == 1 + kept and not part.exists()


def test_a_killed_command_leaves_no_output_and_goes_on(
    place: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = place[0], tmp_path / "out.jsonl"
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"prompt": f"Tell {number}"}) + "\n" for number in range(400)))
    command = [sys.executable, "-m", "lora_tune", "generate", str(folder / "adapter"), "--data", str(many)]
    command += ["--out", str(out), "--base", str(folder / "base"), "--max-new-tokens", "24", "--batch-size", "8"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = tmp_path / "out.jsonl.part"
    until = time.monotonic() + 60
    while (
        (not part.exists() or part.read_bytes().count(b"\n") < 20) and time.monotonic() < until and child.poll() is None
    ):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = part.read_bytes().count(b"\n") - 1
    assert kept >= 8 and not out.exists()
    assert main([*command[3:], "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rows"] == 400 and said["kept"] == kept and len(lines(out)) == 400
    assert [row["prompt"] for row in lines(out)] == [f"Tell {number}" for number in range(400)]


def test_answers_of_other_settings_are_not_mixed(
    place: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    part.write_text('{"settings": "of another"}\n')
    assert ask(place, out) == 2 and "start again with --overwrite" in capsys.readouterr().err
    assert ask(place, out, "--overwrite") == 0 and len(lines(out)) == 12
    assert ask(place, out) == 2 and "is there already" in capsys.readouterr().err
    with FileLock(tmp_path / ".busy.jsonl.lock"):
        assert ask(place, tmp_path / "busy.jsonl") == 2
    assert "another command is writing it" in capsys.readouterr().err


WRONG: list[tuple[tuple[str, ...], str]] = [
    (("--data", "missing.jsonl"), "missing.jsonl: --data: no such file"),
    (("--out", "."), "is a folder"),
    (("--out", "no/such/out.jsonl"), "its folder is missing"),
    (("--top-p", "0.5"), "temperature 0 draws nothing"),
    (("--temperature", "-1"), "temperature"),
]


@pytest.mark.parametrize(("more", "line"), WRONG)
def test_what_is_wrong_is_said_before_the_base_is_loaded(
    place: tuple[Path, Any],
    tmp_path: Path,
    more: tuple[str, ...],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lora_tune.model.base.load_base", lambda *given, **named: pytest.fail("the base is loaded"))
    assert ask(place, tmp_path / "out.jsonl", *more) == 2
    assert line in capsys.readouterr().err.replace("\n", " ")


def test_rows_without_a_prompt_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": ""}\n{"question": "x"}\n{"prompt": 3}\nnot JSON\n{"messages": "x"}\n{"messages": []}\n')
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert [problem.line for problem in caught.value.problems] == [1, 2, 3, 4, 5, 6]
    path.write_text("")
    with pytest.raises(DataError, match="no rows"):
        read_questions(path)


def test_nothing_random_is_touched(place: tuple[Path, Any], tmp_path: Path) -> None:
    state = torch.get_rng_state()
    assert ask(place, tmp_path / "out.jsonl", "--temperature", "1") == 0
    assert torch.equal(state, torch.get_rng_state())

"""A file of prompts to be answered: one conversation a row, up to the turn that the model writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.data.conversation import Message
from lora_tune.data.messages import message, must_be_text, tools
from lora_tune.data.readers import read_file
from lora_tune.data.rows import BadRow, kind_of
from lora_tune.data.sources import shown_path
from lora_tune.errors import DataError, Problem, UsageError

_FIX = "a row has `messages`, `prompt` (text or turns), or `instruction` with or without `input`"


@dataclass(frozen=True, slots=True)
class AskedRow:
    """One row: where it stands, what is asked, and the `id` that it has or not."""

    line: int
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    id: Any = None


def read_questions(path: Path) -> list[AskedRow]:
    """Every row of a file (.jsonl .json .csv .tsv .parquet .txt, also .gz), in order.

    A row is `messages` in the form of the OpenAI API, `prompt` (a text, or such turns), or `instruction` and `input`;
    `system` and `tools` may stand beside them. An answer at the end is not read: the model is asked for its own.

    Raises: UsageError where the file cannot be read, DataError naming every row without a prompt, or without rows.
    """
    if not path.is_file():
        raise UsageError(Problem("no such file", "name a file of prompts", str(path), key="--data"))
    shown = shown_path(path)
    rows: list[AskedRow] = []
    problems: list[Problem] = []
    try:
        for record in read_file(path):
            try:
                if record.bad is not None:
                    raise record.bad
                rows.append(_asked(record.row or {}, record.line))
            except BadRow as bad:
                problems.append(bad.as_problem(shown, record.line))
    except OSError as error:
        raise UsageError(Problem(f"cannot be read: {error.strerror}", "check the file", shown)) from None
    if not rows and not problems:
        problems = [Problem("no rows", "check that the right file is named", file=shown)]
    if problems:
        raise DataError(problems)
    return rows


def _asked(row: Mapping[str, Any], line: int) -> AskedRow:
    """A row as what is asked. Raises: BadRow."""
    turns = _turns(row)
    while turns and turns[-1].role == "assistant":
        turns.pop()
    if not turns:
        raise BadRow("empty prompt", "nothing is asked", fix=_FIX)
    if row.get("system") and turns[0].role != "system":
        turns.insert(0, Message("system", _text(row, "system")))
    return AskedRow(line, tuple(turns), tools(row.get("tools")), row.get("id"))


def _turns(row: Mapping[str, Any]) -> list[Message]:
    """The turns of a row. Raises: BadRow."""
    for name in ("messages", "prompt"):
        given = row.get(name)
        if isinstance(given, list):
            return [message(turn, number) for number, turn in enumerate(given, 1)]
        if given is not None and name == "messages":
            raise BadRow("wrong shape", f"`messages` must be a list, got {kind_of(given)}", fix=_FIX)
    for name in ("prompt", "instruction", "text"):
        if name in row:
            said = _text(row, name)
            more = _text(row, "input") if name == "instruction" and row.get("input") else ""
            if not (said + more).strip():
                raise BadRow("empty prompt", f"`{name}` is empty", fix="drop the row")
            return [Message("user", f"{said}\n\n{more}" if more else said)]
    got = ", ".join(f"`{name}`" for name in list(row)[:5]) or "nothing"
    raise BadRow("wrong shape", f"no prompt, got {got}", fix=_FIX)


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise BadRow("wrong shape", f"`{name}` {must_be_text(value)}", fix=_FIX)
    return value

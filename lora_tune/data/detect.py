"""`format: auto`: the format of a source from its first rows, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_tune.data.formats import FIELDS, NAMED_ONLY, NEEDED, fields_of
from lora_tune.data.rows import BadRow, did_you_mean

LOOKED_AT = 20  # rows
_CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
_QUESTIONS = (  # column of the prompt, of the completion, of a system turn
    ("prompt", "completion"),
    ("inputs", "targets"),
    ("question", "answer"),
    ("prompt", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("instruction", "completion"),
    ("input", "output"),
)
_REFUSED = {
    frozenset({"chosen", "rejected"}): "preference pairs (chosen, rejected); lora_tune trains on answers",
    frozenset(
        {"messages", "label"}
    ): "preference labels (messages, label: true or false); lora_tune would train bad answers as well",
    frozenset({"instruction", "instances"}): "self-instruct rows with a list of instances, which is not supported",
}


@dataclass(frozen=True)
class Detected:
    """A format, its columns, and why it was taken."""

    format: str
    fields: dict[str, str]
    why: str


def chosen(name: str, columns: Mapping[str, str] | None, rows: Sequence[Mapping[str, Any]]) -> Detected:
    """The format that the recipe names, or for `auto` the one that the first rows (at most LOOKED_AT) fit.

    Raises: BadRow where no format fits; its reason speaks of the first row.
    """
    if name != "auto":
        return Detected(name, fields_of(name, columns), "named in the recipe")
    for row in rows[:LOOKED_AT]:
        found = _detect(row, columns)
        if found is not None:
            return found
    first = rows[0]
    got = ", ".join(f"`{key}`" for key in list(first)[:6]) + (" …" if len(first) > 6 else "")
    raise BadRow("wrong shape", f"no format fits the columns {got or '(none)'}", fix=_advice(first))


def _advice(row: Mapping[str, Any]) -> str:
    guessed = [name for name in FIELDS if name not in NAMED_ONLY]
    known = sorted({field for name in guessed for field in FIELDS[name][: NEEDED[name]]})
    for column in row:
        if column not in known and (hint := did_you_mean(column, known)):
            return f"`{column}`: {hint}"
    return "say `format: table` with `columns: {prompt: …, completion: …}` (by number where a CSV or TSV has no header)"


def _detect(row: Mapping[str, Any], columns: Mapping[str, str] | None) -> Detected | None:
    if {"Definition", "Instances"} <= set(row):
        raise BadRow("wrong shape", "this is a Super-NaturalInstructions task file", fix="say `format: sni`")
    for keys, what in _REFUSED.items():
        if keys <= set(row) and isinstance(row.get("label", True), bool):
            raise BadRow(
                "wrong shape", f"the rows look like {what}", fix="name another format to read them all the same"
            )
    if columns:
        return _by_columns(row, columns)
    for column in _CHATS:
        if (turns := row.get(column)) and isinstance(turns, list) and isinstance(turns[0], dict):
            return _chat(column, turns[0])
    if "instruction" in row and ("output" in row or "response" in row):
        answer = "output" if "output" in row else "response"
        extra = "input" if "input" in row or "context" not in row else "context"
        mapped = {"output": answer, "input": extra}
        return Detected("alpaca", fields_of("alpaca", mapped), f"columns instruction and {answer}")
    for prompt, completion in _QUESTIONS:
        if prompt in row and completion in row:
            mapped = {"prompt": prompt, "completion": completion}
            why = f"columns {prompt} and {completion}"
            return Detected("prompt_completion", fields_of("prompt_completion", mapped), why)
    if "text" in row:
        return Detected("text", fields_of("text"), "column text and none of turns or answers")
    return None


def _chat(column: str, turn: Mapping[str, Any]) -> Detected | None:
    if "from" in turn and "value" in turn:
        return Detected(
            "sharegpt", fields_of("sharegpt", {"conversations": column}), f"column {column} with from and value"
        )
    if "role" not in turn:
        return None
    name = "messages" if column == "messages" else "sharegpt"
    field = FIELDS[name][0]
    return Detected(name, fields_of(name, {field: column}), f"column {column} with role and content")


def _by_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> Detected | None:
    """The first format that has all the fields that `columns` names and whose needed columns are in the row."""
    for name, fields in FIELDS.items():
        if name in NAMED_ONLY:
            continue
        mapped = fields_of(name, columns)
        if set(columns) <= set(fields) and all(mapped[field] in row for field in fields[: NEEDED[name]]):
            if name == "prompt_completion" and not isinstance(row[mapped["prompt"]], (str, list)):
                continue
            return Detected(name, mapped, f"`columns` has the fields of {name}")
    return None

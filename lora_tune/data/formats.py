"""Data formats: from one row of a file to a conversation.

    alpaca             instruction, input (may be empty), output; system, history ([[user, assistant], …]).
                       The user's turn is the instruction, an empty line and the input.
    messages           messages: [{role, content, …}], tools; OpenAI's fine-tuning format
    sharegpt           conversations: [{from, value}], system, tools
    prompt_completion  prompt and completion: text, or lists of messages
    text               text without turns
    table              any columns, named by `columns`: prompt, completion, system, input; numbers are written out
    sni                instances of a Super-NaturalInstructions task: definition, input, output (`sni.py`)

A format is one function from (row, fields) to a conversation, one line in `FORMATS` and one in `FIELDS`. `fields` maps
each field to the column that holds it; a recipe's `columns` change that. Every function raises BadRow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lora_tune.data.conversation import Conversation, Message
from lora_tune.data.messages import check_turns, message, must_be_text, sharegpt_message, tools
from lora_tune.data.rows import BadRow, did_you_mean, kind_of
from lora_tune.data.sni import sni

Row = Mapping[str, Any]
Fields = Mapping[str, str]
RESERVED = ("input_ids", "labels", "attention_mask")
_MEDIA = ("images", "image", "videos", "audios", "audio")
_ABSENT = object()


def alpaca(row: Row, fields: Fields) -> Conversation:
    """instruction, input, output; optionally system and history."""
    user = _needed(row, fields, "instruction")
    extra = _text_or(row, fields, "input")
    answer = _needed(row, fields, "output")
    turns = _system(row, fields)
    for number, pair in enumerate(row.get(fields["history"]) or (), 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(turn, str) for turn in pair):
            raise BadRow("wrong shape", f"history {number} must be a pair of texts, got {kind_of(pair)}")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return _answered(*turns, Message("user", f"{user}\n\n{extra}" if extra else user), Message("assistant", answer))


def messages(row: Row, fields: Fields) -> Conversation:
    """messages with role and content, optionally tools."""
    return _conversation([message(turn, i) for i, turn in enumerate(_turns(row, fields, "messages"), 1)], row, fields)


def sharegpt(row: Row, fields: Fields) -> Conversation:
    """conversations with from and value, optionally system and tools."""
    turns = [sharegpt_message(turn, i) for i, turn in enumerate(_turns(row, fields, "conversations"), 1)]
    return _conversation([*_system(row, fields), *turns], row, fields)


def prompt_completion(row: Row, fields: Fields) -> Conversation:
    """prompt and completion: two texts, or two lists of messages."""
    if not isinstance(row.get(fields["prompt"]), list):
        prompt, completion = _needed(row, fields, "prompt"), _needed(row, fields, "completion")
        return _answered(*_system(row, fields), Message("user", prompt), Message("assistant", completion))
    given = [*_turns(row, fields, "prompt"), *_turns(row, fields, "completion")]
    return _conversation([*_system(row, fields), *(message(turn, i) for i, turn in enumerate(given, 1))], row, fields)


def text(row: Row, fields: Fields) -> Conversation:
    """text without turns."""
    found = _needed(row, fields, "text")
    if not found.strip():
        raise BadRow("empty text", f"`{fields['text']}` is {'blank' if found else 'empty'}", fix="drop the row")
    return Conversation(text=found)


def table(row: Row, fields: Fields) -> Conversation:
    """prompt, completion and optionally system and input from any columns; numbers are written out."""
    cells = {name: str(row[name]) if _is_number(row.get(name)) else row.get(name, _ABSENT) for name in fields.values()}
    row = {name: value for name, value in cells.items() if value is not _ABSENT}
    prompt, extra = _needed(row, fields, "prompt"), _text_or(row, fields, "input")
    user = Message("user", f"{prompt}\n\n{extra}" if extra else prompt)
    return _answered(*_system(row, fields), user, Message("assistant", _needed(row, fields, "completion")))


FORMATS: dict[str, Callable[[Row, Fields], Conversation]] = {
    "alpaca": alpaca,
    "messages": messages,
    "sharegpt": sharegpt,
    "prompt_completion": prompt_completion,
    "text": text,
    "table": table,
    "sni": sni,
}

# Fields of each format, the needed ones first; how many are needed stands in NEEDED.
FIELDS: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "output", "input", "system", "history"),
    "messages": ("messages", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "prompt_completion": ("prompt", "completion", "system", "tools"),
    "text": ("text",),
    "table": ("prompt", "completion", "system", "input"),
    "sni": ("definition", "input", "output", "examples", "task", "category"),
}
NAMED_ONLY = ("sni",)  # formats that are never guessed from columns
NEEDED = {"alpaca": 2, "messages": 1, "sharegpt": 1, "prompt_completion": 2, "text": 1, "table": 2, "sni": 3}


def fields_of(name: str, columns: Mapping[str, str] | None = None) -> dict[str, str]:
    """{field: column} of a format: the field's own name unless `columns` says another. `name`: a key of FORMATS."""
    return {field: (columns or {}).get(field, field) for field in FIELDS[name]}


def check_columns(row: Row, name: str, fields: Fields) -> None:
    """Refuse a row that lacks the columns of its format, and media that a text model cannot read. Raises: BadRow."""
    for field in FIELDS[name][: NEEDED[name]]:
        if fields[field] not in row:
            raise _missing(row, name, fields[field])
    for column in _MEDIA:
        if row.get(column):
            raise BadRow("not text", f"column `{column}` holds media; only text can be trained", fix="drop the row")


def _missing(row: Row, name: str, column: str) -> BadRow:
    if not row:
        return BadRow("wrong shape", f"`{column}` is missing: the row is empty", fix="delete the row")
    for other in row:
        if did_you_mean(other, (column,)):
            return BadRow("wrong shape", f"`{column}` is missing, got `{other}`", fix=f"did you mean `{column}`?")
    got = ", ".join(f"`{key}`" for key in list(row)[:5]) + (" …" if len(row) > 5 else "")
    for other, needed in FIELDS.items():
        if other not in ("table", name, *NAMED_ONLY) and all(field in row for field in needed[: NEEDED[other]]):
            return BadRow("wrong shape", f"`{column}` is missing, got {got}", fix=f"say `format: {other}`")
    fix = f"format {name} needs {', '.join(FIELDS[name][: NEEDED[name]])}; other names go into `columns`"
    return BadRow("wrong shape", f"`{column}` is missing, got {got}", fix=fix)


def _needed(row: Row, fields: Fields, field: str) -> str:
    value = row.get(fields[field])
    if not isinstance(value, str):
        raise BadRow("wrong shape", f"`{fields[field]}` {must_be_text(value)}")
    return value


def _text_or(row: Row, fields: Fields, field: str) -> str:
    value = row.get(fields[field])
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow("wrong shape", f"`{fields[field]}` {must_be_text(value)}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _system(row: Row, fields: Fields) -> list[Message]:
    given = _text_or(row, fields, "system")
    return [Message("system", given)] if given else []


def _turns(row: Row, fields: Fields, field: str) -> list[Any]:
    turns = row.get(fields[field])
    if not isinstance(turns, list):
        what = "is null" if turns is None else f"must be a list, got {kind_of(turns)}"
        raise BadRow("wrong shape", f"`{fields[field]}` {what}")
    if not turns:
        raise BadRow("wrong shape", f"`{fields[field]}` is empty", fix="drop the row")
    return turns


def _answered(*turns: Message) -> Conversation:
    check_turns(turns)
    return Conversation(messages=turns)


def _conversation(turns: list[Message], row: Row, fields: Fields) -> Conversation:
    check_turns(turns)
    return Conversation(messages=tuple(turns), tools=tools(row.get(fields["tools"])))

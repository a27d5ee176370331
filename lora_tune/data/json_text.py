"""Strict JSON with errors in plain words.

The standard parser, with what it lets through refused: a key twice in one object, a lone surrogate, nesting beyond
`MAX_DEPTH`. NaN and Infinity are let through, because columns that nobody reads may hold them.
"""

from __future__ import annotations

import json
import re
from json.decoder import JSONDecodeError
from typing import Any

from lora_tune.data.rows import MAX_DEPTH, BadRow, kind_of

NOT_JSON = "not JSON"
_PART = re.compile(r'"(?:[^"\\]|\\.)*"|([\[{])|([\]}])', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_PYTHON_WORD = re.compile(r"(None|True|False)\b")


class RowParser:
    """Parses rows, one after another; not for several threads at once."""

    def __init__(self) -> None:
        self._twice: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            self._twice.append(next(name for name in names if names.count(name) > 1))
        return found

    def parse(self, text: str) -> dict[str, Any]:
        """The object that `text` holds. Raises: BadRow, also for JSON that is no object."""
        check_depth(text)
        try:
            row = self._decoder.decode(text)
        except JSONDecodeError as error:
            raise BadRow(NOT_JSON, f"not JSON: {explain(error)}", column=error.pos + 1) from None
        return self.checked(row, text)

    def parse_at(self, text: str, start: int) -> tuple[Any, int]:
        """The value at `start` of a longer text, to be `checked`, and where it ends. Raises: JSONDecodeError."""
        return self._decoder.raw_decode(text, start)

    def checked(self, row: Any, text: str) -> dict[str, Any]:
        """`row`, parsed from `text`, if it is an object without repeated keys that UTF-8 can hold. Raises: BadRow."""
        if self._twice:
            name = self._twice[0]
            self._twice.clear()
            raise BadRow("duplicate key", f"key `{name}` stands twice in one object", fix="keep one of them")
        if not isinstance(row, dict):
            raise BadRow("wrong shape", f"a row must be an object, got {kind_of(row)}")
        if _SURROGATE.search(text):
            try:
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                code = ord(error.object[error.start])
                reason = f"lone surrogate \\u{code:04x} in the text: it cannot be written as UTF-8"
                raise BadRow("lone surrogate", reason, fix="remove it") from None
        return row


def check_depth(text: str) -> None:
    """Refuse text whose brackets nest deeper than MAX_DEPTH, before the parser recurses into it. Raises: BadRow."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for part in _PART.finditer(text):
        depth += (part[1] is not None) - (part[2] is not None)
        if depth > MAX_DEPTH:
            raise BadRow("wrong shape", f"nested too deep: more than {MAX_DEPTH} levels", column=part.start() + 1)


def explain(error: JSONDecodeError) -> str:
    """What the parser met, in the words of somebody who wrote the file by hand."""
    text, at = error.doc, error.pos
    rest, before = text[at : at + 12], text[max(0, at - 200) : at].rstrip()
    if "Unterminated string" in error.msg:
        return "unfinished string"
    if not rest.strip():
        return "unfinished object" if before else "nothing here"
    if "trailing comma" in error.msg or (rest[0] in "]}" and before.endswith(",")):
        return "trailing comma"
    if rest[0] == "'":
        return "single quotes, but JSON wants double quotes"
    if rest[0] in "#/":
        return "a comment; JSON has none"
    if word := _PYTHON_WORD.match(rest):
        return f"{word[1]} is Python, not JSON (null, true, false)"
    if "Extra data" in error.msg:
        return f"more text after the end of the row: {rest!r}"
    if "control character" in error.msg:
        return f"control character {rest[0]!r} inside a string; write it as an escape such as \\n"
    if "delimiter" in error.msg:
        return f"missing {'colon' if ':' in error.msg else 'comma'} or unescaped quote before {rest!r}"
    if "escape" in error.msg:
        return f"invalid escape {rest[:2]!r} in a string"
    if rest[0].isalpha():
        return f"text outside quotation marks (an unescaped quote before it?): {rest!r}"
    return f"unexpected {rest!r}"

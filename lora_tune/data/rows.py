"""One record of a data file: a row, or what is wrong with it."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, NamedTuple

from lora_tune.errors import Problem

MAX_ROW_BYTES = 1 << 20
MAX_DEPTH = 64
WHOLE_FILE = "unreadable file"


class BadRow(Exception):
    """A row that cannot be trained on: why, what to do, and the `cause` under which the ledger counts it.

    Causes are a handful of words (`not JSON`, `empty answer`, `unmapped role` …). `WHOLE_FILE` means that the rest of
    the file cannot be read either, so that `on_bad_row: drop` does not help.
    """

    def __init__(self, cause: str, reason: str, *, fix: str = "", column: int | None = None) -> None:
        super().__init__(reason)
        self.cause, self.reason, self.fix, self.column = cause, reason, fix, column

    def as_problem(self, file: str, line: int | None) -> Problem:
        """This bad row as a problem of `file:line`."""
        return Problem(self.reason, self.fix, file=file, line=line, column=self.column)


class Record(NamedTuple):
    """What stands at one place of a file; `line` counts from 1 (the record's number where a file has no lines)."""

    line: int
    row: dict[str, Any] | None
    bad: BadRow | None = None


def kind_of(value: Any) -> str:
    """The JSON type of a value in plain words, with the value where it is short: "a list", "the number 5"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {value}" if len(str(value)) < 20 else "a number"
    if isinstance(value, str):
        return "text"
    return "a list" if isinstance(value, list) else "an object"


def did_you_mean(name: str, known: list[str] | tuple[str, ...]) -> str:
    """`did you mean X?` where a known name is near, else nothing."""
    exact = [other for other in known if other.lower() == name.strip().lower()]
    near = exact or get_close_matches(name, known, n=1, cutoff=0.7)
    return f"did you mean `{near[0]}`?" if near else ""

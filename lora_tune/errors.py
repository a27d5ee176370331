"""Errors: one tree, one line for a user's mistake, one exit code for each kind.

Exit codes, everywhere: 0 ok, 1 a check was refused or a score is below its bound, 2 usage or recipe,
3 content of data, 4 memory, disk or time, 128 + N a signal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
_SHOWN = 20  # problems written in full; all of them stand in --json


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where it stands, what it is, what to do. Lines and columns count from 1."""

    reason: str
    fix: str = ""
    file: str | None = None
    line: int | None = None
    column: int | None = None
    key: str | None = None
    severity: Severity = "error"

    def __str__(self) -> str:
        """`<file>:<line>:<column>: <key>: <reason>; <fix>`, leaving out what is unknown."""
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        where = ": ".join(part for part in (place, self.key) if part)
        text = f"{where}: {self.reason}" if where else self.reason
        return f"{text}; {self.fix}" if self.fix else text

    def as_json(self) -> dict[str, str | int | None]:
        """The fields of this problem, as `--json` prints them."""
        return asdict(self)


class LoraTuneError(Exception):
    """Root of all errors that end a command with a message instead of a traceback.

    `problems` holds every single thing that is wrong, in the order in which they were found.
    """

    exit_code = 1

    def __init__(self, problems: str | Problem | Sequence[Problem], fix: str = "") -> None:
        if isinstance(problems, str):
            problems = Problem(problems, fix)
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [str(problem) for problem in self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            lines.append(f"… and {len(self.problems) - _SHOWN} more (all of them with --json)")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[type[LoraTuneError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class CheckFailed(LoraTuneError):
    """A check, an adapter or a chat template was refused, or a score is below its bound (exit 1)."""


class UsageError(LoraTuneError):
    """The command line is wrong, or a path is missing or unusable (exit 2)."""

    exit_code = 2


class RecipeError(UsageError):
    """The recipe is wrong: unknown, duplicate, missing or mistyped keys, values out of range (exit 2)."""


class DataError(LoraTuneError):
    """The content of the training or evaluation data is wrong or exceeds a limit (exit 3)."""

    exit_code = 3


class ResourceError(LoraTuneError):
    """Memory, disk or time does not suffice (exit 4)."""

    exit_code = 4


class Interrupted(LoraTuneError):
    """A signal stopped the command after its work was saved (exit 128 + number)."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int, str]]:  # type: ignore[override]
        return Interrupted, (self.signal_number, str(self))

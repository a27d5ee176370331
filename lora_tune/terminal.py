"""The terminal: results on stdout, progress and problems on stderr, and the one place that runs a command.

Colour follows the terminal and NO_COLOR. Text that comes from files is never read as markup, and its control
characters are shown instead of sent.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_tune import __version__
from lora_tune.disk import FULL, disk_text
from lora_tune.errors import Interrupted, LoraTuneError, Problem, ResourceError, UsageError
from lora_tune.interrupts import Stop, handled_by, signal_name, stop

if TYPE_CHECKING:
    import typer
    from rich.console import Console
    from rich.progress import Progress

LOG = "error.log"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_activity: list[str] = []  # what the command is doing, innermost last: for the report of a fault
_run_folder: list[Path] = []  # of a run that --resume goes on with


def printable(text: str) -> str:
    """The text with control characters (colours, cursor moves, direction marks) shown as \\x1b instead of sent."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


@cache
def results() -> Console:
    """The console for results, on stdout; no colour where it is not a terminal or NO_COLOR is set."""
    from rich.console import Console

    return Console(markup=False, highlight=False, soft_wrap=True)


@cache
def messages() -> Console:
    """The console for progress and problems, on stderr."""
    from rich.console import Console

    return Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


def print_problems(problems: Sequence[Problem], *, shown: int = 20) -> None:
    """One line a problem on stderr, errors in red, warnings in yellow; the first `shown` in full."""
    console = messages()
    styles = {"error": "red", "warning": "yellow", "note": "dim"}
    for problem in problems[:shown]:
        word = "" if problem.severity == "error" else f"{problem.severity}: "
        console.print(printable(word + str(problem)), style=styles[problem.severity])
    if len(problems) > shown:
        console.print(f"… and {len(problems) - shown} more (all of them with --json)")


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: Sequence[int] = (0,)
) -> None:
    """A table on stdout; `columns` carry their units, such as `peak (GiB)`, right-aligned but for those `left`."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(number_text(value))) for value in row))
    console = results()
    if title:
        console.print(printable(title), style="bold")
    console.print(table, soft_wrap=False)


def number_text(value: object) -> str:
    """A value for people: 1234567 as 1,234,567, floats with four digits, None as a dash, everything else as it is."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def print_json(facts: Mapping[str, Any], problems: Sequence[Problem] = ()) -> None:
    """The one object that `--json` prints: the facts and `problems`."""
    answer = {**facts, "problems": [problem.as_json() for problem in problems]}
    sys.stdout.write(json.dumps(answer, allow_nan=False) + "\n")


@contextmanager
def activity(doing: str, *, display: Literal["status", "own"] = "status") -> Iterator[None]:
    """Names what is being done (`loading the base`): on stderr if that is a terminal, and in the report of a fault.

    `display` "own": what is done shows its own progress, and nothing more is drawn.
    """
    _activity.append(doing)
    console = messages()
    if console.is_terminal and display == "status":
        with console.status(f"{printable(doing)} …"):
            yield
    else:
        yield
    _activity.pop()  # kept when an exception passes: run_app names it


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Inside, what ends the command says that `--resume` goes on, and a fault is logged in the run's `checkpoints`."""
    _run_folder.append(folder)
    yield
    _run_folder.pop()  # kept when an exception passes, as above


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A rich progress bar on stderr, with count, share and remaining time; silent where stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = messages()
    text = TextColumn("{task.description}", markup=False)
    with Progress(
        text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        yield progress


def run_app(app: typer.Typer, *, name: str, arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; the one place where an error becomes a line, or the `--json` object.

    0 ok, 1 to 4 as in errors.py, 128 + N for a signal. A fault of the program itself is named with what was being done
    (1); its traceback goes to error.log in the run's `checkpoints`, or in the cache folder.
    """
    import typer.main

    given = list(sys.argv[1:] if arguments is None else arguments)
    _activity.clear()
    _run_folder.clear()
    try:
        with handled_by(stop):
            outcome = typer.main.get_command(app).main(given, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
        return outcome if isinstance(outcome, int) else 0
    except (BrokenPipeError, SystemExit) as leaving:
        if isinstance(leaving, SystemExit) and not isinstance(leaving.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader left, as in `| head`; the rest goes nowhere
        return 141
    except Stop as stopped:
        ending = f"; {_goes_on()}" if _run_folder else ""
        reason = f"stopped by {signal_name(stopped.number)}, while {_doing(name)}{ending}"
        found: LoraTuneError = Interrupted(stopped.number, reason)
    except Exception as error:
        found = as_error(error, name)
    if "--json" in given:
        print_json({"exit_code": found.exit_code}, found.problems)
    else:
        print_problems(found.problems)
    return found.exit_code


def as_error(error: Exception, name: str) -> LoraTuneError:
    """What the user is told about an exception that ended a command."""
    import typer

    if isinstance(error, LoraTuneError):
        return error
    if isinstance(error, typer.TyperException):
        return UsageError(error.format_message().rstrip("."), f"see {name} --help")
    if isinstance(error, typer.Abort):
        return UsageError("stopped at a question", f"see {name} --help")
    if isinstance(error, OSError) and error.errno in (*FULL, errno.EIO, errno.EROFS):
        fix = f"make room; {_goes_on()}" if _run_folder else "make room"
        named = error.filename if isinstance(error.filename, str) else None
        path = Path(named) if named else _run_folder[-1] if _run_folder else Path()
        state = "is full" if error.errno in FULL else "refuses"
        return ResourceError(f"the disk {state}, while {_doing(name)}: {disk_text(error, path)}", fix)
    if isinstance(error, PermissionError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return UsageError(f"{where}permission denied, while {_doing(name)}", "allow it, or name another")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's own, without torch
        fix = "lower train.micro_batch_size or train.max_length"
        return ResourceError(f"the memory is full, while {_doing(name)}", fix)
    return _fault(error, name)


def _fault(error: Exception, name: str) -> LoraTuneError:
    """A fault of the program: what was being done, what Python said, where the traceback is."""
    said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    log = _log_folder() / LOG
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"lora_tune {__version__}\n{''.join(traceback.format_exception(error))}", encoding="utf-8")
        fix = f"please report it with {log}"
    except OSError as unwritten:
        fix = f"please report it; its traceback could not be written ({disk_text(unwritten, log)})"
    fix += f"; {_goes_on()}" if _run_folder else ""
    return LoraTuneError(f"a fault in lora_tune, while {_doing(name)}: {said}", fix)


def _goes_on() -> str:
    """From where the same command with --resume goes on: the newest checkpoint that was committed, else the start."""
    names = [path.name for path in (_run_folder[-1] / "checkpoints").glob("step-*")]
    steps = [int(digits) for name in names if (digits := name.removeprefix("step-")).isdigit()]
    where = f"goes on from step {max(steps)}" if steps else "starts at step 0, no checkpoint being there"
    return f"the same command with --resume {where}"


def _log_folder() -> Path:
    """The run's `checkpoints`, which are never shared; without a run the cache folder."""
    import platformdirs

    if _run_folder and (_run_folder[-1] / "checkpoints").is_dir():
        return _run_folder[-1] / "checkpoints"
    return Path(os.environ.get("LORA_TUNE_CACHE") or platformdirs.user_cache_dir("lora_tune", appauthor=False))


def _doing(name: str) -> str:
    return _activity[-1] if _activity else f"running {name}"

"""The ledger: what became of every row and token that was read.

For every source, and in total:

    rows.read + rows.more = rows.kept + rows.held_out + rows.left_by_max_rows + rows.skipped + sum(rows.dropped)
    tokens.read = tokens.kept + tokens.lost + tokens.dropped          (tokens.trained is a part of tokens.kept)

`more` rows come from rows that several templates of a held-out task render; `skipped` are rows to which no template
applies. `notes` count what happened to kept rows (truncated, duplicates, odd order of turns …), with the first place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from lora_tune.errors import DataError, Problem
from lora_tune.recipe import Limits
from lora_tune.recipe_values import SHARE

if TYPE_CHECKING:
    from lora_tune.data.overlap import Overlap

NO_LABEL = "no label is left"
TOO_LONG = "longer than max_length"
TRUNCATED, LOST_END, SPLIT = "truncated", "lost its end token", "split"
DUPLICATE, CONTRADICTION = "duplicate", "another answer to an earlier prompt"
CONTROL_TOKENS, STRADDLES, PER_TURN = (
    "control tokens in the text",
    "a token would straddle prompt and answer",
    "one row per turn",
)

# Notes that are worth a warning: {note: (what it means, what to do)}; other notes are in the ledger alone.
_WARNED = {
    DUPLICATE: ("repeat an earlier row", "remove repeated rows, or limit them: limits.duplicates"),
    CONTRADICTION: ("give another answer to the prompt of an earlier row", "keep one answer for each prompt"),
    CONTROL_TOKENS: (
        "hold control tokens of the template in their text, which are encoded as text",
        "check where the text is from",
    ),
    TRUNCATED: ("are cut to max_length", "raise train.max_length, or set train.too_long: split"),
    LOST_END: (
        "have lost their end token, so that they do not teach to stop",
        "raise train.max_length, or set train.too_long: drop",
    ),
}


@dataclass
class Count:
    """How many, and where the first one stands (`file:line`)."""

    rows: int = 0
    first: str | None = None

    def add(self, place: str | None, rows: int = 1) -> None:
        """Count `rows` more."""
        self.rows += rows
        self.first = self.first or place


@dataclass
class SourceLedger:
    """The account of one data source. Rows are those of the data; `token_rows` and `tokens` are after encoding."""

    name: str
    format: str = "auto"
    why: str = ""
    read: int = 0
    kept: int = 0
    held_out: int = 0
    left_by_max_rows: int = 0
    more: int = 0
    skipped: int = 0
    dropped: dict[str, Count] = field(default_factory=dict)
    notes: dict[str, Count] = field(default_factory=dict)
    unused_columns: list[str] = field(default_factory=list)
    token_rows: int = 0
    epoch_rows: int = 0
    tokens_read: int = 0
    tokens_kept: int = 0
    tokens_trained: int = 0
    tokens_lost: int = 0
    tokens_dropped: int = 0
    longest: int = 0

    @property
    def dropped_rows(self) -> int:
        """Rows dropped, for whatever cause."""
        return sum(count.rows for count in self.dropped.values())

    def drop(self, cause: str, place: str | None, rows: int = 1) -> None:
        """Count a row that is not trained."""
        self.dropped.setdefault(cause, Count()).add(place, rows)

    def note(self, what: str, place: str | None, rows: int = 1) -> None:
        """Count something that happened to a row."""
        self.notes.setdefault(what, Count()).add(place, rows)

    def balances(self) -> bool:
        """Whether every row and token read is accounted for."""
        rows = self.kept + self.held_out + self.left_by_max_rows + self.skipped + self.dropped_rows
        tokens = self.tokens_kept + self.tokens_lost + self.tokens_dropped
        return self.read + self.more == rows and self.tokens_read == tokens

    def as_json(self) -> dict[str, Any]:
        """Name, format, and the account as nested dictionaries."""
        return {
            "name": self.name,
            "format": self.format,
            "why": self.why,
            "rows": {
                "read": self.read,
                "kept": self.kept,
                "held_out": self.held_out,
                "left_by_max_rows": self.left_by_max_rows,
                "more": self.more,
                "skipped": self.skipped,
                "dropped": {cause: asdict(count) for cause, count in self.dropped.items()},
                "in_an_epoch": self.epoch_rows,
            },
            "token_rows": self.token_rows,
            "tokens": {
                "read": self.tokens_read,
                "kept": self.tokens_kept,
                "trained": self.tokens_trained,
                "lost": self.tokens_lost,
                "dropped": self.tokens_dropped,
                "longest_row": self.longest,
            },
            "notes": {note: asdict(count) for note, count in self.notes.items()},
            "unused_columns": self.unused_columns,
        }


@dataclass
class Packing:
    """Sequences of one epoch: how many, their documents and tokens, and tokens / (sequences x max_length)."""

    sequences: int
    documents: int
    tokens: int
    max_length: int

    @property
    def efficiency(self) -> float:
        """Share of the places in all sequences that hold a token."""
        return self.tokens / (self.sequences * self.max_length) if self.sequences else 0.0


@dataclass
class Ledger:
    """One account per source, and the packing once it is known."""

    sources: list[SourceLedger] = field(default_factory=list)
    packing: Packing | None = None
    notices: list[Problem] = field(default_factory=list)
    overlap: Overlap | None = None
    rows_of_processes: tuple[int, ...] = ()  # of an epoch, by rank, where several processes share it
    """What held-out rows share with training rows, where it was looked for."""

    def total(self, name: str) -> int:
        """Sum of a number of SourceLedger (`read`, `kept`, `tokens_lost` …) over the sources."""
        return sum(getattr(source, name) for source in self.sources)

    def noted(self, what: str) -> Count:
        """How often something happened over all sources, and first where."""
        return _sum(source.notes.get(what) for source in self.sources)

    def balances(self) -> bool:
        """Whether every row and token read is accounted for in every source."""
        return all(source.balances() for source in self.sources)

    def as_json(self) -> dict[str, Any]:
        """The ledger as `ledger.json` and `--json` hold it; no paths but file names."""
        names: tuple[str, ...] = ("read", "kept", "held_out", "left_by_max_rows", "more", "skipped", "dropped_rows")
        names += ("epoch_rows", "token_rows")
        tokens = ("tokens_read", "tokens_kept", "tokens_trained", "tokens_lost", "tokens_dropped")
        return {
            "sources": [source.as_json() for source in self.sources],
            "total": {name: self.total(name) for name in (*names, *tokens)},
            "packing": None
            if self.packing is None
            else {**asdict(self.packing), "efficiency": self.packing.efficiency},
            "warnings": [str(warning) for warning in self.warnings()],
            **({"overlap": self.overlap.as_json()} if self.overlap is not None else {}),
            **({"rows_of_processes": list(self.rows_of_processes)} if self.rows_of_processes else {}),
        }

    def table(self) -> list[tuple[str, ...]]:
        """Rows of text for a terminal: a header, then one row per account, one column per source (and the total)."""
        many = len(self.sources) > 1
        rows: list[tuple[str, ...]] = [("", *(source.name for source in self.sources), *(("total",) if many else ()))]

        def line(label: str, numbers: Iterable[int], *, always: int = 0) -> None:
            found = list(numbers)
            if any(found) or always:
                cells = [f"{number:,}" for number in (*found, *((sum(found),) if many else ()))]
                rows.append((label, *cells))

        line("rows read", (s.read for s in self.sources), always=1)
        line("  kept", (s.kept for s in self.sources), always=1)
        line("  held out", (s.held_out for s in self.sources))
        line("  left by max_rows", (s.left_by_max_rows for s in self.sources))
        line("  skipped: no template applies", (s.skipped for s in self.sources))
        line("  more, by several templates", (s.more for s in self.sources))
        for cause in dict.fromkeys(cause for s in self.sources for cause in s.dropped):
            line(f"  dropped: {cause}", (s.dropped.get(cause, Count()).rows for s in self.sources))
        line("rows in an epoch", (s.epoch_rows for s in self.sources))
        line("token rows", (s.token_rows for s in self.sources))
        line("tokens read", (s.tokens_read for s in self.sources))
        line("  kept", (s.tokens_kept for s in self.sources))
        line("  of them trained", (s.tokens_trained for s in self.sources))
        line("  lost (cut off)", (s.tokens_lost for s in self.sources))
        line("  in dropped rows", (s.tokens_dropped for s in self.sources))
        for note in dict.fromkeys(note for s in self.sources for note in s.notes):
            line(f"note: {note}", (s.notes.get(note, Count()).rows for s in self.sources))
        return rows

    def warnings(self) -> list[Problem]:
        """What is probably wrong but goes on: one warning a kind and source, with its count and first place."""
        found = [*self.notices, *(self.overlap.warnings() if self.overlap is not None else ())]
        for source in self.sources:
            if source.skipped * 2 > source.read:
                reason = f"{_rows(source.skipped, source.read)} skipped: no template applies"
                found.append(_warning(source, reason, Count(), "check whether that is meant"))
            for what, count in source.notes.items():
                if what in (STRADDLES, PER_TURN, SPLIT):
                    continue
                means, fix = _WARNED.get(what, ("", "check whether that is meant"))
                rows = _rows(count.rows, source.read + source.more)
                found.append(_warning(source, f"{rows} {means}" if means else f"{rows}: {what}", count, fix))
            for cause, count in source.dropped.items():
                reason = f"{_rows(count.rows, source.read + source.more)} dropped: {cause}"
                found.append(_warning(source, reason, count, "repair them, or accept the loss"))
        return found

    def check(self, limits: Limits) -> None:
        """Stop before training where a limit is exceeded or nothing is left to train on. Raises: DataError."""
        problems = []
        dropped = _sum(count for source in self.sources for count in source.dropped.values())
        lost, ends = self._lost_tokens(), self.noted(LOST_END)
        longest = max((source.longest for source in self.sources), default=0)
        longer = (
            f"raise train.max_length (the longest row has {longest:,} tokens) or the limit, or split: train.too_long"
        )
        rows = self.total("read") + self.total("more")
        if _exceeds(limits.dropped_rows, dropped.rows, rows):
            causes = ", ".join(f"{cause} in {count.rows}" for cause, count in self._causes().items())
            what = f"{causes} of {rows:,} rows"
            fix = longer if {NO_LABEL, TOO_LONG} & set(self._causes()) else "repair the rows or raise the limit"
            problems.append(_limit("dropped_rows", limits.dropped_rows, what, dropped, fix))
        if _exceeds(limits.lost_tokens, lost.rows, self.total("tokens_read")):
            cut = self.noted(TRUNCATED).rows
            what = f"{lost.rows:,} of {self.total('tokens_read'):,} tokens are cut off in {cut:,} rows"
            problems.append(_limit("lost_tokens", limits.lost_tokens, what, lost, longer))
        if _exceeds(limits.lost_end_tokens, ends.rows, self.total("kept")):
            what = f"the end token is lost in {ends.rows:,} of {self.total('kept'):,} rows"
            problems.append(_limit("lost_end_tokens", limits.lost_end_tokens, what, ends, longer))
        self.check_duplicates(limits, problems)
        if not problems and not self.total("kept"):
            problems.append(Problem("no row is left to train on", "add rows or hold fewer out"))
        if problems:
            raise DataError(problems)

    def check_duplicates(self, limits: Limits, problems: list[Problem]) -> None:
        """Append a problem where the duplicates exceed their limit."""
        same = self.noted(DUPLICATE)
        if limits.duplicates is not None and _exceeds(limits.duplicates, same.rows, self.total("read")):
            what = f"{same.rows:,} of {self.total('read'):,} rows repeat an earlier row"
            problems.append(
                _limit("duplicates", limits.duplicates, what, same, "remove repeated rows or raise the limit")
            )

    def _causes(self) -> Mapping[str, Count]:
        causes: dict[str, Count] = {}
        for source in self.sources:
            for cause, count in source.dropped.items():
                causes.setdefault(cause, Count()).add(count.first, count.rows)
        return causes

    def _lost_tokens(self) -> Count:
        return Count(self.total("tokens_lost"), self.noted(TRUNCATED).first)


def _sum(counts: Iterable[Count | None]) -> Count:
    total = Count()
    for count in counts:
        if count is not None and count.rows:
            total.add(count.first, count.rows)
    return total


def _exceeds(limit: int | str, count: int, total: int) -> bool:
    """Whether `count` of `total` is above a number or a share; a share is taken exactly, not rounded to rows."""
    if isinstance(limit, int):
        return count > limit
    match = SHARE.fullmatch(limit)
    return match is not None and count * 100 > float(match[1]) * total


def _rows(count: int, total: int) -> str:
    return f"{count:,} of {total:,} rows"


def _place(first: str | None) -> tuple[str | None, int | None]:
    """File and line of `file:line`."""
    file, _, line = (first or "").rpartition(":")
    return (file, int(line)) if file and line.isdigit() else (first, None)


def place_of(file: str, line: int) -> str:
    """`file:line` with the file's name alone, because ledger and page are stored and shared."""
    return f"{PurePath(file).name}:{line}"


def _limit(key: str, limit: int | str, what: str, count: Count, fix: str) -> Problem:
    file, line = _place(count.first)
    return Problem(f"{what}, more than the limit of {limit}", fix, file=file, line=line, key=f"limits.{key}")


def _warning(source: SourceLedger, reason: str, count: Count, fix: str) -> Problem:
    file, line = _place(count.first)
    return Problem(reason, fix, file=file or source.name, line=line, severity="warning")

"""How many rows and tokens a recipe's data has: an estimate from the first rows and the size of the files.

For a plan, which must answer at once: nothing is tokenized, and of a large file only the beginning is read. Data sets
on the hub are not looked at.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lora_tune.data.readers import SUFFIXES, read_file
from lora_tune.recipe import DataSource
from lora_tune.recipe_values import share_of

_ROWS = 300  # read of a source
_FILES = 3  # of a source that are looked into
_TURN_TOKENS = 6  # that a chat template adds to a turn
_PACKED_SQUEEZE = 4  # a gzip file of text holds about this many times its size
_NOT_TEXT = ("id", "source", "role", "from", "model", "url", "category", "lang", "language", "dataset")


@dataclass(frozen=True, slots=True)
class Amount:
    """Rows to train on and their tokens, cut to `max_length`; both are estimates."""

    rows: int
    tokens: int

    @property
    def tokens_per_row(self) -> float:
        """Mean tokens of a row."""
        return self.tokens / max(1, self.rows)


def estimate(data: Sequence[DataSource], *, hold_out: int | str, max_length: int, vocabulary: int) -> Amount | None:
    """Rows and tokens of one epoch; None where a source is not on this machine or cannot be read.

    `vocabulary` sets the characters of a token: 4.3 from 100,000 tokens on, 3.6 at 32,000, 2.5 at 8,000 and fewer.
    """
    per_token = _characters_per_token(vocabulary)
    rows = tokens = 0.0
    for source in data:
        found = _source(source, per_token=per_token, max_length=max_length)
        if found is None:
            return None
        count, mean = found
        count = min(count, float(source.max_rows)) if source.max_rows else count
        rows += count * source.weight
        tokens += count * source.weight * mean
    kept = rows
    if isinstance(hold_out, int) or str(hold_out).rstrip().endswith("%"):
        kept = max(1.0, rows - share_of(hold_out, int(rows)))
    return Amount(round(kept), round(tokens * kept / rows)) if rows else None


def _characters_per_token(vocabulary: int) -> float:
    for least, characters in ((100_000, 4.3), (30_000, 3.6), (12_000, 3.0)):
        if vocabulary >= least:
            return characters
    return 2.5


def _source(source: DataSource, *, per_token: float, max_length: int) -> tuple[float, float] | None:
    """Rows and mean tokens of one source."""
    files = list(_files(source.source))
    if not files:
        return None
    rows = tokens = 0.0
    read_bytes = read_rows = 0.0
    looked = files if len(files) <= _FILES else [files[0], files[len(files) // 2], files[-1]]
    for path in looked:
        found = _head(path)
        if found is None:
            return None
        heads, share = found
        sizes = [min(_characters(row) / per_token + _TURN_TOKENS * _turns(row), max_length) for row in heads]
        tokens += sum(sizes)
        rows += len(heads) / share
        read_rows += len(heads)
        read_bytes += path.stat().st_size
    if not read_rows or not read_bytes:
        return None
    every = sum(path.stat().st_size for path in files)
    return rows * every / read_bytes, tokens / read_rows


def _files(name: str) -> Iterator[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        yield from sorted(file for file in path.rglob("*") if file.is_file() and _is_data(file))
    elif path.is_file():
        yield path
    elif glob.has_magic(name):
        yield from sorted(Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file())


def _is_data(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(SUFFIXES) and not path.name.startswith(".")


def _head(path: Path) -> tuple[list[Mapping[str, Any]], float] | None:
    """The first rows of a file, and which share of the file they are."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start == b"PAR1":
            return _parquet_head(path)
        records = islice(read_file(path), _ROWS + 1)
        rows: list[Mapping[str, Any]] = [record.row for record in records if record.row is not None]
    except OSError:
        return None
    if len(rows) <= _ROWS:
        return rows, 1.0
    rows = rows[:_ROWS]
    size = path.stat().st_size * (_PACKED_SQUEEZE if start[:2] == b"\x1f\x8b" else 1)
    return rows, min(1.0, sum(map(_bytes, rows)) / max(1, size))


def _parquet_head(path: Path) -> tuple[list[Mapping[str, Any]], float] | None:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            count = file.metadata.num_rows
            batch = next(file.iter_batches(batch_size=_ROWS), None)
    except (OSError, pyarrow.ArrowException):
        return None
    rows = batch.to_pylist() if batch is not None else []
    return rows, len(rows) / count if count else 1.0


def _bytes(row: Mapping[str, Any]) -> int:
    """Bytes of a row in a JSON or CSV file, about: its text with the names of its columns."""
    text = 0
    pending: list[Any] = [row]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            text += sum(len(str(key)) + 6 for key in value)
            pending.extend(value.values())
        elif isinstance(value, (list, tuple)):
            text += 2 * len(value)
            pending.extend(value)
        elif isinstance(value, str):
            text += len(value.encode("utf-8", "replace")) + value.count("\n") + value.count('"')
        else:
            text += len(str(value))
    return text + 2


def _characters(row: Mapping[str, Any]) -> int:
    """Characters of a row that a chat template would show; `text` beside an instruction is its copy and is left out."""
    copied = ("text",) if "instruction" in row or "messages" in row else ()
    shown = {key: value for key, value in row.items() if key not in copied}
    return sum(len(text) for text in _texts(shown))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if str(key).lower() not in _NOT_TEXT:
                yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)


def _turns(row: Mapping[str, Any]) -> int:
    """Turns of a row: of a list of messages their number, else a question and an answer."""
    return max((len(value) for value in row.values() if isinstance(value, list)), default=2)

"""Readers: from the bytes of one file to its records, whatever its name says.

    JSONL      one object a line                         line of the row
    JSON       one array, or objects one after another   line where the row starts
    CSV, TSV   a header, then records                    line where the record starts
    Parquet    rows                                      number of the row
    text       one document a file                       line where the piece starts

Each reader is a generator over `Record` and holds one row (Parquet: one batch; JSON: a few MiB) at a time. After
damage to one row reading goes on with the next; after damage to the rest of the file (`WHOLE_FILE`) it ends.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator
from json.decoder import JSONDecodeError
from pathlib import Path
from typing import IO, Any

from lora_tune.data.json_text import RowParser, check_depth, explain
from lora_tune.data.rows import MAX_ROW_BYTES, WHOLE_FILE, BadRow, Record

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
_BLOCK = 1 << 20
_TEXT_PIECE_BYTES = 1 << 18  # a longer document is cut at line ends; it is cut to max_length later in any case
_BOM = b"\xef\xbb\xbf"
_REFUSED_STARTS = {
    b"\xff\xfe": "not UTF-8: looks like UTF-16",
    b"\xfe\xff": "not UTF-8: looks like UTF-16",
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "zstandard compression",
    b"\xfd7zXZ": "xz compression",
    b"BZh": "bzip2 compression",
}


def read_file(path: Path, *, numbered_columns: int = 0) -> Iterator[Record]:
    """The records of one file; what it is, its first bytes say, then its name (Parquet and gzip: the bytes alone).

    `numbered_columns`: 0, or how many columns a CSV or TSV file without a header has at least; "1", "2" …
    """
    with open(path, "rb") as raw:
        start = raw.read(8)
        raw.seek(0)
        if start[:4] == b"PAR1":
            yield from parquet(path)
            return
        if start[:2] == b"\x1f\x8b":
            with gzip.open(raw) as unpacked:
                yield from _from_bytes(unpacked, path.name.removesuffix(".gz"), numbered_columns)  # type: ignore[arg-type]
            return
        yield from _from_bytes(raw, path.name, numbered_columns)


def _from_bytes(file: IO[bytes], name: str, numbered_columns: int) -> Iterator[Record]:
    try:
        head = file.read(_BLOCK)
        file.seek(0)
        for magic, what in _REFUSED_STARTS.items():
            if head.startswith(magic):
                fix = "save it as UTF-8" if "UTF" in what else "unpack it first (gzip is read as it is)"
                yield Record(1, None, BadRow(WHOLE_FILE, what, fix=fix))
                return
        if b"\0" in head[:64] and b"\n" not in head[:64].replace(b"\n\0", b""):
            yield Record(
                1, None, BadRow(WHOLE_FILE, "binary data, or text that is not UTF-8", fix="save it as UTF-8 text")
            )
            return
        if head.startswith(_BOM):
            file.seek(len(_BOM))
            head = head[len(_BOM) :]
        if numbered_columns or _suffix(name) in (".csv", ".tsv"):
            if head.lstrip()[:1] not in (b"[", b"{"):
                yield from table(file, _delimiter(name, head), numbered_columns)
                return
        elif _suffix(name) == ".txt":
            yield from text(file)
            return
        yield from (document(file) if _spans_lines(head) else json_lines(file))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield Record(1, None, BadRow(WHOLE_FILE, f"damaged gzip file: {error}", fix="fetch or pack it again"))


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _delimiter(name: str, head: bytes) -> str:
    header = head.split(b"\n", 1)[0]
    if _suffix(name) == ".tsv" or (b"\t" in header and b"," not in header):
        return "\t"
    return ";" if b";" in header and b"," not in header else ","


def _spans_lines(head: bytes) -> bool:
    """An array, or objects that are spread over lines: JSON to be read as one text, not line by line."""
    stripped = head.lstrip()
    if stripped[:1] == b"[":
        return True
    first = stripped.split(b"\n", 1)[0].rstrip()
    return stripped[:1] == b"{" and first[-1:] in (b"{", b"[", b",") and b"\n" in stripped


def _undecodable(error: UnicodeDecodeError, *, column: int) -> BadRow:
    byte = error.object[error.start]
    guess = "; looks like latin-1" if byte >= 0xA0 or byte in range(0x80, 0xA0) else ""
    return BadRow("not UTF-8", f"not UTF-8: byte 0x{byte:02x}{guess}", fix="save the file as UTF-8", column=column)


def _lines(file: IO[bytes]) -> Iterator[tuple[int, str | None, BadRow | None]]:
    """(line, text without its end, what is wrong) for each line; only \\n ends a line, a \\r before it is dropped."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 2):
        number += 1
        if not line.endswith(b"\n") and len(line) > MAX_ROW_BYTES:
            size = len(line)
            while rest := file.readline(_BLOCK):
                size += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield number, None, _too_big(size)
            continue
        try:
            yield number, line.decode().removesuffix("\n").removesuffix("\r"), None
        except UnicodeDecodeError as error:
            yield number, None, _undecodable(error, column=error.start + 1)


def _too_big(size: int) -> BadRow:
    return BadRow(
        "too big",
        f"a row of {size / 2**20:.1f} MiB is over the size cap of {MAX_ROW_BYTES >> 20} MiB",
        fix="split it into several rows",
    )


def json_lines(file: IO[bytes]) -> Iterator[Record]:
    """One object a line."""
    parser = RowParser()
    for number, line, bad in _lines(file):
        if line is None:
            yield Record(number, None, bad)
        elif not line or line.isspace():
            yield Record(
                number, None, BadRow("blank line", "blank line", fix="delete it, or restore the row that stood here")
            )
        else:
            try:
                yield Record(number, parser.parse(line))
            except BadRow as found:
                yield Record(number, None, found)


class _Buffer:
    """Text read in blocks: at least MAX_ROW_BYTES characters beyond `at`, unless the file ends before."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.text, self.at, self.line, self.ended = file, "", 0, 1, False
        self._rest = b""

    def fill(self) -> None:
        """Read on, if fewer than MAX_ROW_BYTES characters are left. Raises: BadRow for bytes that are not UTF-8."""
        if self.ended or len(self.text) - self.at > MAX_ROW_BYTES:
            return
        parts = [self.text[self.at :]]
        size = len(parts[0])
        while not self.ended and size <= 2 * MAX_ROW_BYTES:
            block = self.file.read(_BLOCK)
            self.ended = not block
            parts.append(self._decode(self._rest + block))
            size += len(parts[-1])
        self.text, self.at = "".join(parts), 0

    def _decode(self, data: bytes) -> str:
        try:
            self._rest = b""
            return data.decode()
        except UnicodeDecodeError as error:
            if error.end == len(data) and len(data) - error.start < 4 and not self.ended:
                self._rest = data[error.start :]
                return data[: error.start].decode()
            line = self.line + self.text.count("\n", self.at) + data.count(b"\n", 0, error.start)
            column = error.start - data.rfind(b"\n", 0, error.start)
            raise _Located(line, _undecodable(error, column=column)) from None

    def skip(self, end: int) -> None:
        """Go on at `end`, counting lines."""
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def skip_space(self) -> str:
        """Skip white space; the character that follows, "" at the end."""
        while True:
            self.fill()
            end = self.at
            while end < len(self.text) and self.text[end] in " \t\r\n":
                end += 1
            self.skip(end)
            if end < len(self.text):
                return self.text[end]
            if self.ended:
                return ""


class _Located(Exception):
    def __init__(self, line: int, bad: BadRow) -> None:
        super().__init__(str(bad))
        self.line, self.bad = line, bad


def document(file: IO[bytes]) -> Iterator[Record]:
    """The elements of one JSON array, or JSON objects one after another, however they are spread over lines."""
    buffer = _Buffer(file)
    try:
        parser = RowParser()
        in_array = buffer.skip_space() == "["
        if in_array:
            buffer.skip(buffer.at + 1)
        first = True
        while character := buffer.skip_space():
            if in_array and character == "]":
                buffer.skip(buffer.at + 1)
                if rest := buffer.skip_space():
                    raise _Located(buffer.line, _broken(f"more text after the end of the array: {rest!r}"))
                return
            if in_array and not first:
                if character != ",":
                    raise _Located(buffer.line, _broken(f"missing comma between two rows, before {character!r}"))
                buffer.skip(buffer.at + 1)
                if buffer.skip_space() in ("]", ""):
                    raise _Located(
                        buffer.line, _broken("trailing comma" if buffer.at < len(buffer.text) else "unfinished array")
                    )
            first = False
            yield _element(buffer, parser)
        if in_array:
            raise _Located(buffer.line, _broken("unfinished array: `]` is missing"))
    except _Located as found:
        yield Record(found.line, None, BadRow(WHOLE_FILE, found.bad.reason, fix=found.bad.fix, column=found.bad.column))


def _broken(reason: str) -> BadRow:
    return BadRow(WHOLE_FILE, f"not JSON: {reason}", fix="the rest of the file was not read")


def _element(buffer: _Buffer, parser: RowParser) -> Record:
    """The value at the buffer's place; the buffer goes on behind it. Raises: _Located where it cannot."""
    start, line = buffer.at, buffer.line
    try:
        value, end = parser.parse_at(buffer.text, start)
    except JSONDecodeError as error:
        if not buffer.ended and (error.pos - start > MAX_ROW_BYTES - 64 or "string" in error.msg):
            raise _Located(line, _too_big(len(buffer.text) - start)) from None
        at = line + error.doc.count("\n", start, error.pos)
        column = error.pos - error.doc.rfind("\n", 0, error.pos)
        raise _Located(
            at, BadRow(WHOLE_FILE, f"not JSON: {explain(error)}", fix=_broken("").fix, column=column)
        ) from None
    except RecursionError:
        raise _Located(line, BadRow(WHOLE_FILE, "nested too deep", fix=_broken("").fix)) from None
    text = buffer.text[start:end]
    buffer.skip(end)
    if len(text) > MAX_ROW_BYTES:
        return Record(line, None, _too_big(len(text)))
    try:
        check_depth(text)
        return Record(line, parser.checked(value, text))
    except BadRow as found:
        return Record(line, None, found)


def table(file: IO[bytes], delimiter: str, numbered_columns: int = 0) -> Iterator[Record]:
    """Records of a CSV or TSV file as {column: text}. TSV knows no quoting: a quotation mark is text."""
    wrong: list[BadRow] = []

    def lines() -> Iterator[str]:
        for _, line, bad in _lines(file):
            if bad is not None:
                wrong.append(bad)
            yield f"{line or ''}\n"

    csv.field_size_limit(MAX_ROW_BYTES)
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(lines(), delimiter=delimiter, strict=True, quoting=quoting)  # type: ignore[arg-type]
    names: list[str] = []
    start = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            reason = "a quoted field does not end" if "unexpected end" in str(error) else str(error)
            yield Record(start, None, BadRow(WHOLE_FILE, f"not CSV: {reason}", fix="check the quotation marks"))
            return
        if cells is None:
            return
        line, start = start, reader.line_num + 1
        if wrong:
            yield Record(line, None, wrong[0])
            wrong.clear()
        elif not names:
            names = [str(i + 1) for i in range(len(cells))] if numbered_columns else [cell.strip() for cell in cells]
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                yield Record(line, None, BadRow(WHOLE_FILE, f"column `{repeated[0]}` stands twice in the header"))
                return
            if numbered_columns:
                yield Record(line, dict(zip(names, cells, strict=True)))
        elif not cells:
            yield Record(
                line, None, BadRow("blank line", "blank line", fix="delete it, or restore the row that stood here")
            )
        elif len(cells) != len(names):
            reason = f"{len(cells)} fields, but the {'first row' if numbered_columns else 'header'} has {len(names)}"
            yield Record(line, None, BadRow("wrong shape", reason, fix="quote fields that hold the separator"))
        else:
            yield Record(line, dict(zip(names, cells, strict=True)))


def parquet(path: Path) -> Iterator[Record]:
    """Rows of a Parquet file; nulls that Arrow fills in for absent keys of an object are dropped."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        number = 0
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(number, {name: without_filled_nulls(value) for name, value in row.items()})
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        yield Record(number + 1, None, BadRow(WHOLE_FILE, f"damaged Parquet file: {reason}", fix="fetch it again"))


def without_filled_nulls(value: Any) -> Any:
    """`value` without the keys of objects whose value is null, at every depth (Arrow's structs hold every key)."""
    if isinstance(value, dict):
        return {key: without_filled_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_filled_nulls(item) for item in value]
    return value


def text(file: IO[bytes]) -> Iterator[Record]:
    """The document of a text file; one longer than 256 KiB comes in pieces that end at a line's end."""
    piece: list[str] = []
    size, start = 0, 1
    for number, line, bad in _lines(file):
        if bad is not None:
            yield Record(number, None, bad)
            continue
        piece.append(line or "")
        size += len(piece[-1]) + 1
        if size >= _TEXT_PIECE_BYTES:
            yield Record(start, {"text": "\n".join(piece)})
            piece, size, start = [], 0, number + 1
    if any(line.strip() for line in piece):
        yield Record(start, {"text": "\n".join(piece)})

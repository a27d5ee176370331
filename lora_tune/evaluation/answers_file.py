"""A file of answers that appears whole: rows are kept beside it as they are made, so that a killed command goes on.

out.jsonl.part   first line: what the answers depend on (a hash); then one line a row, in the order they were made
out.jsonl        all rows in the order of the questions; it replaces the part in one step
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_tune.errors import Problem, UsageError

_PART = ".part"


class AnswersFile:
    """The rows of one output file: those made before, and those that are added.

    Made by `open_answers`. `done` holds the rows that are kept, by number.
    """

    def __init__(self, path: Path, *, settings: str, checks: Mapping[int, str]) -> None:
        self.path, self.part = path, path.with_name(path.name + _PART)
        self.done: dict[int, dict[str, Any]] = {}
        self._checks = checks
        self._settings = settings
        self._read()

    def add(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Keep rows that were not there yet: all of them are on the disk when this returns."""
        new = {number: {"row": number, "check": self._checks[number], **row} for number, row in rows.items()}
        new = {number: row for number, row in new.items() if number not in self.done}
        self._append("".join(_line(row) for row in new.values()))
        self.done |= new

    def finish(self) -> None:
        """Write the output: every row in order, whole or not at all; then remove the part."""
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        shown = ("row", "check")
        with temporary.open("w", encoding="utf-8") as stream:
            for number in sorted(self.done):
                stream.write(_line({key: self.done[number][key] for key in self.done[number] if key not in shown}))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, self.path)
        self.part.unlink(missing_ok=True)

    def _read(self) -> None:
        """Take over the whole lines of an earlier part; what follows the last of them is cut off."""
        if not self.part.exists():
            self._append(_line({"settings": self._settings}))
            return
        content = self.part.read_bytes()
        head, *lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True) or [b""]
        if (_parsed(head) or {}).get("settings") != self._settings:
            if not head:
                self.part.unlink()
                return self._read()
            reason = "holds answers to other questions, of another adapter or with other settings"
            raise UsageError(Problem(reason, "start again with --overwrite, or name another --out", str(self.part)))
        good = len(head)
        for line in lines:
            row = _parsed(line)
            if row is None or not isinstance(row.get("row"), int) or self._checks.get(row["row"]) != row.get("check"):
                break
            self.done[row["row"]] = row
            good += len(line)
        if good < len(content):
            with self.part.open("r+b") as stream:
                stream.truncate(good)

    def _append(self, text: str) -> None:
        with self.part.open("ab") as stream:
            stream.write(text.encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())


@contextmanager
def open_answers(
    path: Path, *, settings: Mapping[str, Any], checks: Mapping[int, str], start: str = "go on"
) -> Iterator[AnswersFile]:
    """The output file, held while it is written: a second command is refused.

    `settings` is everything that the answers depend on, `checks` a hash of each question; `start` is "go on", or
    "again" to throw earlier answers away. Raises: UsageError where the output is there already (unless "again"), is in
    use, cannot be written, or an earlier part has other settings.
    """
    if path.is_dir():
        raise UsageError(Problem("is a folder", "name a file", str(path), key="--out"))
    if not path.absolute().parent.is_dir():
        raise UsageError(Problem("its folder is missing", "make it, or name another --out", str(path), key="--out"))
    if path.exists() and start != "again":
        raise UsageError(Problem("is there already", "name another --out, or add --overwrite", str(path), key="--out"))
    lock_path = path.with_name(f".{path.name}.lock")
    try:
        lock = FileLock(lock_path)
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(Problem("another command is writing it", "wait for it", str(path), key="--out")) from None
    except OSError as error:
        raise UsageError(Problem(f"cannot be written: {error.strerror}", "name another --out", str(path))) from None
    try:
        if start == "again":
            path.with_name(path.name + _PART).unlink(missing_ok=True)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        yield AnswersFile(path, settings=digest, checks=checks)
    finally:
        lock.release()
        lock_path.unlink(missing_ok=True)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None

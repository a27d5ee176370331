"""`metrics.jsonl`: one line for each step and each evaluation, none of which is lost to a full disk or a kill.

All lines are kept in memory and stand in every checkpoint, so that a resumed run has those of all its steps, whatever
became of the file. What cannot be appended is written with the whole file at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from lora_tune.disk import sync

METRICS = "metrics.jsonl"


class MetricsFile:
    """The lines of a training that goes on after `up_to_step`; `close` leaves the file whole and on the disk."""

    def __init__(self, path: Path, *, up_to_step: int) -> None:
        self.path = path
        self._lines = [json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= up_to_step]
        self._stream: IO[str] | None = None
        with suppress(OSError):  # the lines are written with the whole file when it is closed
            write_whole(path, self.text())
            self._stream = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line. A disk that refuses it is asked again in `close`."""
        line = json.dumps(row, allow_nan=False) + "\n"
        self._lines.append(line)
        if self._stream is None:
            return
        try:
            self._stream.write(line)
            self._stream.flush()
        except OSError:
            self.leave()

    def text(self) -> str:
        """All lines so far, those of the steps before a resume included."""
        return "".join(self._lines)

    def close(self) -> None:
        """Write what is missing and bring the file to the disk. Raises: OSError."""
        whole = self._stream is not None
        self.leave()
        if not whole:
            write_whole(self.path, self.text())
            return
        sync(self.path)

    def leave(self) -> None:
        """Close the file as it is, for a training that ended early."""
        if self._stream is not None:
            with suppress(OSError):  # what the buffer holds stands in the lines as well
                self._stream.close()
            self._stream = None


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace the file with this content, or leave it as it was. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.tmp")
    try:
        with part.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, leaving out a last line that was cut short; none where the file is missing."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows

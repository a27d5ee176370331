"""Numbers of many rows, on disk: appended row by row, read as arrays that are mapped from the file.

A mapped page is the system's to take back, so that a million rows more take no memory of the process. Few rows stay
in memory.
"""

from __future__ import annotations

import mmap
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

_BLOCK_BYTES = 1 << 20  # in memory before they are written
_CODES = {"<i8": "q", "<i4": "i", "<u4": "I", "<u8": "Q", "V16": "16s"}


class Columns:
    """Rows of numbers, each row as wide as `fields` says: {name: one of <i8, <i4, <u4, <u8, V16}, widest first.

    They are kept in a temporary file of `folder`, the system's own where that is None.
    """

    def __init__(self, fields: Sequence[tuple[str, str]], *, folder: Path | None = None) -> None:
        self.dtype = np.dtype(list(fields))
        self._struct = struct.Struct("<" + "".join(_CODES[code] for _, code in fields))
        self._folder = folder
        self._tail = bytearray()  # rows that are not in the file
        self._file: Any = None
        self._at = self._in_file = 0  # where the rows begin in the file (bytes), and how many stand there
        self._map: mmap.mmap | None = None
        self._mapped = 0  # rows of the map

    def __len__(self) -> int:
        return self._in_file + len(self._tail) // self._struct.size

    def append(self, *values: int | bytes) -> None:
        """Keep a row, in the order of the fields. Raises: OSError where the disk is full."""
        self._tail += self._struct.pack(*values)
        if len(self._tail) >= _BLOCK_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  (goes with this object)
        self._file.write(self._tail)
        self._file.flush()
        self._in_file += len(self._tail) // self._struct.size
        self._tail = bytearray()

    def row(self, index: int) -> tuple[Any, ...]:
        """The values of one row."""
        if index < self._in_file:
            return self._struct.unpack_from(self._view(), self._start + index * self._struct.size)
        return self._struct.unpack_from(self._tail, (index - self._in_file) * self._struct.size)

    @property
    def _start(self) -> int:
        """Where the rows begin in the map, which begins at a page."""
        return self._at % mmap.ALLOCATIONGRANULARITY

    def _view(self) -> mmap.mmap:
        """The rows in the file, mapped."""
        if self._map is None or self._mapped < self._in_file:
            size = self._start + self._in_file * self._struct.size
            self._map = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ, offset=self._at - self._start)
            self._mapped = self._in_file
        return self._map

    def rows(self) -> np.ndarray:
        """All rows, (N,) of `dtype`, to be read only; a copy while they are few."""
        if self._file is None:
            return np.frombuffer(bytes(self._tail), dtype=self.dtype)
        if self._tail:
            self._flush()
        if not self._in_file:
            return np.zeros(0, dtype=self.dtype)
        return np.frombuffer(self._view(), dtype=self.dtype, count=self._in_file, offset=self._start)

    def __getitem__(self, name: str) -> np.ndarray:
        """One column, (N,), to be read only."""
        found: np.ndarray = self.rows()[name]
        return found

    def write(self, target: IO[bytes]) -> None:
        """Write all rows to `target`."""
        if self._in_file:
            target.write(memoryview(self._view())[self._start :])
        target.write(self._tail)

    @classmethod
    def read(cls, file: IO[bytes], fields: Sequence[tuple[str, str]], *, rows: int) -> Columns:
        """The rows that `write` wrote to `file`, from where it stands; it stands behind them afterwards. None can be
        appended."""
        found = cls(fields)
        found._file, found._at, found._in_file = file, file.tell(), rows
        file.seek(rows * found._struct.size, 1)
        return found

"""The disk: how much room is free, a reserve for what is written at the end, what to say of a full one; syncing."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

_ZEROS = bytes(1 << 20)
FULL = (errno.ENOSPC, errno.EDQUOT)


def free_bytes(path: Path) -> int:
    """Bytes that are free where `path` is, or where it would be made."""
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    return shutil.disk_usage(there).free


def size_text(count: float) -> str:
    """Bytes for people: 1.5 GiB, 12.0 MiB, 3.2 KiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1024:.1f} KiB"


def disk_text(error: OSError, path: Path, *, needed: int | None = None) -> str:
    """What a disk refused: the path, the reason, how much was needed and how much is free."""
    reason = os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
    need = f"needs {size_text(needed)}, " if needed else ""
    try:
        free = size_text(free_bytes(path))
    except OSError:
        return f"{path}: {reason}"
    return f"{path}: {reason} ({need}{free} free)"


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    total = 0
    for path in folder.rglob("*") if folder.is_dir() else ():
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Windows has no such call for folders.

    Raises: OSError.
    """
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_reserve(path: Path, size: int) -> None:
    """Take `size` bytes of the disk with a file that is given back when they are needed.

    Raises: OSError where there is no room; nothing is left behind.
    """
    if path.exists() and path.stat().st_size == size:
        return
    try:
        with path.open("wb") as stream:
            if not _allocated(stream.fileno(), size):
                for start in range(0, size, len(_ZEROS)):
                    stream.write(_ZEROS[: size - start])
                stream.flush()
    except OSError:
        give_back(path)
        raise


def give_back(path: Path) -> None:
    """Free the room that `make_reserve` took; nothing happens where there is none."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _allocated(descriptor: int, size: int) -> bool:
    """Whether the file system could set the bytes aside by itself."""
    if not hasattr(os, "posix_fallocate") or size <= 0:
        return size <= 0
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return False
        raise
    return True

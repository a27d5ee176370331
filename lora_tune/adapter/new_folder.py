"""A folder that appears whole or not at all: written beside its place under another name, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_tune.errors import Problem, UsageError


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into, which takes its place when the block ends, and vanishes when it raises.

    Raises: UsageError where the folder is there already or cannot be made.
    """
    if folder.exists() or folder.is_symlink():
        raise UsageError(Problem("is there already", "name a new folder", str(folder)))
    parent = folder.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=parent)
    except OSError as error:
        raise UsageError(Problem(f"cannot be written: {error.strerror}", "name another folder", str(folder))) from None
    with beside:
        scratch = Path(beside.name) / folder.name
        scratch.mkdir()
        yield scratch
        os.rename(scratch, folder)

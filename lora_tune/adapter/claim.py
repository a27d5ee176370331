"""Who may write into a run folder: one run at a time, and never over another run unless that is asked for.

The lock is the operating system's, so that it ends with the process that held it, however that ended. What belongs to
the lock lies in `checkpoints/`, which is never shared.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from lora_tune.adapter.folder import CHECKPOINTS, FILES, MANIFEST, unwritable
from lora_tune.errors import Problem, UsageError

_LOCK = ".lock"
_OWNER = ".owner"
RESERVE = ".reserve"
LOG = "error.log"
_ASIDE = {_LOCK, _OWNER, RESERVE, LOG}  # what a run that wrote nothing else leaves or removes
_PARTS = {f".{name}.tmp" for name in FILES}  # what a kill in the middle of a write leaves

Mode = Literal["new", "resume", "overwrite"]


@contextmanager
def claim_folder(folder: Path, mode: Mode) -> Iterator[None]:
    """Hold a run folder while a run writes into it; a second run is refused at once.

    `new` wants a folder that is missing or empty, `resume` and `overwrite` one that is missing, empty or a run's.
    Nothing of an older run is removed before `remove_older_run`. A claim that wrote nothing leaves nothing behind.

    Raises:
        UsageError: the folder is in use, or cannot be written.
        ResourceError: the disk is full.
    """
    from filelock import FileLock, Timeout

    _refuse_use(folder, mode)
    checkpoints = folder / CHECKPOINTS
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        lock = FileLock(checkpoints / _LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        reason = f"another run is writing into this folder{_owner(checkpoints)}"
        fix = "wait for it, stop it, or choose another output"
        raise UsageError(Problem(reason, fix, str(folder), key="output")) from None
    except NotImplementedError:  # what filelock says of some network file systems
        fix = "choose an output on another disk"
        raise UsageError(Problem("its file system cannot lock files", fix, str(folder), key="output")) from None
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        _refuse_use(folder, mode)  # what another run finished between the look and the lock
        with suppress(OSError):  # on a full disk the lock alone does
            (checkpoints / _OWNER).write_text(json.dumps({"pid": os.getpid()}), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            (checkpoints / _OWNER).unlink(missing_ok=True)
            if (folder / MANIFEST).exists():  # finished; the disk may have refused to give the room back before
                (checkpoints / RESERVE).unlink(missing_ok=True)
        lock.release()
        if not _held(folder):  # refused before anything was written: nothing is left behind
            with suppress(OSError):
                for name in (_LOCK, RESERVE):
                    (checkpoints / name).unlink(missing_ok=True)
                checkpoints.rmdir()
                folder.rmdir()


def _owner(checkpoints: Path) -> str:
    """` (process 123)`, or nothing where the owner did not say."""
    try:
        return f" (process {int(json.loads((checkpoints / _OWNER).read_text(encoding='utf-8'))['pid'])})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _refuse_use(folder: Path, mode: Mode) -> None:
    """Raise UsageError where `mode` does not fit to what the folder holds."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(Problem("is a file", "choose another output", str(folder), key="output"))
    held = _held(folder)
    if not held:
        return
    known = [name for name in held if name in FILES or name in _PARTS or name == CHECKPOINTS]
    shown = ", ".join(held[:3]) + (" …" if len(held) > 3 else "")
    if mode == "new":
        fix = (
            "choose another output"
            if not known
            else "continue with --resume, start again with --overwrite, or choose another output"
        )
        raise UsageError(Problem(f"the folder is in use: it holds {shown}", fix, str(folder), key="output"))
    if not known:
        raise UsageError(
            Problem(f"is no run folder: it holds {shown}", "choose another output", str(folder), key="output")
        )


def _held(folder: Path) -> list[str]:
    """What the folder holds, a checkpoints folder without checkpoints left out."""
    if not folder.is_dir():
        return []
    names = sorted(entry.name for entry in folder.iterdir())
    checkpoints = folder / CHECKPOINTS
    if CHECKPOINTS in names and checkpoints.is_dir() and all(entry.name in _ASIDE for entry in checkpoints.iterdir()):
        names.remove(CHECKPOINTS)
    return names


def remove_older_run(folder: Path) -> None:
    """Remove what a run folder is documented to hold (`FILES`, `checkpoints/`) and nothing else, its manifest first, so
    that half a folder never counts as finished. Call it inside `claim_folder`.

    Raises: UsageError where the disk refuses.
    """
    try:
        for name in (MANIFEST, *(name for name in FILES if name != MANIFEST)):
            (folder / name).unlink(missing_ok=True)
            (folder / f".{name}.tmp").unlink(missing_ok=True)
        for entry in (folder / CHECKPOINTS).iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name not in (_LOCK, _OWNER):
                entry.unlink()
    except OSError as error:
        raise unwritable(folder, error) from None

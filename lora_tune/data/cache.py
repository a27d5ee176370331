"""The cache of what data became: checked conversations, token rows, packed rows, shared passages; all by content.

    conversations/   what the checking pass kept of whole files       (kept_conversations.py)
    tokens/          token rows                                       (token_file.py)
    packed/          the packed sequences of an epoch                 (pipeline.py)
    overlap/         passages that both sides share                   (overlap.py)

An entry is a file and beside it a JSON note with the sha256 of both: damage is found before anything is used, and the
entry is made again. `LORA_TUNE_CACHE` names another folder than the user's cache folder; all of it may be deleted at
any time. It holds 8 GiB at most, entries that were not used for longest go first. Rows may hold secrets: nobody but the
user may read them. What another user put there is neither used nor written to, and no link is followed: rows that a
stranger chose would be trained on. Entries then stand in a folder of the process, which goes with it.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import platformdirs
from filelock import FileLock, Timeout

from lora_tune.disk import FULL, disk_text
from lora_tune.errors import Problem, ResourceError
from lora_tune.terminal import print_problems

KINDS = ("conversations", "tokens", "packed", "overlap")
Kind = Literal["conversations", "tokens", "packed", "overlap"]
WORTH_ROWS = 1000  # fewer are read, checked and packed again in a moment: only their token rows are kept
LARGEST_BYTES = 2 << 30  # of an entry other than token rows, which take longest to make
_KEPT_BYTES = 8 << 30


def cache_folder() -> Path:
    """Where it is: `LORA_TUNE_CACHE`, else the user's cache folder. Created where it is missing."""
    folder = Path(os.environ.get("LORA_TUNE_CACHE") or platformdirs.user_cache_dir("lora_tune", appauthor=False))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@contextmanager
def entry(kind: Kind, key: str) -> Iterator[Path]:
    """The path of an entry, while no other process reads or writes it."""
    path = _folder(kind) / f"{key}.arrow"
    if not _only_own_files(path):
        path = _instead_of(path, kind) / path.name
    with FileLock(path.with_suffix(".lock")):
        yield path


def _folder(kind: Kind) -> Path:
    """Where entries of a kind are: in the cache, or in a folder of this process where that is another user's."""
    root = cache_folder()
    folder = root / kind
    if not (_is_own(root.lstat()) and _is_own(root.stat())):  # of a link both, it and what it names
        return _instead_of(root, kind)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not _is_own_folder(folder):
        return _instead_of(folder, kind)
    if folder.stat().st_mode & 0o077:  # made by an earlier version
        with suppress(OSError):
            folder.chmod(0o700)
    return folder


def _instead_of(path: Path, kind: Kind) -> Path:
    """Where entries of a kind are for this process, with a word of what is not used."""
    _warn_of(path)
    folder = _temporary() / kind
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _is_own(state: os.stat_result) -> bool:
    """Whether it belongs to the user that this process acts for; true where files have no such owner."""
    return not hasattr(os, "geteuid") or state.st_uid == os.geteuid()


def _is_own_folder(folder: Path) -> bool:
    """Whether it is a folder of this user's, and no link to one."""
    try:
        state = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(state.st_mode) and _is_own(state)


def _only_own_files(path: Path) -> bool:
    """Take away what stands in the place of an entry, its note or its lock and is no file of this user's alone.

    False where something stays.
    """
    for suffix in (".arrow", ".json", ".lock"):
        file = path.with_suffix(suffix)
        try:
            state = file.lstat()
            if not (stat.S_ISREG(state.st_mode) and _is_own(state) and state.st_nlink <= 1):
                file.unlink()
        except FileNotFoundError:
            continue
        except OSError:
            return False
    return True


@cache
def _temporary() -> Path:
    """A folder of this process alone, which goes when the process ends."""
    folder, process = Path(tempfile.mkdtemp(prefix="lora_tune_cache_")), os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == process else None)
    return folder


@cache
def _warn_of(path: Path) -> None:
    """Say once that something of the cache is not used, as another user could have chosen what is in it."""
    try:
        state = path.lstat()
        why = "is none of this user's own" if _is_own(state) else f"belongs to another user, got user {state.st_uid}"
    except OSError as error:
        why = f"cannot be looked at: {disk_text(error, path)}"
    reason = f"cache folder: {path} is not used, and prepared rows go with this process: it {why}"
    print_problems([Problem(reason, "name a folder of your own with LORA_TUNE_CACHE", severity="warning")])


def valid_note(path: Path) -> dict[str, Any] | None:
    """The note of a whole entry, which counts as used now; None where it is missing, damaged, or was not finished."""
    try:
        stored = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        note = stored["note"]
        if _note_sha256(note) != stored["sha256"]:
            return None
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != note["sha256"]:
                return None
        os.utime(path)
        return dict(note)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_entry(path: Path, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Let `write` make the file and give its note; it appears when it is complete, its note after that.

    Where the disk is full, all other entries go first. Raises: ResourceError where it is full even then.
    """
    return with_room(path, partial(_written, path, write))


def with_room(path: Path, write: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `write` gives, which writes the entry `path`: tried again without all other entries where the disk is full.

    Raises: ResourceError where it is full even then.
    """
    try:
        return write()
    except OSError as error:
        if error.errno not in FULL:
            raise
    _make_room(path.parent.parent, keep=path, most=0)
    try:
        return write()
    except OSError as error:
        if error.errno not in FULL:
            raise
        fix = "make room, or name another folder with LORA_TUNE_CACHE"
        raise ResourceError(f"prepared rows cannot be kept: {disk_text(error, path.parent)}", fix) from None


def private_file(path: Path) -> None:
    """An empty file that nobody else may read, instead of whatever is there. Raises: OSError."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _note_sha256(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note).encode()).hexdigest()


def _written(path: Path, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """As `write_entry`, once. Raises: OSError."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        private_file(temporary)
        note = write(temporary)
        with open(temporary, "rb") as file:
            note["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        path.with_suffix(".json").unlink(missing_ok=True)
        temporary.replace(path)
        private_file(temporary)
        temporary.write_text(json.dumps({"note": note, "sha256": _note_sha256(note)}), encoding="utf-8")
        temporary.replace(path.with_suffix(".json"))
    finally:
        temporary.unlink(missing_ok=True)  # of a run that was stopped
    _remove_unfinished(path.parent)
    _make_room(path.parent.parent, keep=path, most=_KEPT_BYTES)
    return note


def keep_if_there_is_room(path: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    """As `write_entry`, for what is kept for speed alone: where the disk is full, or denies it, it is not kept."""
    with suppress(OSError):
        _written(path, write)


@cache
def code_sha256() -> str:
    """Hash of this package's code: other code may read or encode the same data in another way."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _remove_unfinished(folder: Path) -> None:
    """Delete what killed processes left half-written: nobody holds the lock of its entry."""
    for left in folder.glob("*.tmp"):
        entry_ = folder / f"{left.name.partition('.')[0]}.arrow"
        with suppress(OSError, Timeout):
            if _only_own_files(entry_):
                with FileLock(entry_.with_suffix(".lock"), timeout=0):
                    left.unlink(missing_ok=True)


def _make_room(folder: Path, *, keep: Path, most: int) -> None:
    """Delete what was not used for longest until `most` bytes stay; no entry that a process is about to open."""
    found = []
    own = [folder / kind for kind in KINDS if _is_own_folder(folder / kind)]
    for path in (path for kind in own for path in kind.glob("*.arrow")):
        with suppress(OSError):  # another process was faster
            state = path.lstat()
            found.append((state.st_mtime, state.st_size, path))
    used = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if used <= most:
            return
        if path == keep:
            continue
        if not _only_own_files(path):
            continue
        with suppress(OSError, Timeout), FileLock(path.with_suffix(".lock"), timeout=0):
            for suffix in (".json", ".arrow"):
                path.with_suffix(suffix).unlink(missing_ok=True)
            used -= size
            path.with_suffix(".lock").unlink(missing_ok=True)

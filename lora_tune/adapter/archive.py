"""One file for one adapter folder, and back again from a stranger: documented file names only, sizes and ratios capped.

The archive is a ZIP with the folder's documented files at its top, always in the same order and with the same time, so
that equal folders give equal archives. Nothing else is taken out of one: no path, no link, no second file of a name.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

from lora_tune.adapter.checks import Subject, run_checks
from lora_tune.adapter.folder import FILES, MANIFEST, WEIGHTS
from lora_tune.adapter.new_folder import new_folder
from lora_tune.adapter.secrets import secrets_in
from lora_tune.errors import CheckFailed, Problem, UsageError

MOST_BYTES = 8 << 30
"""Of all files together once unpacked, by default; an adapter of rank 64 on a 70B base has 1.6 GB."""
_MOST_SMALL_BYTES = 256 << 20  # of any file but the weights
_MOST_RATIO = 200  # of unpacked over packed bytes; JSON and text reach 30
_CHUNK = 1 << 20
_STORED = (WEIGHTS, "loss.png")  # do not get smaller
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # LZMA takes as much memory as the archive asks for
_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that the format can say


def pack(folder: Path, archive: Path) -> int:
    """Write the documented files of a checked folder into one archive; returns its size in bytes.

    Raises: CheckFailed where the folder fails a check, is unfinished or holds a secret or a local path,
        UsageError where the archive is there already or cannot be written.
    """
    if archive.exists():
        raise UsageError(Problem("is there already", "name a new file", str(archive)))
    refuse_unfit(folder)
    names = [name for name in FILES if (folder / name).is_file()]
    beside = archive.with_name(f".{archive.name}.tmp")
    try:
        with zipfile.ZipFile(beside, "w") as target:
            for name in names:
                entry = zipfile.ZipInfo(name, date_time=_TIME)
                entry.compress_type = zipfile.ZIP_STORED if name in _STORED else zipfile.ZIP_DEFLATED
                entry.external_attr = (stat.S_IFREG | 0o644) << 16
                with (folder / name).open("rb") as source, target.open(entry, "w", force_zip64=True) as sink:
                    while block := source.read(_CHUNK):
                        sink.write(block)
        os.replace(beside, archive)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UsageError(Problem(f"cannot be written: {error.strerror}", "name another file", str(archive))) from None
    return archive.stat().st_size


def unpack(archive: Path, folder: Path, *, max_bytes: int = MOST_BYTES) -> list[Problem]:
    """Unpack an archive into a new folder, which appears whole and checked, or not at all; returns warnings and notes.

    Raises: CheckFailed where the archive or the folder in it is not what it says, UsageError for paths that do not do.
    """
    if not archive.is_file():
        raise UsageError(Problem("no such file", "name an archive that `adapters pack` wrote", str(archive)))
    with new_folder(folder) as scratch:
        try:
            with zipfile.ZipFile(archive) as source:
                for entry in _entries(source, archive, max_bytes=max_bytes):
                    with source.open(entry) as stream:
                        _copy(stream, scratch / entry.filename, entry=entry, archive=archive)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, UnicodeError, zlib.error) as error:
            raise CheckFailed(_refused(archive, f"is no sound ZIP archive: {str(error)[:120]}")) from None
        return checked(scratch, inside=f"{archive}!")


def refuse_unfit(folder: Path) -> None:
    """Raise CheckFailed where a folder must not be handed on: a check fails, a secret or a local path, no manifest."""
    errors = [problem for problem in run_checks(Subject(folder)) if problem.severity == "error"]
    errors += secrets_in(folder) if not errors else []
    if not errors and not (folder / MANIFEST).exists():
        errors.append(Problem("has no manifest", "only folders of a finished run are handed on", str(folder)))
    if errors:
        raise CheckFailed(errors)


def checked(scratch: Path, *, inside: str) -> list[Problem]:
    """The warnings and notes of a stranger's folder; its files are named as `inside` says, such as `archive.zip!`.

    Raises: CheckFailed with everything for which it is refused.
    """
    named = {str(scratch): inside.rstrip("!/")} | {str(scratch / name): f"{inside}{name}" for name in FILES}
    problems = [replace(found, file=named.get(str(found.file), inside)) for found in run_checks(Subject(scratch))]
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise CheckFailed(errors)
    return problems


def _entries(source: zipfile.ZipFile, archive: Path, *, max_bytes: int) -> Iterator[zipfile.ZipInfo]:
    """The files of the archive, after every one of them was judged by its name, kind and declared sizes."""
    entries = source.infolist()
    names = [entry.filename for entry in entries]
    for entry in entries:
        name, kind = entry.filename[:80], stat.S_IFMT(entry.external_attr >> 16)
        if entry.filename not in FILES:
            raise CheckFailed(_refused(archive, f"holds {name!r}, which is no file of an adapter folder"))
        if kind not in (0, stat.S_IFREG) or entry.is_dir():
            raise CheckFailed(_refused(archive, f"{name} must be a regular file, got a link or a folder"))
        if entry.flag_bits & 0x1:
            raise CheckFailed(_refused(archive, f"{name} is encrypted"))
        if entry.compress_type not in _METHODS:
            reason = f"{name} must be stored or deflated, got ZIP method {entry.compress_type}"
            raise CheckFailed(_refused(archive, reason))
        if names.count(entry.filename) > 1:
            raise CheckFailed(_refused(archive, f"holds {name} twice"))
        if entry.filename != WEIGHTS and entry.file_size > _MOST_SMALL_BYTES:
            raise CheckFailed(_refused(archive, f"{name} would have {entry.file_size:,} bytes"))
        if entry.file_size > _MOST_RATIO * max(entry.compress_size, 1024):
            ratio = entry.file_size / max(entry.compress_size, 1)
            raise CheckFailed(_refused(archive, f"{name} would grow {ratio:,.0f} times, at most {_MOST_RATIO}"))
    total = sum(entry.file_size for entry in entries)
    if total > max_bytes:
        reason = f"would unpack to {total:,} bytes, at most {max_bytes:,}"
        raise CheckFailed(_refused(archive, reason, "allow more with --max-size"))
    if MANIFEST not in names:
        raise CheckFailed(_refused(archive, f"holds no {MANIFEST}"))
    yield from entries


def _copy(stream: IO[bytes], path: Path, *, entry: zipfile.ZipInfo, archive: Path) -> None:
    """Unpack one file, never more of it than was declared."""
    left = entry.file_size
    with path.open("xb") as sink:
        while block := stream.read(min(_CHUNK, left + 1)):
            left -= len(block)
            if left < 0:
                break
            sink.write(block)
    if left:
        raise CheckFailed(_refused(archive, f"{entry.filename} has another size than declared"))


def _refused(archive: Path, reason: str, fix: str = "do not use it") -> Problem:
    return Problem(reason, fix, str(archive))

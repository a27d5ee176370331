"""Checkpoints on disk: staged, synced, sealed by a manifest and renamed into place; nothing is ever unpickled.

A checkpoint is the folder `checkpoints/step-00000010` with a `manifest.json` that holds the sha256 of every other
file. It is written under a hidden name first; the rename is the moment from which it exists. At resume every
file is checked, a damaged checkpoint is set aside, and the next older one is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.errors import CheckFailed, Problem, UsageError

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
RUN = "run.json"
VERSION = 1
_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = (".writing-", ".replaced-")

Writer = Callable[[Path], None]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose every file was checked against its manifest.

    `run` is what the run knew besides tensors: `identity`, `resolved` (values fixed at the start of the run) and the
    state of the evaluations.
    """

    folder: Path
    step: int
    run: Mapping[str, Any]


def save(run_folder: Path, step: int, files: Mapping[str, Writer], *, keep: int) -> Path:
    """Write a checkpoint and delete the oldest ones beyond `keep`; returns its folder.

    `files` maps each file name to a function that writes it; one function may write several files under the
    folder of the path it gets. A kill at any moment leaves the older checkpoints as they were.

    Raises:
        OSError: the disk is full or unwritable; what was staged is removed, older checkpoints stay.
    """
    checkpoints = run_folder / FOLDER
    checkpoints.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(checkpoints)
    final = checkpoints / f"step-{step:08d}"
    stage = checkpoints / f".writing-{final.name}"
    stage.mkdir()
    try:
        for name, write in files.items():
            write(stage / name)
        sealed = {path.name: _seal(path) for path in sorted(stage.iterdir())}
        manifest = {"version": VERSION, "step": step, "files": sealed}
        (stage / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _sync(stage / MANIFEST)
        _sync(stage)
    except OSError:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    if final.exists():
        final.rename(checkpoints / f".replaced-{final.name}")
    stage.rename(final)
    _sync(checkpoints)
    _rotate(checkpoints, newest=step, keep=keep)
    return final


def steps(run_folder: Path) -> list[int]:
    """The steps of the checkpoints in this run folder, newest first, whether they are valid or not."""
    return sorted(_folders(run_folder / FOLDER), reverse=True)


def newest(run_folder: Path, *, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest valid checkpoint, or None where the run has none yet.

    A damaged one is renamed to `damaged-step-…` and `report` gets one line that names it and the file.

    Raises:
        CheckFailed: there are checkpoints, and all of them are damaged.
    """
    problems: list[Problem] = []
    for step, folder in sorted(_folders(run_folder / FOLDER).items(), reverse=True):
        try:
            return read(folder)
        except CheckFailed as error:
            problems.extend(error.problems)
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            report(f"checkpoint of step {step} is damaged, set aside as {aside.name}: {error.problems[0].reason}")
    if problems:
        raise CheckFailed([*problems, Problem("no checkpoint of this run is valid", "start it anew without --resume")])
    return None


def read(folder: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest and return what it is.

    Raises:
        CheckFailed: a file is missing, has another size or another content; the message names it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, step, files = manifest["version"], manifest["step"], manifest["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise CheckFailed(_damaged(folder, MANIFEST, "is missing or is not a manifest")) from None
    if version != VERSION or folder.name != f"step-{step:08d}":
        raise CheckFailed(_damaged(folder, MANIFEST, f"is of another kind or step (version {version}, step {step})"))
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            raise CheckFailed(_damaged(folder, name, "is missing"))
        if path.stat().st_size != size or sha256(path) != digest:
            raise CheckFailed(_damaged(folder, name, "has another content than the manifest says"))
    if RUN not in expected:
        raise CheckFailed(_damaged(folder, MANIFEST, f"does not list {RUN}"))
    return Checkpoint(folder, step, json.loads((folder / RUN).read_text(encoding="utf-8")))


def check_identity(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to resume a run whose recipe, data, base or versions have changed.

    Raises:
        UsageError: one problem for every field that differs, with the old and the new value.
    """
    before, now = _flat(saved), _flat(current)
    fix = "restore it, or start a new run"
    problems = [
        Problem(f"was {before.get(key)!r} when the run started, got {now.get(key)!r}", fix, key=key)
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if problems:
        raise UsageError(problems)


def sha256(path: Path) -> str:
    """The sha256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat


def _damaged(folder: Path, name: str, reason: str) -> Problem:
    return Problem(f"{name} {reason}", file=f"{FOLDER}/{folder.name}")


def _folders(checkpoints: Path) -> dict[int, Path]:
    if not checkpoints.is_dir():
        return {}
    matches = ((_NAME.fullmatch(path.name), path) for path in checkpoints.iterdir())
    return {int(match[1]): path for match, path in matches if match and path.is_dir()}


def _seal(path: Path) -> dict[str, Any]:
    _sync(path)
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Windows has no such call for folders."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rotate(checkpoints: Path, *, newest: int, keep: int) -> None:
    """Delete all but the `keep` newest by step, never the one just written: the clock and folder times say nothing."""
    older = {step: folder for step, folder in _folders(checkpoints).items() if step != newest}
    for _, folder in sorted(older.items(), reverse=True)[keep - 1 :]:
        folder.rename(checkpoints / f".replaced-{folder.name}")
    _remove_unfinished(checkpoints)


def _remove_unfinished(checkpoints: Path) -> None:
    for path in checkpoints.iterdir():
        if path.name.startswith(_UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)

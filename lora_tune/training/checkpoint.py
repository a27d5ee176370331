"""Checkpoints on disk: staged, synced, sealed by a manifest and renamed into place; nothing is ever unpickled.

A checkpoint is the folder `checkpoints/step-00000010` with a `manifest.json` that holds the sha256 of every other
file and the id of the run. It is written under a hidden name first; the rename is the moment from which it exists. At
resume every file is checked, a damaged checkpoint and one of another run are set aside, and the next older one is
taken. `checkpoints/run.id` names the run that the folder belongs to.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.disk import sync
from lora_tune.errors import CheckFailed, Problem

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
RUN = "run.json"
RUN_ID = "run.id"
VERSION = 2
_NAME = re.compile(r"step-(\d{8,})")
_ID = re.compile(r"[0-9a-f]{32}")
_UNFINISHED = (".writing-", ".deleting-")

Writer = Callable[[Path], None]
Passed = list[tuple[Path, Problem]]  # checkpoints that will not be used, and why


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose every file was checked against its manifest.

    `run` is what the run knew besides tensors: `identity`, `resolved` (values fixed at the start of the run) and the
    state of the evaluations. `run_id` names the run, `files` all that the manifest vouches for.
    """

    folder: Path
    step: int
    run: Mapping[str, Any]
    run_id: str
    files: frozenset[str]


def save(run_folder: Path, step: int, files: Mapping[str, Writer], *, keep: int) -> Path:
    """Write a checkpoint and delete what is older than the `keep` newest valid ones; returns its folder.

    `files` maps each file name to a function that writes it; one function may write several files under the
    folder of the path it gets. A kill or a power cut at any moment leaves the older checkpoints as they were.

    Raises:
        OSError: the disk is full or unwritable; what was staged is removed, older checkpoints stay.
    """
    checkpoints = run_folder / FOLDER
    checkpoints.mkdir(parents=True, exist_ok=True)
    run_id = _run_id(checkpoints)
    _remove_unfinished(checkpoints)
    final = checkpoints / f"step-{step:08d}"
    if final.exists():
        if _valid(final, run_id):
            return final
        _set_aside(final, "damaged")
    stage = checkpoints / f".writing-{final.name}"
    try:
        stage.mkdir()
        for name, write in files.items():
            write(stage / name)
        sealed = {path.name: _seal(path) for path in sorted(stage.iterdir())}
        _write_manifest(stage / MANIFEST, {"version": VERSION, "run": run_id, "step": step, "files": sealed})
        sync(stage)
        stage.rename(final)
        sync(checkpoints)
    except OSError:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    _rotate(checkpoints, newest=step, keep=keep, run_id=run_id)
    return final


def steps(run_folder: Path) -> list[int]:
    """The steps of the checkpoints in this run folder, newest first, whether they are valid or not."""
    return sorted(_folders(run_folder / FOLDER), reverse=True)


def newest(run_folder: Path, *, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest valid checkpoint of this run, or None where it has none yet.

    Where an older one has to be taken, the damaged ones are renamed to `damaged-step-…`, those of another run to
    `foreign-step-…`, and `report` gets a line for each that names it and the file. Nothing is deleted.

    Raises:
        CheckFailed: there are checkpoints, and all of them are damaged; they stay where they are.
    """
    checkpoints = run_folder / FOLDER
    run_id = _read_id(checkpoints)
    passed: Passed = []
    foreign: list[Checkpoint] = []
    for found in _newest_first(checkpoints, passed):
        if run_id in (None, found.run_id):
            _pass_over(passed, report)
            return found
        foreign.append(found)
        passed.append((found.folder, _wrong(found.folder, MANIFEST, "is of another run")))
    if foreign:  # none is of the run that `run.id` names: then it is that file which is wrong
        _pass_over([entry for entry in passed if _step(entry[0]) > foreign[0].step], report)
        return foreign[0]
    if passed:
        fix = "start it anew with --overwrite"
        raise CheckFailed([*(problem for _, problem in passed), Problem("no checkpoint of this run is valid", fix)])
    return None


def read(folder: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest and return what it is.

    Raises:
        CheckFailed: a file is missing, has another size or another content; the message names it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        own_sum, version = manifest.pop("sha256"), manifest["version"]
        run_id, step = manifest["run"], manifest["step"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise CheckFailed(_wrong(folder, MANIFEST, "is missing or is not a manifest")) from None
    if _manifest_sum(manifest) != own_sum:
        raise CheckFailed(_wrong(folder, MANIFEST, "has another content than its own sum says"))
    if version != VERSION or folder.name != f"step-{step:08d}":
        raise CheckFailed(_wrong(folder, MANIFEST, f"is of another kind or step (version {version}, step {step})"))
    if RUN not in expected:
        raise CheckFailed(_wrong(folder, MANIFEST, f"does not list {RUN}"))
    for name, (size, digest) in expected.items():
        path = folder / name
        try:
            whole = path.stat().st_size == size and sha256(path) == digest
        except FileNotFoundError:
            raise CheckFailed(_wrong(folder, name, "is missing")) from None
        except OSError as error:
            raise CheckFailed(_wrong(folder, name, f"cannot be read: {error.strerror}")) from None
        if not whole:
            raise CheckFailed(_wrong(folder, name, "has another content than the manifest says"))
    run = json.loads((folder / RUN).read_text(encoding="utf-8"))
    return Checkpoint(folder, step, run, run_id, frozenset(expected))


def sha256(path: Path) -> str:
    """The sha256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _newest_first(checkpoints: Path, damaged: Passed) -> Iterator[Checkpoint]:
    """The valid checkpoints; the damaged ones that come before each are added to `damaged`."""
    for _, folder in sorted(_folders(checkpoints).items(), reverse=True):
        try:
            found = read(folder)
        except CheckFailed as error:
            damaged.append((folder, error.problems[0]))
        else:
            yield found


def _pass_over(passed: Passed, report: Callable[[str], None]) -> None:
    for folder, problem in passed:
        kind = "foreign" if problem.reason.endswith("of another run") else "damaged"
        done = "passed over"  # on a disk that is read-only
        with suppress(OSError):
            done = f"set aside as {_set_aside(folder, kind).name}"
        report(f"checkpoint of step {_step(folder)} is {kind}, {done}: {problem.reason}")


def _wrong(folder: Path, name: str, reason: str) -> Problem:
    return Problem(f"{name} {reason}", file=f"{FOLDER}/{folder.name}")


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _folders(checkpoints: Path) -> dict[int, Path]:
    if not checkpoints.is_dir():
        return {}
    matches = ((_NAME.fullmatch(path.name), path) for path in checkpoints.iterdir())
    return {int(match[1]): path for match, path in matches if match and path.is_dir()}


def _run_id(checkpoints: Path) -> str:
    """The id of the run that saves here: what stands in `run.id`, else that of its newest checkpoint, else a new one.

    Raises: OSError.
    """
    known = _read_id(checkpoints)
    if known is not None:
        return known
    found = next(_newest_first(checkpoints, []), None)
    run_id = found.run_id if found else uuid.uuid4().hex
    part = checkpoints / f".writing-{RUN_ID}"
    part.write_text(run_id, encoding="ascii")
    sync(part)
    part.replace(checkpoints / RUN_ID)
    return run_id


def _read_id(checkpoints: Path) -> str | None:
    try:
        text = (checkpoints / RUN_ID).read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    return text if _ID.fullmatch(text) else None


def _manifest_sum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({**manifest, "sha256": _manifest_sum(manifest)}, indent=1), encoding="utf-8")
    sync(path)


def _seal(path: Path) -> dict[str, Any]:
    sync(path)
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def _valid(folder: Path, run_id: str) -> bool:
    try:
        return read(folder).run_id == run_id
    except CheckFailed:
        return False


def _set_aside(folder: Path, kind: str) -> Path:
    """Rename a checkpoint that will not be used to a name that is free. Raises: OSError."""
    target, number = folder.with_name(f"{kind}-{folder.name}"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{kind}-{folder.name}.{number}")
    return folder.rename(target)


def _rotate(checkpoints: Path, *, newest: int, keep: int, run_id: str) -> None:
    """Delete what is older than the `keep` newest valid checkpoints, by step: the clock and folder times say nothing.

    The one just written is valid. A damaged one counts for nothing, so that an older one stays that can be resumed. A
    disk that refuses to delete is asked again after the next checkpoint.
    """
    valid = 1
    for step, folder in sorted(_folders(checkpoints).items(), reverse=True):
        if step == newest:
            continue
        if valid >= keep:
            with suppress(OSError):
                folder.rename(folder.with_name(f".deleting-{folder.name}"))
        elif _valid(folder, run_id):
            valid += 1
    with suppress(OSError):
        _remove_unfinished(checkpoints)


def _remove_unfinished(checkpoints: Path) -> None:
    for path in checkpoints.iterdir():
        if path.name.startswith(_UNFINISHED):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

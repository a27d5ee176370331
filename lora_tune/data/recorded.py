"""Finding the data of an older run again: by file name, below the working folder, and only where its content is the
same."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_tune.data.sources import open_source
from lora_tune.errors import Problem, UsageError
from lora_tune.recipe import DataSource, Recipe
from lora_tune.recipe_values import SHARE

_DEPTH = 3  # folders below the working folder
_MOST = 20_000  # files and folders looked at


@dataclass(frozen=True)
class Recorded:
    """What a run read: the name of a local file or folder, or a hub data set, the hash of its content, the commit."""

    name: str
    format: str
    sha256: str
    revision: str | None = None


@dataclass(frozen=True)
class Finder:
    """Looks for recorded data among files that were `given` and below the folder `below`."""

    given: tuple[Path, ...]
    below: Path

    def find(self, wanted: Recorded) -> Path | str | None:
        """Where this content lies; None where it is not at hand."""
        for path in self._candidates(wanted.name):
            if content_hash(path) == wanted.sha256:
                return path
        return None

    def _candidates(self, name: str) -> Iterator[str]:
        """Paths that may hold it: what was given, whatever its name, then what has its name."""
        for path in self.given:
            if not glob.has_magic(name):
                yield str(path)
            if path.is_dir():
                yield from self._in(path, name)
        seen = 0
        for folder, folders, files in os.walk(self.below):
            folders[:] = sorted(one for one in folders if not one.startswith("."))
            if len(Path(folder).relative_to(self.below).parts) >= _DEPTH:
                folders.clear()
            seen += len(folders) + len(files)
            yield from self._in(Path(folder), name)
            if seen > _MOST:
                return

    def _in(self, folder: Path, name: str) -> Iterator[str]:
        path = str(folder / name)
        if os.path.exists(path) or (glob.has_magic(name) and glob.glob(path, recursive=True)):
            yield path


def content_hash(path: str | Path) -> str | None:
    """The hash by which a file, a folder or a glob is recorded; None where it holds no data."""
    try:
        if os.path.isfile(path):
            with open(path, "rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        return open_source(DataSource(source=str(path))).content_hash()
    except (OSError, UsageError):
        return None


def with_found_data(recipe: Recipe, recorded: Sequence[Recorded], finder: Finder, *, where: str) -> Recipe:
    """A stored recipe whose local sources, held-out file and prompt files are paths again, with the recorded content.

    Sources on the hub get the recorded commit. Only what the held-out rows depend on is looked for: where they are a
    file, no task is held out and no solved example shown, that is this file. Raises: UsageError naming what is not at
    hand.
    """
    by_file = isinstance(recipe.eval.hold_out, str) and not SHARE.fullmatch(recipe.eval.hold_out)
    missing: list[Problem] = []

    def path_of(name: str, places: Sequence[Recorded]) -> str:
        wanted = next((one for one in places if one.name == Path(name).name), None)
        found = finder.find(wanted) if wanted else None
        if found is None:
            content = f" (sha256 {wanted.sha256[:16]}…)" if wanted else ""
            reason = f"the held-out rows cannot be made again: {name}{content} is not below the working folder"
            fix = "call it where the data lies, name the file with --data, or give other rows with --data"
            missing.append(Problem(reason, fix, where))
        return str(found)

    sources = recorded[: len(recipe.data)]
    files = [one for one in recorded if one.format == "prompts"]
    data = []
    for number, entry in enumerate(recipe.data):
        known = sources[number] if number < len(sources) else None
        changes: dict[str, object] = {}
        if known is not None and known.revision:
            changes["revision"] = known.revision
        elif not by_file or recipe.eval.hold_out_tasks or recipe.data[0].shots:
            changes["source"] = path_of(entry.source, [known] if known else [])
        if entry.prompts:
            changes["prompts"] = path_of(entry.prompts, files)
        data.append(entry.model_copy(update=changes))
    evaluation = recipe.eval
    if by_file:
        found = path_of(str(recipe.eval.hold_out), recorded[len(recipe.data) :])
        evaluation = evaluation.model_copy(update={"hold_out": found})
    if missing:
        raise UsageError(missing)
    return recipe.model_copy(update={"data": tuple(data), "eval": evaluation})

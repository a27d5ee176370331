"""Sources: what a recipe's `data[].source` names, as records with their place. The only module that imports `datasets`.

A source is a file, a folder (its data files, sorted by path, sub-folders included), a glob, or a data set on the hub.
Its identity is the sha256 of its content: of the file's bytes, of all files' hashes in order, or of the hub rows read.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tune.data import sni
from lora_tune.data.readers import SUFFIXES, read_file, without_filled_nulls
from lora_tune.data.rows import Record
from lora_tune.errors import Problem, UsageError
from lora_tune.imports import quick_imports
from lora_tune.recipe import DataSource

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class SourceIdentity:
    """What data it was: name of the file, folder or hub data set (no path), format, and hash of the content."""

    name: str
    format: str
    sha256: str
    rows: int
    revision: str | None = None
    why: str = ""


@dataclass(frozen=True)
class Source:
    """One source, opened: local `files`, or a hub data set at a commit."""

    name: str
    files: tuple[Path, ...] = ()
    hub: DataSource | None = None
    revision: str | None = None

    def records(self, *, numbered_columns: int = 0, sni_shots: int | None = None) -> Iterator[tuple[str, Record]]:
        """(file as shown, record) for everything that stands in the source, in order. Raises: UsageError.

        `sni_shots`: the files are tasks of Super-NaturalInstructions, of which so many positive examples are shown.
        """
        if self.hub is not None:
            if sni_shots:
                fix = "take the task files, or remove data[].shots"
                raise UsageError(f"data set `{self.name}`: its rows have no positive examples", fix)
            for number, row in enumerate(_hub_rows(self.hub, self.revision), 1):
                yield self.name, Record(number, row)
            return
        for path in self.files:
            shown = shown_path(path)
            try:
                if sni_shots is None:
                    found = read_file(path, numbered_columns=numbered_columns)
                else:
                    found = sni.records(path, shots=sni_shots)
                for record in found:
                    yield shown, record
            except OSError as error:
                raise UsageError(Problem(f"cannot be read: {error.strerror}", "check the file", file=shown)) from None

    def content_hash(self) -> str | None:
        """sha256 of the local content; None for a hub data set, whose rows are hashed while they are read."""
        if self.hub is not None:
            return None
        hashes = []
        for path in self.files:
            with open(path, "rb") as file:
                hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def shown_path(path: Path) -> str:
    """The path as a user reads it: relative to the working folder where that is near, else absolute."""
    try:
        relative = os.path.relpath(path)
    except ValueError:  # another drive on Windows
        return str(path)
    return str(path) if relative.startswith(os.path.join("..", "..", "..")) else relative


def open_source(data: DataSource, *, key: str = "") -> Source:
    """The source that `data` names; `key` is where it stands in the recipe ("data.0.source").

    Raises:
        UsageError: no such file or data set, an empty folder, no access.
    """
    path = Path(data.source).expanduser()
    if path.is_dir():
        found = tuple(sorted(p for p in path.rglob("*") if p.is_file() and _is_data(p, path)))
        if not found:
            raise _usage(
                f"no data file in the folder `{shown_path(path)}`", f"data files end in {', '.join(SUFFIXES)}", key
            )
        return Source(path.name, files=found)
    if path.exists():
        return Source(path.name, files=(path,))
    if glob.has_magic(data.source):
        found = tuple(sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()))
        if not found:
            raise _usage(f"no file matches `{data.source}`", "check the path", key)
        return Source(path.name, files=found)
    if _looks_local(data.source):
        near = get_close_matches(path.name, os.listdir(path.parent), n=1) if path.parent.is_dir() else []
        hint = f"did you mean `{near[0]}`?" if near else "check the path"
        raise _usage(f"no such file or folder: `{shown_path(path)}`", hint, key)
    return Source(name=data.source, hub=data, revision=_hub_commit(data, key))


def _looks_local(source: str) -> bool:
    plain = source.lower().removesuffix(".gz")
    return not _HUB_ID.fullmatch(source) or plain.endswith(SUFFIXES) or os.path.isabs(source)


def _is_data(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and path.name.lower().removesuffix(".gz").endswith(SUFFIXES)


def _usage(reason: str, fix: str, key: str) -> UsageError:
    return UsageError(Problem(reason, fix, key=key or None))


def _hub_commit(data: DataSource, key: str) -> str:
    """The commit that the revision (or the default branch) of a hub data set stands for now. Raises: UsageError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = f"data set `{data.source}`"
    try:
        commit = HfApi().dataset_info(data.source, revision=data.revision).sha
    except GatedRepoError:
        raise _usage(f"{named} is gated", "accept its terms on the hub and set HF_TOKEN", key) from None
    except RevisionNotFoundError:
        raise _usage(f"{named} has no revision `{data.revision}`", "check data[].revision", key) from None
    except (RepositoryNotFoundError, HFValidationError):
        fix = "check the name; for a private one set HF_TOKEN; a local file needs its path and ending"
        raise _usage(f"no file and no {named} on the hub", fix, key) from None
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        fix = "check the network (HF_HUB_OFFLINE), or name a local file"
        raise _usage(f"{named} cannot be reached ({type(error).__name__})", fix, key) from None
    if commit is None:
        raise _usage(f"{named} has no commit", "check the name", key)
    return commit


def _hub_rows(data: DataSource, commit: str | None) -> Iterator[dict[str, Any]]:
    """The rows of a hub data set, streamed. Raises: UsageError, also for a data set that is a script."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    named = f"data set `{data.source}`"
    try:
        stream = load_dataset(data.source, data.config, split=data.split, revision=commit, streaming=True)
        for row in stream:
            yield {name: without_filled_nulls(value) for name, value in row.items()}
    except DatasetNotFoundError as error:
        raise UsageError(f"{named}: {str(error).splitlines()[0]}", "check name, access and HF_TOKEN") from None
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        raise UsageError(f"{named} is a script, and no code from data is run", "use its Parquet revision") from None
    except ValueError as error:
        fix = "set data[].config or data[].split to one of those named"
        raise UsageError(f"{named}: {' '.join(str(error).split())}", fix) from None


def as_dataset(table: pyarrow.Table, *, fingerprint: str) -> Dataset:
    """An Arrow table as a `datasets.Dataset`, without copying it; `fingerprint` names its content."""
    with quick_imports():
        from datasets import Dataset

    return Dataset(table, fingerprint=fingerprint)

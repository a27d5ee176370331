"""Adapter folders on the Hugging Face hub: pushed after checks, private by default; pulled as from any stranger."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_tune.adapter.archive import MOST_BYTES, checked, refuse_unfit
from lora_tune.adapter.folder import FILES, WEIGHTS, read_manifest, write_file, write_manifest
from lora_tune.adapter.new_folder import new_folder
from lora_tune.adapter.regular_file import read_capped
from lora_tune.errors import CheckFailed, Problem, UsageError
from lora_tune.model import hub

CARD = "README.md"
Visibility = Literal["private", "public"]
_CARD_BYTES = 4 << 20
_LICENSE = re.compile(
    r"^license: *(?P<name>[A-Za-z0-9][A-Za-z0-9.+-]*) *$(\nlicense_name: *(?P<other>\S+) *$)?", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Pushed:
    """What lies on the hub now."""

    url: str
    commit: str
    license: str


def push(
    folder: Path, repository: str, *, visibility: Visibility = "private", license_name: str | None = None
) -> Pushed:
    """Upload the documented files of a finished folder as one commit; the repository is made where there is none.

    `license_name` (an SPDX id such as `apache-2.0`) stands in the card where training could not know it.

    Raises:
        CheckFailed: the folder fails a check, holds a secret or a local path, or its card names no licence.
        UsageError: the hub refuses, or the name is none.
    """
    if not hub.is_repository_id(repository) or "/" not in repository:
        raise UsageError(f"must be owner/name, got {repository!r}", "name the repository to push to")
    refuse_unfit(folder)
    with _licensed(folder, license_name) as (ready, name), hub.explained(f"repository {repository!r}", repository):
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repository, private=visibility == "private", exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=ready,
            allow_patterns=sorted(FILES),
            commit_message=f"Adapter {folder.resolve().name}, {read_manifest(ready).tool}",
        )
    return Pushed(url=str(done.repo_url), commit=str(done.oid), license=name)


def pull(repository: str, folder: Path, *, revision: str | None = None, max_bytes: int = MOST_BYTES) -> list[Problem]:
    """Download the documented files of a repository into a new folder, checked as a stranger's; returns its warnings.

    Raises:
        CheckFailed: the folder fails a check, or is larger than `max_bytes`; nothing is left behind.
        UsageError: the hub refuses, or the folder is there already.
    """
    if not hub.is_repository_id(repository):
        raise UsageError(f"must be owner/name, got {repository!r}", "name the repository to pull from")
    if folder.exists():
        raise UsageError(Problem("is there already", "name a new folder", str(folder)))
    _refuse_large(repository, revision, max_bytes)
    cached, _ = hub.download(repository, revision=revision, patterns=tuple(FILES), what="adapter")
    with new_folder(folder) as scratch:
        for name in FILES:
            if (cached / name).is_file():
                shutil.copyfile(cached / name, scratch / name)  # the cache holds links to its blobs
        return checked(scratch, inside=f"{repository}/")


def _refuse_large(repository: str, revision: str | None, max_bytes: int) -> None:
    """Ask the hub for the sizes before anything is downloaded; offline, the cache alone is read."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return
    with hub.explained(f"adapter {repository!r}", repository):
        listed = HfApi().model_info(repository, revision=revision, files_metadata=True).siblings or []
    sizes = {item.rfilename: item.size or 0 for item in listed if item.rfilename in FILES}
    if sum(sizes.values()) > max_bytes:
        reason = f"would be {sum(sizes.values()):,} bytes, at most {max_bytes:,}"
        raise CheckFailed(Problem(reason, "allow more with --max-size", repository))
    if WEIGHTS not in sizes:
        raise CheckFailed(Problem(f"holds no {WEIGHTS}", "name the repository of an adapter", repository))


@contextmanager
def _licensed(folder: Path, license_name: str | None) -> Iterator[tuple[Path, str]]:
    """The folder to upload and its licence; a licence given by the user is written into a copy, hashes included."""
    text = (
        read_capped(folder / CARD, max_bytes=_CARD_BYTES).decode("utf-8", "replace") if (folder / CARD).exists() else ""
    )
    head = text.split("\n---", 1)[0] if text.startswith("---") else ""
    found = _LICENSE.search(head)
    if found and found["name"] != "other" and license_name in (None, found["name"]):
        yield folder, found["name"]
        return
    if license_name is None or not found:
        reason = "names no licence" if found else "is no model card with a licence line"
        raise CheckFailed(
            Problem(reason, "look up the licences of base and data, then give --license", str(folder / CARD))
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", license_name):
        raise UsageError(
            f"--license must be an id such as apache-2.0, got {license_name!r}", "see the hub's list of licences"
        )
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / folder.resolve().name
        copy.mkdir()
        for name in FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, copy / name)
        changed = text[: found.start()] + f"license: {license_name}" + text[found.end() :]
        write_file(copy, CARD, changed.encode())
        write_manifest(copy, read_manifest(folder))
        yield copy, license_name

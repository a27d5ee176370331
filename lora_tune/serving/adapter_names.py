"""Which adapters a command line names: a folder, a folder of folders, or `name=folder` (cold)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lora_tune.adapter.folder import CONFIG
from lora_tune.errors import Problem, UsageError
from lora_tune.serving.settings import MODEL_NAME

_OTHER = re.compile(r"[^a-z0-9_-]+")


def named_folders(texts: Sequence[str]) -> dict[str, Path]:
    """{name: adapter folder} in the order given; a folder's own name in small letters is its adapter's.

    Raises: UsageError for what is no adapter folder, for names that are none, and for one name that stands twice.
    """
    found: dict[str, Path] = {}
    problems: list[Problem] = []
    for text in texts:
        name, equals, path = text.partition("=")
        named = bool(equals) and "/" not in name
        place = Path(path if named else text).expanduser()
        folders = [place] if named else _folders(place)
        if not folders or (named and not (place / CONFIG).is_file()):
            reason = f"holds no adapter ({CONFIG} is missing)" if place.is_dir() else "no such adapter folder"
            problems.append(Problem(reason, "name an adapter folder, or a folder of them", str(place)))
            continue
        for folder in folders:
            called = name if named else name_of(folder)
            if not MODEL_NAME.fullmatch(called):
                fix = "small letters, digits, _ and -, at most 64: NAME=FOLDER"
                problems.append(Problem(f"cannot be the name of an adapter, got {called!r}", fix, str(folder)))
            elif called in found and found[called] != folder:
                problems.append(Problem(f"two adapters would be called {called!r}", "NAME=FOLDER", str(folder)))
            else:
                found[called] = folder
    if problems:
        raise UsageError(problems)
    return found


def name_of(folder: Path) -> str:
    """What an adapter is called by its folder: `Alpaca 7B` becomes `alpaca-7b`."""
    return _OTHER.sub("-", folder.resolve().name.lower()).strip("-_")[:64]


def _folders(place: Path) -> list[Path]:
    """The place itself where it is an adapter folder, else the adapter folders in it, by name."""
    if (place / CONFIG).is_file():
        return [place]
    try:
        inner = sorted(place.iterdir()) if place.is_dir() else []
    except OSError:
        return []
    return [folder for folder in inner if (folder / CONFIG).is_file()]

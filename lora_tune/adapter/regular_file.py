"""Reading files that a stranger may have made: regular files only, no links, nothing over its cap, no deep JSON."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from lora_tune.errors import CheckFailed, Problem


def regular_file(path: Path) -> int:
    """The size in bytes of a regular file.

    A link is refused, except in a snapshot of the hub's cache where it points to a blob of the same repository.

    Raises: CheckFailed for links, folders, pipes, devices and missing files.
    """
    try:
        info = path.lstat()
        if stat.S_ISLNK(info.st_mode) and _is_hub_blob(path):
            info = path.stat()
    except OSError as error:
        raise CheckFailed(Problem(f"cannot be read: {error.strerror}", "give the whole folder", str(path))) from None
    kinds = (("a link", stat.S_ISLNK), ("a folder", stat.S_ISDIR), ("a pipe", stat.S_ISFIFO))
    for kind, matches in kinds:
        if matches(info.st_mode):
            raise CheckFailed(Problem(f"must be a regular file, got {kind}", "put the file itself there", str(path)))
    if not stat.S_ISREG(info.st_mode):
        raise CheckFailed(Problem("must be a regular file, got a device", "put the file itself there", str(path)))
    return info.st_size


def read_capped(path: Path, *, max_bytes: int) -> bytes:
    """The bytes of a regular file. Raises: CheckFailed where it is none or larger than `max_bytes`."""
    size = regular_file(path)
    if size > max_bytes:
        raise CheckFailed(
            Problem(f"at most {max_bytes} bytes are read, got {size}", "remove what does not belong there", str(path))
        )
    try:
        with path.open("rb") as stream:
            return stream.read(max_bytes + 1)[:max_bytes]
    except OSError as error:
        raise CheckFailed(Problem(f"cannot be read: {error.strerror}", "give the whole folder", str(path))) from None


def parse_json(data: bytes, *, where: str) -> Any:
    """JSON without duplicate keys.

    Raises: CheckFailed naming `where` for anything else, too deep nesting included.
    """
    fix = "write the file again"
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique)
    except RecursionError:
        reason = "is nested too deep"
    except _DuplicateKey as error:
        reason = f"has the key {str(error)[:80]!r} twice"
    except UnicodeDecodeError:
        reason = "is not UTF-8 text"
    except ValueError as error:  # JSONDecodeError, and numbers with thousands of digits
        reason = f"is not JSON: {str(error)[:120]}"
    raise CheckFailed(Problem(reason, fix, where))


def read_json(path: Path, *, max_bytes: int) -> Any:
    """The content of a small JSON file. Raises: CheckFailed."""
    return parse_json(read_capped(path, max_bytes=max_bytes), where=str(path))


def read_json_object(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """The content of a small JSON file that holds an object. Raises: CheckFailed."""
    content = read_json(path, max_bytes=max_bytes)
    if not isinstance(content, dict):
        raise CheckFailed(
            Problem(f"must hold a JSON object, got {type(content).__name__}", "write the file again", str(path))
        )
    return content


class _DuplicateKey(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(key)
            seen.add(key)
    return content


def _is_hub_blob(path: Path) -> bool:
    """Whether a link is the hub cache's own: models--org--name/snapshots/<commit>/file -> ../../blobs/<hash>."""
    snapshot = path.parent.resolve()
    repository = snapshot.parent.parent
    if snapshot.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    return path.resolve().parent == repository / "blobs"  # which is no link itself

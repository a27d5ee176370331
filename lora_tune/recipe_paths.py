"""The paths that a recipe names: which are local and where they are; whether the output can be written."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lora_tune.errors import Problem
from lora_tune.recipe_values import SHARE
from lora_tune.yaml_tree import Node

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
_LOCAL = re.compile(r"\.{1,2}([/\\]|$)|[/~\\]|[A-Za-z]:[/\\]")
Wanted = Literal["base", "data", "file", "adapter"]
_NOUN: dict[Wanted, str] = {"base": "folder", "data": "file or folder", "file": "file", "adapter": "folder"}


def resolve(root: Node, *, folder: Path) -> tuple[list[Problem], list[Problem]]:
    """Makes the local paths of a recipe absolute, in the tree itself. Errors and warnings, with `key` and no place.

    Paths of the recipe are relative to `folder`, the one that it lies in; those of an override to the working folder.
    """
    errors: list[Problem] = []
    warnings: list[Problem] = []
    for key, node, wanted in _named_paths(root):
        start = Path.cwd() if node.line is None else folder
        if not _is_local(node.value, wanted, start):
            continue
        path = Path(os.path.abspath(start / Path(node.value).expanduser()))
        if problem := _missing(node.value, path, wanted=wanted, key=key):
            errors.append(problem)
        warnings.extend(_hub_only(root, key))
        node.value = str(path)
    output = root.child("output")
    if output is not None and isinstance(output.value, str) and output.value:
        output.value = str(Path(output.value).expanduser())
        problem = _output(output.value, inputs=[str(node.value) for _, node, _ in _named_paths(root)])
        if problem is not None:
            (warnings if problem.severity == "warning" else errors).append(problem)
    return errors, warnings


def _named_paths(root: Node) -> Iterator[tuple[str, Node, Wanted]]:
    """Key, node and kind of every value of the recipe that may be a path."""
    keys: list[tuple[str, Wanted]] = [
        ("base.name", "base"),
        ("base.chat_template", "file"),
        ("eval.hold_out", "file"),
        ("lora.start_from", "adapter"),
    ]
    data = root.child("data")
    if data is not None and isinstance(data.value, list):
        keys += [(f"data.{number}.source", "data") for number in range(len(data.value))]
        keys += [(f"data.{number}.prompts", "file") for number in range(len(data.value))]
    for key, wanted in keys:
        node: Node | None = root
        for part in key.split("."):
            node = node.child(part) if node is not None else None
        if node is not None and isinstance(node.value, str) and node.value.strip():
            yield key, node, wanted


def _is_local(name: str, wanted: Wanted, start: Path) -> bool:
    if wanted == "file":
        return not SHARE.fullmatch(name)
    if name.startswith("builtin:"):
        return False
    if _LOCAL.match(name) or (start / name).exists():
        return True
    return wanted == "data" and (name.removesuffix(".gz").endswith(DATA_SUFFIXES) or glob.has_magic(name))


def _missing(name: str, path: Path, *, wanted: Wanted, key: str) -> Problem | None:
    """What is wrong with a local path: not there, or a file where a folder is needed, or the other way round."""
    if wanted == "data" and glob.has_magic(name):
        if glob.glob(str(path), recursive=True):
            return None
        return Problem(f"no file matches, got {name!r}", "correct the pattern", key=key)
    if not path.exists():
        fix = "correct the path (relative paths start at the recipe's folder, in overrides at the working folder)"
        if Path(name).exists():
            fix = f"paths in a recipe are relative to its own folder: write {os.path.relpath(name, path.parent)}"
        elif wanted == "base" and re.fullmatch(r"\./[\w.-]+/[\w.-]+", name):
            fix += f"; a base on the hub is written without ./, such as {name.removeprefix('./')}"
        elif key == "eval.hold_out":
            fix = "write a share such as 2%, a number of rows, or a data file that exists"
        return Problem(f"no such {_NOUN[wanted]}, got {name!r}", fix, key=key)
    if wanted in ("base", "adapter") and not path.is_dir():
        return Problem(f"is a file, not a folder, got {name!r}", "name the folder that holds its config", key=key)
    if wanted == "file" and path.is_dir():
        return Problem(f"is a folder, not a file, got {name!r}", "name the file", key=key)
    return None


def _hub_only(root: Node, key: str) -> Iterator[Problem]:
    """Keys that say which part of a hub repository to take, and change nothing for a local path."""
    section = root
    *parts, name = key.split(".")
    for part in parts:
        section = section.child(part) or section
    for other in {"source": ("config", "split", "revision"), "name": ("revision",)}.get(name, ()):
        node = section.child(other)
        if node is not None and node.value is not None:
            yield Problem(
                f"changes nothing: {key} is local", "remove it", key=".".join((*parts, other)), severity="warning"
            )


def _output(name: str, *, inputs: list[str]) -> Problem | None:
    """What is wrong with the output folder before anything is written."""
    path = Path(os.path.abspath(name))
    for above in (path, *path.parents):
        if above.is_file():
            if above == path:
                return Problem(f"is a file, got {name!r}", "name a folder", key="output")
            shown = os.path.relpath(above)
            return Problem(f"cannot be created: {shown} is a file, got {name!r}", "name another folder", key="output")
        if above.exists():
            if not os.access(above, os.W_OK):
                return Problem(f"cannot be written, got {name!r}", f"allow writing in {above}", key="output")
            break
    if str(path) in inputs or path == Path.cwd():
        reason = "is the working folder" if path == Path.cwd() else "is a folder that this recipe reads"
        return Problem(f"{reason}, got {name!r}", "name a folder of its own", key="output")
    if not Path(name).is_absolute() and Path.cwd() not in path.parents:
        return Problem(
            f"leaves the working folder, got {name!r}",
            f"the adapter will be written to {path}; name that folder outright if it is meant",
            key="output",
            severity="warning",
        )
    return None

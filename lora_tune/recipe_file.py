"""A recipe's file: YAML in, a typed recipe out, and for everything that is wrong the line where it stands.

All problems are found in one pass: keys, types, ranges, paths. `problem.key` is a path such as `data.0.source`;
`RecipeFile.locate` turns it into a place, also for problems that are found later (targets that match nothing).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_tune.errors import LoraTuneError, Problem, RecipeError, UsageError
from lora_tune.recipe import Recipe
from lora_tune.recipe_paths import resolve
from lora_tune.recipe_problems import problems_of, shown
from lora_tune.yaml_tree import Node, parse, scalar

MAX_BYTES = 256 * 1024  # a recipe of sixty keys with comments has 4 KiB


@dataclass(frozen=True)
class RecipeFile:
    """A recipe that was read and found right, with the text that it came from.

    Local paths in `recipe.base.name`, `recipe.base.chat_template`, `recipe.data[].source`, `recipe.eval.hold_out` and
    `recipe.lora.start_from` are absolute. `warnings` are problems that do not stop the run.
    """

    recipe: Recipe
    path: Path
    text: str
    overrides: tuple[str, ...] = ()
    warnings: tuple[Problem, ...] = ()
    tree: Node = field(default_factory=lambda: Node({}, "", None, None), repr=False, compare=False)

    def locate(self, problem: Problem) -> Problem:
        """The problem with file, line and column of its `key`: of the value, else of the section it would stand in."""
        return _located(problem, self.tree, str(self.path))

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Errors raised inside that name a key of the recipe say where it stands. Raises: the same errors."""
        try:
            yield
        except LoraTuneError as error:
            placed = [problem if problem.key is None else self.locate(problem) for problem in error.problems]
            if placed == list(error.problems):
                raise
            raise type(error)(placed) from None


def read_recipe(path: Path, *, overrides: Sequence[str] = ()) -> RecipeFile:
    """Reads and checks a recipe; `overrides` are `section.key=value`, values in YAML, paths from the working folder.

    Raises:
        RecipeError: with every problem of file and overrides, in the order of the lines.
        UsageError: the file cannot be read, or an override is not of the form section.key=value.
    """
    text = read_text(path)
    file = str(path)
    tree, problems = parse(text, origin=file)
    if tree is None:
        raise RecipeError(Problem("the recipe is empty", "write at least base, data and output", file=file))
    if not isinstance(tree.value, dict):
        got = f"got {shown(tree.plain())}"
        raise RecipeError(Problem(f"the recipe must be a mapping, {got}", "write `key: value` lines", file, tree.line))
    problems += _apply(tree, overrides)
    found, warnings = resolve(tree, folder=path.resolve().parent)
    try:
        recipe = Recipe.model_validate(tree.plain())
    except ValidationError as error:
        found += problems_of(error)
        recipe = None
    problems += [_located(problem, tree, file) for problem in found if not _damaged(problem, tree)]
    problems = _in_order(problems, file)
    if problems or recipe is None:
        raise RecipeError(problems)
    placed = tuple(_located(problem, tree, file) for problem in warnings)
    return RecipeFile(recipe=recipe, path=path, text=text, overrides=tuple(overrides), warnings=placed, tree=tree)


def read_stored_recipe(path: Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of an adapter folder, whose local files are named without their folders and need not be at hand.

    Raises: as `read_recipe`.
    """
    tree, problems = parse(read_text(path), origin=str(path))
    if tree is None or not isinstance(tree.value, dict):
        raise RecipeError(Problem("the recipe must be a mapping", "write the folder again", file=str(path)))
    problems += _apply(tree, overrides)
    try:
        recipe = Recipe.model_validate(tree.plain())
    except ValidationError as error:
        problems += [_located(problem, tree, str(path)) for problem in problems_of(error)]
        raise RecipeError(_in_order(problems, str(path))) from None
    if problems:
        raise RecipeError(_in_order(problems, str(path)))
    return recipe


def read_text(path: Path) -> str:
    """The text of a recipe file, without a byte order mark.

    Raises: UsageError where it cannot be read, RecipeError where it is too large or not UTF-8.
    """
    file = str(path)
    if not path.exists():
        raise UsageError(Problem("no such file", "name a recipe, such as recipes/quickstart.yaml", file=file))
    if not path.is_file():
        raise UsageError(Problem("is not a file", "name a recipe, such as recipes/quickstart.yaml", file=file))
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(Problem(f"cannot be read: {error.strerror}", "allow reading it", file=file)) from None
    if len(content) > MAX_BYTES:
        raise RecipeError(Problem(f"is larger than {MAX_BYTES // 1024} kB", "recipes have about 2 kB", file))
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        reason = f"is not UTF-8, got byte 0x{content[error.start]:02x}"
        raise RecipeError(Problem(reason, "save the file as UTF-8", file, line, column)) from None


def _apply(tree: Node, overrides: Sequence[str]) -> list[Problem]:
    """Puts the overrides into the tree; problems name the override instead of a line."""
    problems: list[Problem] = []
    seen: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        origin = f"override {override}"
        if not equals or not re.fullmatch(r"[^.\s=]+(\.[^.\s=]+)*", key):
            raise UsageError(f"override must be section.key=value, got {override!r}", "such as train.epochs=2")
        if key in seen:
            problems.append(Problem("is overridden twice", "keep one of the two", file=origin, key=key))
            continue
        seen.add(key)
        node, found = _override_value(text, origin)
        problems += found
        node.broken = bool(found)
        if problem := _put(tree, key, node):
            problems.append(problem)
    return problems


def _override_value(text: str, origin: str) -> tuple[Node, list[Problem]]:
    """The value of an override as a tree without lines; a glob such as *.jsonl needs no quotes here."""
    if text[:1] and text[0] in "*&!%@`":
        return Node(scalar(text), origin, None, None), []
    try:
        node, problems = parse(text, origin=origin)
    except RecipeError as error:
        node, problems = None, [replace(problem, line=None, column=None) for problem in error.problems]
    node = node or Node(None, origin, None, None)
    for inner in _below(node):
        inner.line = inner.column = inner.key_line = inner.key_column = None
    return node, [replace(problem, line=None, column=None, key=None) for problem in problems]


def _below(node: Node) -> Iterator[Node]:
    yield node
    if isinstance(node.value, (dict, list)):
        for child in node.value.values() if isinstance(node.value, dict) else node.value:
            yield from _below(child)


def _put(tree: Node, key: str, node: Node) -> Problem | None:
    """Sets one value; sections that the recipe does not have are made, entries of a list must be there."""
    *sections, name = key.split(".")
    at = tree
    for number, part in enumerate([*sections, name]):
        last = number == len(sections)
        if isinstance(at.value, list):
            if not part.isdecimal() or int(part) >= len(at.value):
                has = f"{len(at.value)} entries, numbered from 0" if len(at.value) != 1 else "1 entry, number 0"
                where = ".".join(sections[:number])
                return Problem(f"{where} has {has}, got {part!r}", f"such as {where}.0.{name}=…", file=node.origin)
            if last:
                at.value[int(part)] = node
        elif isinstance(at.value, dict):
            if last:
                at.value[part] = node
            else:
                at.value.setdefault(part, Node({}, node.origin, None, None))
        else:
            where = ".".join([*sections, name][:number])
            return Problem(f"{where} is a single value and has no key {part!r}", "correct the key", file=node.origin)
        at = at.child(part) or at
        if at.value is None and not last:
            at.value = {}
    return None


def _located(problem: Problem, tree: Node, file: str) -> Problem:
    """File, line and column of the value that `problem.key` names; of its section where the recipe does not set it."""
    if problem.file is not None or problem.key is None:
        return problem if problem.file is not None else replace(problem, file=file)
    at, missing = _deepest(tree, problem.key)
    if at is tree:
        return replace(problem, file=file)
    unknown_key = problem.reason.startswith("unknown key") or isinstance(at.value, (dict, list)) or missing
    use_key = unknown_key and at.key_line is not None
    line, column = (at.key_line, at.key_column) if use_key else (at.line, at.column)
    return replace(problem, file=at.origin, line=line, column=column)


def _deepest(tree: Node, key: str) -> tuple[Node, bool]:
    """The node that a key leads to, and whether the way ended before it. A name with dots in it is one step as well."""
    at, parts = tree, key.split(".")
    for number, part in enumerate(parts):
        if whole := at.child(".".join(parts[number:])):
            return whole, False
        child = at.child(part)
        if child is None:
            return at, True
        at = child
    return at, False


def _damaged(problem: Problem, tree: Node) -> bool:
    """Whether the value was refused already while the text was read."""
    parts = (problem.key or "").split(".")
    return any(_deepest(tree, ".".join(parts[:end]))[0].broken for end in range(1, len(parts) + 1))


def _in_order(problems: list[Problem], file: str) -> list[Problem]:
    """By place, those without a line after those with one, overrides last; each once."""
    unique = list(dict.fromkeys(problems))
    return sorted(unique, key=lambda one: (one.file != file, one.line is None, one.line or 0, one.column or 0))


def recipe_as_yaml(recipe: Recipe) -> str:
    """The recipe as YAML with every key, also those left at their default; reading it gives an equal recipe."""
    return "".join(yaml_lines(recipe.model_dump(mode="json"), indent=""))


def yaml_lines(section: dict[str, Any], *, indent: str = "") -> Iterator[str]:
    """The lines of a YAML mapping, of scalars that read back as themselves."""
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{_yaml_scalar(key)}:\n"
            yield from yaml_lines(value, indent=indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield f"{indent}{_yaml_scalar(key)}:\n"
            for entry in value:
                first, *rest = yaml_lines(entry, indent=indent + "    ")
                yield f"{indent}  - {first.lstrip(' ')}"
                yield from rest
        elif isinstance(value, list):
            yield f"{indent}{_yaml_scalar(key)}: [{', '.join(_yaml_scalar(item) for item in value)}]\n"
        else:
            yield f"{indent}{_yaml_scalar(key)}: {_yaml_scalar(value) if value != {} else '{}'}\n"


def _yaml_scalar(value: Any) -> str:
    """A scalar that reads back as itself: plain where that is unmistakable, else in double quotes."""
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if re.fullmatch(r"[A-Za-z0-9_./][A-Za-z0-9_./%+-]*", value) and scalar(value) == value:
        return str(value)
    quoted = json.dumps(value, ensure_ascii=False)
    return re.sub(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd]|[\u2028\u2029]", _escaped, quoted)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"

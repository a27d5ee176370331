"""YAML 1.2 text as a tree that knows where everything stands, and that cannot be made to expand or to run anything.

ruamel.yaml only splits the text into events. Anchors, aliases and tags are refused there, before anything is built, so
an alias bomb costs nothing; scalars are read by the core schema of YAML 1.2 (section 10.3.2): `2e-4` is a number,
`yes` is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceStartEvent,
)

from lora_tune.errors import Problem, RecipeError

MAX_DEPTH = 12  # a recipe needs 4
MAX_EVENTS = 5_000  # a long recipe needs 300; keeps the judgement below a second
_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]{1,400}|0o[0-7]{1,400}|0x[0-9a-fA-F]{1,400}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(slots=True)
class Node:
    """A value and its place: a scalar, a list of nodes or a dictionary of nodes. Lines and columns count from 1.

    `origin` is the file, or the override, that it came from. `broken`: it was refused already, so that what
    follows from the damage needs no report.
    """

    value: Any
    origin: str
    line: int | None
    column: int | None
    key_line: int | None = None
    key_column: int | None = None
    broken: bool = False

    def plain(self) -> Any:
        """The value as Python's own dictionaries, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def child(self, part: str) -> Node | None:
        """The node below this one by key, or by number in a list."""
        if isinstance(self.value, dict):
            found: Node | None = self.value.get(part)
            return found
        if isinstance(self.value, list) and part.isdecimal() and int(part) < len(self.value):
            entry: Node = self.value[int(part)]
            return entry
        return None


def scalar(text: str) -> Any:
    """What unquoted text means by the core schema of YAML 1.2: null, true, false, a number, or text."""
    if _NULL.fullmatch(text):
        return None
    if match := _BOOL.fullmatch(text):
        return match[1] is not None
    if _INT.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if match := _INF.fullmatch(text):
        return float(match[1] + "inf")
    if _NAN.fullmatch(text):
        return float("nan")
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def parse(text: str, *, origin: str, tags: frozenset[str] = frozenset()) -> tuple[Node | None, list[Problem]]:
    """The tree of one YAML document (None where there is none), and what was refused in it.

    `tags` are read as if they were not there; any other is refused.

    Raises:
        RecipeError: not YAML, nested too deeply or too many values; what was refused before that is named too.
    """
    builder = _Builder(origin, tags)
    try:
        _no_control_characters(text, origin)
        root = builder.document(iter(YAML(typ="safe", pure=True).parse(text)))
    except MarkedYAMLError as error:
        raise RecipeError([*builder.problems, _syntax_problem(error, text, builder)]) from None
    except YAMLError as error:
        reason = f"is not YAML: {str(error).splitlines()[0]}"
        raise RecipeError([*builder.problems, Problem(reason, "remove the character", file=origin)]) from None
    except RecipeError as error:
        raise RecipeError([*builder.problems, *error.problems]) from None
    return root, builder.problems


def _no_control_characters(text: str, origin: str) -> None:
    match = _CONTROL.search(text)
    if match:
        line = text.count("\n", 0, match.start()) + 1
        column = match.start() - text.rfind("\n", 0, match.start())
        reason = f"control character, got \\x{ord(match[0]):02x}"
        raise RecipeError(Problem(reason, "remove it", file=origin, line=line, column=column))


class _Builder:
    """Builds the tree from the events of the parser and collects what is refused."""

    def __init__(self, origin: str, tags: frozenset[str]) -> None:
        self.origin, self.tags = origin, tags
        self.problems: list[Problem] = []
        self.quoted: ScalarEvent | None = None  # the last quoted scalar that runs over several lines
        self._events = 0

    def document(self, events: Iterator[Event]) -> Node | None:
        """The first document; a second one is refused."""
        root: Node | None = None
        documents = 0
        for event in events:
            documents += isinstance(event, DocumentStartEvent)
            if documents > 1:
                raise self._stop(event, "a second document begins", "a recipe is one document: remove the line ---")
            if isinstance(event, NodeEvent):
                root = self._node(event, events, path=())
        return root

    def _node(self, event: NodeEvent, events: Iterator[Event], *, path: tuple[str, ...]) -> Node:
        self._events += 1
        if self._events > MAX_EVENTS:
            raise self._stop(event, f"more than {MAX_EVENTS} values", "a recipe has about a hundred")
        if len(path) > MAX_DEPTH:
            raise self._stop(event, f"nested more than {MAX_DEPTH} levels deep", "a recipe has at most four levels")
        node = Node(None, self.origin, event.start_mark.line + 1, event.start_mark.column + 1)
        node.broken = self._refused(event, path)
        if isinstance(event, ScalarEvent):
            node.value = self._scalar(event)
        elif isinstance(event, SequenceStartEvent):
            node.value = self._sequence(events, path)
        elif isinstance(event, MappingStartEvent):
            node.value = self._mapping(events, path)
        return node

    def _scalar(self, event: ScalarEvent) -> Any:
        if event.style in ("'", '"') and event.end_mark.line > event.start_mark.line:
            self.quoted = event
        return scalar(event.value) if event.style is None and event.tag is None else event.value

    def _sequence(self, events: Iterator[Event], path: tuple[str, ...]) -> list[Node]:
        items: list[Node] = []
        for event in events:
            if not isinstance(event, NodeEvent):
                break
            items.append(self._node(event, events, path=(*path, str(len(items)))))
        return items

    def _mapping(self, events: Iterator[Event], path: tuple[str, ...]) -> dict[str, Node]:
        found: dict[str, Node] = {}
        for event in events:
            if not isinstance(event, NodeEvent):
                break
            if not isinstance(event, ScalarEvent):
                fix = "write `key: value`; quote a value that begins with { or ["
                raise self._stop(event, "a key must be text", fix)
            key = event.value
            self._refused(event, (*path, key))
            value = next(events)
            if not isinstance(value, NodeEvent):
                break
            node = self._node(value, events, path=(*path, key))
            node.key_line, node.key_column = event.start_mark.line + 1, event.start_mark.column + 1
            if key in found:
                first = found[key].key_line
                self._refuse(event, (*path, key), f"stands twice, first in line {first}", "keep one of the two")
            else:
                found[key] = node
        return found

    def _refused(self, event: NodeEvent, path: tuple[str, ...]) -> bool:
        """Whether the event is an alias, or has an anchor or a tag; says so."""
        if isinstance(event, AliasEvent):
            reason, fix = f"aliases are not allowed, got *{event.anchor}", "write the value out; quote text with a *"
        elif event.anchor is not None:
            reason, fix = f"anchors are not allowed, got &{event.anchor}", "remove it; quote text with a &"
        elif isinstance(event, (ScalarEvent, CollectionStartEvent)) and event.tag not in (None, *self.tags):
            reason, fix = f"tags are not allowed, got {event.tag}", "remove it: a recipe holds plain values"
        else:
            return False
        self._refuse(event, path, reason, fix)
        return True

    def _refuse(self, event: Event, path: tuple[str, ...], reason: str, fix: str) -> None:
        mark = event.start_mark
        if self.problems and self.problems[-1].line == mark.line + 1:
            return  # one complaint a line: a line of aliases would bury everything else
        key = ".".join(path) or None
        self.problems.append(Problem(reason, fix, self.origin, mark.line + 1, mark.column + 1, key))

    def _stop(self, event: Event, reason: str, fix: str) -> RecipeError:
        mark = event.start_mark
        return RecipeError(Problem(reason, fix, self.origin, mark.line + 1, mark.column + 1))


def _syntax_problem(error: MarkedYAMLError, text: str, builder: _Builder) -> Problem:
    """The parser's complaint in plain words, where the mistake was made rather than where it was noticed."""
    lines = text.splitlines()
    noticed = error.problem_mark or error.context_mark
    began = error.context_mark or noticed
    if noticed is None or began is None:
        return Problem(f"is not YAML: {error.problem}", "correct it", builder.origin)
    complaint, context = str(error.problem), str(error.context)
    here = lines[noticed.line] if noticed.line < len(lines) else ""
    quoted = builder.quoted
    if "quoted scalar" in context and "end of stream" in complaint:
        mark, reason, fix = began, "the quote opened here is never closed", "close it on the same line"
    elif quoted and quoted.end_mark.line == noticed.line:
        mark, reason = quoted.start_mark, f"the quote opened here runs on to line {noticed.line + 1}"
        fix = "close it on the same line"
    elif here[: noticed.column + 1].lstrip(" ").startswith("\t"):
        mark, reason, fix = noticed, "tab used as indentation", "indent with spaces"
    elif "flow" in context and (began.line != noticed.line or "stream end" in complaint):
        bracket = "[" if "sequence" in context else "{"
        mark, reason, fix = began, f"the bracket {bracket} is never closed", "close it"
    elif "mapping values are not allowed" in complaint:
        mark, reason = noticed, "a key where none can stand"
        fix = "give every key its own line and the indentation of its section"
    elif "could not find expected ':'" in complaint:
        mark, reason = began, f"expected `key: value`, got {lines[began.line].strip()[:60]!r}"
        fix = "write a colon and a space behind the key"
    elif "cannot start any token" in complaint:
        mark, reason, fix = noticed, f"a value cannot begin with {here[noticed.column]}", "put it in quotes"
    else:
        mark, reason, fix = noticed, f"is not YAML: {complaint}", "check indentation, colons and brackets around here"
    return Problem(reason, fix, builder.origin, mark.line + 1, mark.column + 1)

"""Metrics of structured answers: JSON, its schema, and tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jsonschema import validators
from jsonschema.exceptions import SchemaError
from referencing import Registry
from referencing.exceptions import Unresolvable

_CALL_ARGUMENTS = ("arguments", "parameters")  # the second is what the templates of Llama 3 write


def read_json(text: str) -> Any | None:
    """The JSON object or list that a text is, and nothing else; None where it is none.

    Numbers must be JSON's own (no NaN), and a fence of ``` around it is not JSON.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, (dict, list)) else None


def json_valid(answer: str) -> float:
    """1.0 if the answer is a JSON object or list and nothing else, else 0.0 (RFC 8259)."""
    return float(read_json(answer) is not None)


def json_schema(answer: str, schema: Mapping[str, Any]) -> float:
    """1.0 if the answer is JSON that the schema admits, else 0.0 (JSON Schema 2020-12, by `jsonschema`)."""
    value = read_json(answer)
    return float(value is not None and _admits(schema, value))


def schema_of(value: Any) -> dict[str, Any]:
    """The schema of a reference: the same keys, and values of the same types; lists of what its elements are."""
    if isinstance(value, dict):
        properties = {key: schema_of(inner) for key, inner in value.items()}
        return {
            "type": "object",
            "properties": properties,
            "required": sorted(properties),
            "additionalProperties": False,
        }
    if isinstance(value, list):
        kinds = {json.dumps(schema_of(inner), sort_keys=True): schema_of(inner) for inner in value}
        return {"type": "array", "items": {"anyOf": list(kinds.values())}} if kinds else {"type": "array"}
    if isinstance(value, bool) or value is None:
        return {"type": "null" if value is None else "boolean"}
    return {"type": "string" if isinstance(value, str) else "number"}


def tool_match(answer: str, calls: Sequence[Mapping[str, Any]]) -> float:
    """1.0 if the answer calls exactly the reference's tools with equal arguments, in any order, else 0.0.

    `calls` are in the form of the OpenAI API. Calls of the answer are the JSON objects with a name and arguments that
    stand in it, whatever the template writes around them (the AST match of Patil et al. 2024, on JSON).
    """
    if not calls:
        raise ValueError("a row without a tool call in its reference")
    return float(_sorted(calls_in(answer)) == _sorted(_as_pair(call) for call in calls))


def tool_schema(answer: str, tools: Sequence[Mapping[str, Any]]) -> float:
    """1.0 if the answer calls a tool at least once, and all its calls are of declared tools whose `parameters` schema
    admits the arguments, else 0.0."""
    schemas = {}
    for tool in tools:
        function = tool.get("function", tool)
        schemas[function.get("name")] = function.get("parameters") or {}
    found = calls_in(answer)
    return float(bool(found) and all(name in schemas and _admits(schemas[name], given) for name, given in found))


def calls_in(text: str) -> list[tuple[str, Any]]:
    """(name, arguments) of every tool call that stands in a text as JSON, in order."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    found, place = [], 0
    while (start := _next_opening(text, place)) >= 0:
        try:
            value, place = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            place = start + 1
            continue
        found += list(_calls(value))
    return found


def _next_opening(text: str, place: int) -> int:
    return min((at for at in (text.find("{", place), text.find("[", place)) if at >= 0), default=-1)


def _calls(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        for inner in value:
            yield from _calls(inner)
    elif isinstance(value, dict):
        inner = value.get("function")
        given = inner if isinstance(inner, dict) else value
        if isinstance(given.get("name"), str) and any(key in given for key in _CALL_ARGUMENTS):
            yield _as_pair(given)


def _as_pair(call: Mapping[str, Any]) -> tuple[str, Any]:
    given = call.get("function", call)
    arguments: Any = next((given[key] for key in _CALL_ARGUMENTS if key in given), {})
    if isinstance(arguments, str):  # OpenAI's API writes them as a text
        parsed = read_json(arguments)
        arguments = arguments if parsed is None else parsed
    return str(given.get("name")), arguments


def _sorted(pairs: Iterator[tuple[str, Any]] | Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    return sorted((name, json.dumps(_plain(arguments), sort_keys=True)) for name, arguments in pairs)


def _plain(value: Any) -> Any:
    """JSON knows one kind of number: 1.0 is 1."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _admits(schema: Mapping[str, Any], value: Any) -> bool:
    """Whether a schema admits a value; one that is no schema admits everything.

    References lead into the schema itself alone: no file and no address is opened.
    """
    kind = validators.validator_for(schema, default=validators.Draft202012Validator)
    try:
        kind.check_schema(schema)
        return bool(kind(schema, registry=Registry()).is_valid(value))
    except (SchemaError, Unresolvable):
        return True


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")

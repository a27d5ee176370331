"""What pydantic found wrong in a recipe, in plain words: what it must be, what it is, what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from lora_tune.errors import Problem
from lora_tune.foreign_keys import unknown_key
from lora_tune.recipe import Recipe, section_of

_SHOWN = 60  # characters of a value in a message
_TYPES = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "model_type": "must be a section of keys",
    "dict_type": "must be a mapping {name: value}",
    "finite_number": "must be finite",
    "string_too_short": "must not be empty",
}
_BOUNDS = {
    "greater_than": ("gt", "must be above {}"),
    "greater_than_equal": ("ge", "must be at least {}"),
    "less_than": ("lt", "must be below {}"),
    "less_than_equal": ("le", "must be at most {}"),
}
_WHY = {  # a bound and its reason
    "train.epochs": "with 0 nothing would be trained; the default is 1",
    "train.max_length": "in fewer than 2 tokens nothing would be predicted; the default is 2048",
}


def shown(value: Any) -> str:
    """A value as a message shows it: `text '16'`, `2.7`, `true`, `null`, `a list`, `a mapping`; 60 characters of it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, dict):
        return "a mapping"
    text = f"text {value!r}" if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def problems_of(error: ValidationError) -> list[Problem]:
    """Every single thing that pydantic found, with `key` as a path such as `data.0.source` and no place yet."""
    return [problem for details in error.errors(include_url=False) for problem in _problems(details)]


def _problems(details: ErrorDetails) -> Iterator[Problem]:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    key = ".".join(str(part) for part in details["loc"] if part != "[key]")
    if kind == "conflict":
        for name, reason, fix in context["found"]:
            yield Problem(reason, fix, key=f"{key}.{name}".strip("."))
        return
    if kind == "extra_forbidden":
        reason, fix = unknown_key(key)
        yield Problem(f"{reason}, got {shown(value)}", fix, key=key)
        return
    if kind == "missing":
        yield Problem("is missing", _missing_fix(key), key=key)
        return
    reason, fix = _wrong_value(kind, value, context, key)
    if not fix and kind in _BOUNDS:
        fix = _WHY.get(key, "")
    yield Problem(f"{reason}, got {shown(value)}", fix or _default_fix(key), key=key)


def _wrong_value(kind: str, value: Any, context: Mapping[str, Any], key: str) -> tuple[str, str]:
    """Reason and fix of a value that has the wrong type or is out of range."""
    if kind == "literal_error":
        return _wrong_choice(value, str(context["expected"]), key)
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        bound = context[name]
        return words.format(int(bound) if bound == int(bound) else bound), ""
    if kind == "expected":
        return str(context["expected"]), context["fix"] or _quotes_fix(value)
    reason = _TYPES.get(kind)
    if reason is None:
        return f"is wrong: {kind}", ""
    if kind == "bool_type" and isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
        return reason, f"write {'true' if value.lower() in ('yes', 'on') else 'false'} (in YAML 1.2 `{value}` is text)"
    if kind == "string_type" and value is not None and not isinstance(value, (dict, list)):
        return reason, f"put it in quotes: '{value}'"
    if kind == "model_type":
        return reason, "write its keys below it, indented"
    return reason, _quotes_fix(value) if kind in ("int_type", "float_type", "bool_type") else ""


def _quotes_fix(value: Any) -> str:
    """A number in quotes is text: say so."""
    if not isinstance(value, str):
        return ""
    try:
        float(value)
    except ValueError:
        return "drop the quotes" if value in ("true", "false") else ""
    return "drop the quotes"


def _wrong_choice(value: Any, expected: str, key: str) -> tuple[str, str]:
    choices = [choice.strip("' ") for part in expected.split(" or ") for choice in part.split(",")]
    reason = f"must be one of {', '.join(choices)}"
    nearest = get_close_matches(str(value).lower(), choices, n=1, cutoff=0.5)
    if nearest:
        return reason, f"did you mean `{nearest[0]}`?"
    if value is False and "none" in choices:
        return reason, "write none"
    return reason, ""


def field_at(key: str) -> FieldInfo | None:
    """The field of the recipe behind a path such as `train.epochs` or `data.0.source`; None where there is none."""
    model: type[BaseModel] | None = Recipe
    field: FieldInfo | None = None
    for part in key.split("."):
        if part.isdecimal() and field is not None:
            continue
        if model is None or part not in model.model_fields:
            return None
        field = model.model_fields[part]
        model = section_of(field)
    return field


def _missing_fix(key: str) -> str:
    field = field_at(key)
    name = key.rpartition(".")[2]
    return f"add `{name}:` ({field.description})" if field is not None and field.description else f"add `{name}:`"


def _default_fix(key: str) -> str:
    field = field_at(key)
    if field is None or field.is_required():
        return f"needed is: {field.description}" if field is not None and field.description else "correct it"
    default = field.get_default()
    if default is None:
        return "leave it out where it is not needed"
    return f"the default is {default if isinstance(default, str) else json.dumps(default)}"

"""Texts of recipes for tests: the shortest one, and that one with any other key."""

from __future__ import annotations

from collections.abc import Iterator

from lora_tune.foreign_keys import recipe_keys
from lora_tune.recipe import section_of
from lora_tune.recipe_problems import field_at

SHORT = "base: {name: some/base}\ndata:\n  - {source: some/rows}\noutput: out\n"


def put(key: str, value: str, text: str = SHORT) -> tuple[str, int]:
    """The short recipe with one more key, written as a block of its own, and the line of its value."""
    top, _, name = key.partition(".")
    lines = text.splitlines()
    if not name:
        lines = [line for line in lines if not line.startswith(f"{top}:")]
        if top == "data":
            lines.remove("  - {source: some/rows}")
        return "\n".join([*lines, f"{top}: {value}", ""]), len(lines) + 1
    if top == "data":
        rest = {"source": ""}.get(name.removeprefix("0."), "    source: some/rows")
        block = ["data:", f"  - {name.removeprefix('0.')}: {value}", *([rest] if rest else [])]
        lines = [line for line in lines if "data:" not in line and "source" not in line]
        return "\n".join([*lines, *block, ""]), len(lines) + 2
    lines = [line for line in lines if not line.startswith(f"{top}:")]
    block = [f"{top}:", f"  {name}: {value}"] + (["  name: some/base"] if top == "base" and name != "name" else [])
    return "\n".join([*lines, *block, ""]), len(lines) + 2


def keys() -> Iterator[str]:
    """Every key of the recipe, entries of `data` as data.0.…"""
    yield from (key.replace("[]", ".0") for key in recipe_keys())


def leaves() -> list[str]:
    """The keys that hold a value rather than a section."""
    return [key for key in keys() if (field := field_at(key)) is not None and section_of(field) is None]

"""Writes recipe.md, the table of all recipe keys, from the recipe's own definition:  python docs/recipe_keys.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_tune.recipe import Recipe

TARGET = Path(__file__).with_name("recipe.md")
HEAD = """# All keys of a recipe

Made from the definition by `python docs/recipe_keys.py`; a test sees to it that it is up to date. `lora-tune recipe
check FILE` checks a recipe, `lora-tune recipe schema` prints the JSON Schema from which editors complete. Every key can
be set on the command line as well: `train.epochs=2`, `data.0.source=my_rows.jsonl`. Shares are written as `2%`.
"""


def keys_table() -> str:
    """The text of recipe.md."""
    schema = Recipe.model_json_schema()
    sections = {name: _section(schema, value) for name, value in schema["properties"].items()}
    parts = [HEAD]
    for name, section in sections.items():
        if section is not None:
            many = schema["properties"][name].get("type") == "array"
            title = f"{name}[]" if many else name
            parts.append(f"## `{title}`\n\n{section.get('description', '').strip()}\n\n{_rows(schema, section)}")
    top = {"properties": {name: schema["properties"][name] for name, section in sections.items() if section is None}}
    parts.append(f"## top level\n\n{_rows(schema, top | {'required': schema.get('required', [])})}")
    return "\n".join(parts)


def _section(schema: dict[str, Any], value: dict[str, Any]) -> dict[str, Any] | None:
    """The definition of a section that a top-level key holds, or None for a plain value."""
    reference = value.get("$ref") or value.get("items", {}).get("$ref")
    return schema["$defs"][reference.rsplit("/", 1)[-1]] if reference else None


def _rows(schema: dict[str, Any], section: dict[str, Any]) -> str:
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, value in section["properties"].items():
        needed = name in section.get("required", [])
        default = "**needed**" if needed else _default(value.get("default"))
        meaning = " ".join(value.get("description", "").split())
        cells = [f"`{name}`", _values(value), default, meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(value: Any) -> str:
    if value in (None, [], {}):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _values(value: dict[str, Any]) -> str:
    """What may stand there, in words."""
    if "anyOf" in value:
        kinds = [_values(kind) for kind in value["anyOf"] if kind.get("type") != "null"]
        return ", ".join(dict.fromkeys(kinds))
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{word}`" for word in value["enum"])
    if value.get("type") == "array":
        return "list of " + _values(value.get("items", {}))
    if value.get("type") == "object":
        return "mapping"
    if value.get("pattern", "").endswith("%$"):
        return "share"
    names = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true, false"}
    word = names.get(value.get("type", ""), "text")
    low = value.get("minimum", value.get("exclusiveMinimum"))
    if low is not None and word != "text":
        word += f" {'from' if 'minimum' in value else 'above'} {low:g}"
    return word


if __name__ == "__main__":
    TARGET.write_text(keys_table(), encoding="utf-8")

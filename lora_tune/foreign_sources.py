"""The data sets of another tool's configuration as sources of ours, and the draft that all rules write into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Draft:
    """A recipe in the making: values by our paths, sources, and what only makes sense together."""

    tool: str
    values: dict[str, Any] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    micro_batch: int | None = None
    accumulation: int | None = None
    modules: list[str] = field(default_factory=list)
    every_source: dict[str, Any] = field(default_factory=dict)
    """What holds for all sources, such as `max_rows`."""


Rule = Callable[[Draft, Any], str | None]
_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text", "chat_template": "messages"}
_DATA_CLASSES = {
    "alpaca_dataset": "tatsu-lab/alpaca", "alpaca_cleaned_dataset": "yahma/alpaca-cleaned",
    "Alpaca": "tatsu-lab/alpaca", "Alpaca2k": "mhenrichsen/alpaca_2k_test", "Dolly": "databricks/databricks-dolly-15k",
}  # fmt: skip


def sources(draft: Draft, value: Any) -> str | None:
    """A list of data sets, each a name or a mapping with a path; what of it has no counterpart is said."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if not isinstance(value, list):
        return "is no list of data sets"
    lost: list[str] = []
    for item in value:
        entry = item if isinstance(item, dict) else {"path": item}
        lost += _one_source(draft, entry)
    return "; ".join(dict.fromkeys(lost)) or None


def _one_source(draft: Draft, entry: dict[str, Any]) -> list[str]:
    names = {"path": "source", "id": "source", "dataset_name": "source", "name": "config", "config": "config"}
    names |= {"subset": "config", "split": "split", "revision": "revision", "weight": "weight"}
    source: dict[str, Any] = {}
    lost: list[str] = []
    for key, value in entry.items():
        if value is None:
            continue
        if isinstance(value, dict) or (isinstance(value, list) and key != "columns"):
            lost.append(f"{key} of a source has no counterpart")
            continue
        if key == "type":
            kind = _FORMATS.get(str(value).partition(".")[0])
            source |= {"format": kind} if kind else {}
            lost += [] if kind and kind == _FORMATS.get(str(value)) else [f"type {value} is not known here"]
        elif key == "columns" and isinstance(value, list):
            continue  # which columns to keep: here only those of the format are read
        elif key in names:
            source[names[key]] = float(value) if key == "weight" else value
        else:
            lost.append(f"{key} of a source has no counterpart")
    if "source" not in source:
        return [*lost, "a source without a path was left out"]
    draft.sources.append(source)
    return lost


def data_class(draft: Draft, value: Any) -> str | None:
    """A data set that the other tool knows by a class or function: its hub id where it is a well-known one."""
    hub_id = _DATA_CLASSES.get(str(value).rpartition(".")[2])
    if hub_id is None:
        return "a recipe names files or hub data sets: write a source into data"
    draft.sources.append({"source": hub_id})
    return None


def per_source(key: str) -> Rule:
    """A whole number that holds for all sources."""

    def rule(draft: Draft, value: Any) -> str | None:
        draft.every_source[key] = int(value)
        return None

    return rule

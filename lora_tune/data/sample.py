"""A few rows of a recipe's own data, for a rehearsal: the longest row, some of every source, always the same ones.

They are written as they stand in the data, one JSON object a line, so that the recipe's formats and columns hold.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_tune.data.conversation import Conversation
from lora_tune.data.fit import Documents
from lora_tune.data.formats import fields_of
from lora_tune.data.sources import open_source
from lora_tune.errors import DataError
from lora_tune.recipe import DataSource

MOST_ROWS = 24


class Place(NamedTuple):
    """Where a row stands: number of its source, file as shown, line."""

    source: int
    file: str
    line: int


def training_places(documents: Documents, *, sources: int, most_tokens: int, row_tokens: int) -> list[Place]:
    """The longest row, the shortest of every source, and more of the shorter half of each up to `most_tokens`.

    `sources` is the number of sources in the recipe; a row counts as at most `row_tokens`. At most MOST_ROWS rows, or
    one more than there are sources.
    """
    lengths = documents.lengths
    counted = np.minimum(lengths, row_tokens)
    edges = [bisect_left(documents, number, key=lambda row: row.source) for number in range(sources + 1)]
    by_length = [start + np.argsort(lengths[start:end], kind="stable") for start, end in pairwise(edges)]
    chosen = [int(lengths.argmax()), *(int(order[0]) for order in by_length if len(order))]
    tokens = int(counted[chosen].sum())
    for index in _in_turn([order[1 : 1 + math.ceil(len(order) / 2)] for order in by_length]):
        if len(chosen) >= MOST_ROWS or tokens + counted[index] > most_tokens:
            break
        chosen.append(index)
        tokens += int(counted[index])
    rows = [documents[index] for index in dict.fromkeys(chosen)]
    return list(dict.fromkeys(Place(row.source, row.file, row.line) for row in rows))


def _in_turn(orders: Sequence[np.ndarray]) -> Iterable[int]:
    """One index of every source after another, spread evenly over its own."""
    spread = [order[np.linspace(0, len(order) - 1, min(MOST_ROWS, len(order)), dtype=int)] for order in orders]
    for number in range(MOST_ROWS):
        for indices in spread:
            if number < len(indices):
                yield int(indices[number])


def held_out_places(conversations: Sequence[Conversation], *, rows: int) -> list[Place]:
    """The shortest held-out rows, by their characters: one of each source after another, `rows` of them at most."""
    by_source: dict[int, list[Conversation]] = {}
    for conversation in sorted(conversations, key=_characters):
        by_source.setdefault(conversation.source, []).append(conversation)
    in_turn = (row for turn in zip_longest(*by_source.values()) for row in turn if row is not None)
    places = dict.fromkeys(Place(row.source, row.file, row.line) for row in in_turn)
    return list(places)[:rows]


def _characters(conversation: Conversation) -> int:
    return len(conversation.text or "") + sum(len(message.content) for message in conversation.messages)


def write_rows(data: DataSource, places: Iterable[Place], path: Path) -> Path:
    """Read the source again and write the rows at these places, as they stand there; returns the path.

    Tasks of Super-NaturalInstructions are written as task files again, into a folder of the path's name.

    Raises:
        UsageError: the source cannot be read any more.
        DataError: it has changed meanwhile.
    """
    wanted = {(place.file, place.line) for place in places}
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    shots = data.shots if data.format == "sni" else None
    for file, record in open_source(data).records(numbered_columns=_numbered(data), sni_shots=shots):
        if (file, record.line) in wanted and record.row is not None:
            rows[file, record.line] = _plain(record.row)
            if len(rows) == len(wanted):
                break
    if len(rows) < len(wanted):
        file, line = sorted(wanted - set(rows))[0]
        raise DataError(f"{file}:{line}: this row is not there any more", "start again with unchanged data")
    if shots is not None:
        return _write_tasks(rows.values(), fields_of("sni", data.columns), path.with_suffix(""))
    lines = (json.dumps(row, ensure_ascii=False, default=str) for row in rows.values())
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def _write_tasks(rows: Iterable[dict[str, Any]], fields: Mapping[str, str], folder: Path) -> Path:
    """A task file for each task, with the examples and instances of these rows."""
    tasks: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        tasks.setdefault(str(row.get(fields["task"]) or "task"), []).append(row)
    folder.mkdir(exist_ok=True)
    for number, (name, mine) in enumerate(tasks.items()):
        examples = [example for row in mine for example in row.get(fields["examples"]) or ()]
        task = {
            "Categories": [mine[0].get(fields["category"]) or ""],
            "Definition": [mine[0][fields["definition"]]],
            "Positive Examples": [example for n, example in enumerate(examples) if example not in examples[:n]],
            "Instances": [{"input": row[fields["input"]], "output": _texts(row[fields["output"]])} for row in mine],
        }
        path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:80] or number}.json"
        path.write_text(json.dumps(task, ensure_ascii=False, indent=1), encoding="utf-8")
    return folder


def _texts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _numbered(data: DataSource) -> int:
    """How many numbered columns the recipe reads of a file without a header."""
    names = list((data.columns or {}).values())
    return max(map(int, names)) if names and all(name.isdecimal() for name in names) else 0


def _plain(value: Any) -> Any:
    """The value without numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

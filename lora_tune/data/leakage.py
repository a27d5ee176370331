"""Leaks between what is trained and what is held out: the same row on both sides, whatever template shows it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from lora_tune.data.split import among, first_halves
from lora_tune.data.store import ConversationStore
from lora_tune.errors import DataError, Problem

_LONG = 24  # characters of a text that identifies a row; shorter ones are labels and names


def refuse_leaks(store: ConversationStore, train: np.ndarray, held_out: np.ndarray) -> None:
    """Raises: DataError naming every held-out row whose content is trained as well."""
    words = first_halves(store.digests)
    near = train[among(words[train], np.unique(words[held_out]))]
    places = {store.digest(row): row for row in near.tolist()}
    problems = []
    for row in held_out.tolist():
        trained = places.get(store.digest(row))
        if trained is not None:
            file, line = store.place(row)
            reason = f"this held-out row is in the training data as well ({':'.join(map(str, store.place(trained)))})"
            problems.append(Problem(reason, "remove it on one side", file=file, line=line))
    if problems:
        raise DataError(problems)


def refuse_shared_rows(
    store: ConversationStore, train: np.ndarray, held_out: np.ndarray, *, names: Sequence[str]
) -> None:
    """Refuse rows of held-out tasks (raw, before a template shows them) that a trained source has as well.

    Two rows are the same where all their texts of at least 24 characters are, whatever the columns are called, in
    whatever order and case; rows without such a text, where everything is. `names` are those of the sources.

    Raises:
        DataError: one problem for each pair of sources, with the number of rows and the first place.
    """
    if not len(held_out):
        return
    trained: dict[bytes, int] = {}
    asked = [_identity(store, row) for row in held_out.tolist()]
    looked_for = frozenset(asked)
    for row in train.tolist():
        identity = _identity(store, row)
        if identity in looked_for:
            trained.setdefault(identity, row)
    shared: dict[tuple[int, int], list[tuple[int, int]]] = {}
    sources = store.sources
    for row, identity in zip(held_out.tolist(), asked, strict=True):
        other = trained.get(identity)
        if other is not None:
            shared.setdefault((int(sources[row]), int(sources[other])), []).append((row, other))
    problems = []
    for (apart, source), rows in shared.items():
        file, line = store.place(rows[0][0])
        where = ":".join(map(str, store.place(rows[0][1])))
        count = f"{len(rows):,} row{'s' * (len(rows) > 1)} of the held-out task in {names[apart]}"
        reason = f"{count} {'are' if len(rows) > 1 else 'is'} trained in {names[source]} as well (first {where})"
        problems.append(Problem(reason, "hold that task out too, or remove the rows on one side", file=file, line=line))
    if problems:
        raise DataError(problems)


def _identity(store: ConversationStore, row: int) -> bytes:
    """A hash of the row's long texts; of its whole content where it has none."""
    conversation = store[row]
    if conversation.text is None:
        texts = [message.content for message in conversation.messages]
    else:
        try:
            texts = list(_texts(json.loads(conversation.text)))
        except ValueError:
            texts = [conversation.text]
    kept = {" ".join(text.casefold().split()) for text in texts}
    kept = {text for text in kept if len(text) >= _LONG}
    if not kept:
        return store.digest(row)
    return blake2b("\0".join(sorted(kept)).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value, at every depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)

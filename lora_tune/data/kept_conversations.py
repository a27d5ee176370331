"""What the checking pass made of files, kept in the cache: the same files are parsed and checked once.

An entry is found by the content of every file with the name it is shown by, the recipe's part about data, the seed and
this package's code. Data sets of the hub are read anew. Nothing that raised an error is kept.
"""

from __future__ import annotations

import hashlib
import json
import platform
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_tune.data.cache import LARGEST_BYTES, WORTH_ROWS, code_sha256, entry, keep_if_there_is_room, valid_note
from lora_tune.data.columns import Columns
from lora_tune.data.ledger import Count, Ledger, SourceLedger
from lora_tune.data.sources import Source, SourceIdentity, shown_path
from lora_tune.data.store import ConversationStore, StoredConversations
from lora_tune.errors import Problem
from lora_tune.recipe import DataSource

_INDICES = (("row", "<i4"),)


@dataclass
class Conversations:
    """Checked conversations: `train` and `held_out` read a row from disk when it is asked for."""

    data: tuple[DataSource, ...]
    train: StoredConversations
    held_out: StoredConversations
    ledger: Ledger
    identities: tuple[SourceIdentity, ...]
    has_tools: bool


def key_of(sources: Iterable[Source], facts: Sequence[object], *, data: Sequence[DataSource]) -> str | None:
    """The name of an entry, of everything that decides what is read; None where a source is on the hub or cannot be
    read. `facts` are further values with a `repr` that says all of them."""
    files = []
    for source in sources:
        if source.hub is not None:
            return None
        try:
            for path in source.files:
                if not path.is_file():
                    return None  # a pipe gives its content once
                with open(path, "rb") as file:
                    files.append((source.name, shown_path(path), hashlib.file_digest(file, "sha256").hexdigest()))
        except OSError:
            return None  # reading says it
    asked = [entry_.model_dump(mode="json") for entry_ in data]
    versions = (platform.python_version(), *map(version, ("jinja2", "numpy", "pyarrow")))
    parts = (code_sha256(), *versions, json.dumps([files, asked]), repr(facts))
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:40]


def kept(key: str, data: tuple[DataSource, ...]) -> Conversations | None:
    """What was kept under a key; None where there is nothing, it is damaged, or the disk denies it."""
    try:
        with entry("conversations", key) as path:
            note = valid_note(path)
            if note is None:
                return None
            file = open(path, "rb")  # noqa: SIM115  (the store reads from it as long as it lives)
    except OSError:
        return None
    sides = [Columns.read(file, _INDICES, rows=note[side])["row"] for side in ("train", "held_out")]
    file.seek(-file.tell() % 8, 1)
    store = ConversationStore.read(file, note["store"])
    weakref.finalize(store, file.close)
    train, held_out = (StoredConversations(store, side) for side in sides)
    identities = tuple(SourceIdentity(**identity) for identity in note["identities"])
    return Conversations(data, train, held_out, _ledger(note["ledger"]), identities, note["has_tools"])


def keep(key: str, found: Conversations) -> None:
    """Keep conversations under a key, unless they are few or very many; a full disk is no reason to stop."""
    store = found.train.store
    if len(store) < WORTH_ROWS or store.text_bytes > LARGEST_BYTES:
        return

    def write(temporary: Path) -> dict[str, Any]:
        with open(temporary, "wb") as file:
            for side in (found.train, found.held_out):
                file.write(side.indices.tobytes())
            file.write(bytes(-file.tell() % 8))  # numbers are read faster from there
            facts = store.write(file)
        accounts, notices = (list(map(asdict, part)) for part in (found.ledger.sources, found.ledger.notices))
        return {
            "train": len(found.train),
            "held_out": len(found.held_out),
            "store": facts,
            "ledger": {"sources": accounts, "notices": notices},
            "identities": list(map(asdict, found.identities)),
            "has_tools": found.has_tools,
        }

    with suppress(OSError), entry("conversations", key) as path:
        keep_if_there_is_room(path, write)


def _ledger(stored: Mapping[str, Any]) -> Ledger:
    """The ledger as it was after the checking pass."""
    sources = []
    for account in stored["sources"]:
        for name in ("dropped", "notes"):
            account[name] = {what: Count(**count) for what, count in account[name].items()}
        sources.append(SourceLedger(**account))
    return Ledger(sources, notices=[Problem(**problem) for problem in stored["notices"]])

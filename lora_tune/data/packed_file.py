"""The packed sequences of an epoch on disk, memory-mapped; in the cache under a hash of what they are made of."""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lora_tune.data.cache import (
    LARGEST_BYTES,
    WORTH_ROWS,
    code_sha256,
    entry,
    private_file,
    valid_note,
    with_room,
    write_entry,
)
from lora_tune.data.fit import Pieces
from lora_tune.data.packing import Packed
from lora_tune.data.sources import as_dataset
from lora_tune.data.store import StoredConversations
from lora_tune.data.token_file import TokenFile

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100  # label of a token that is not trained
_CHUNK = 256  # sequences written at a time
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("seq_lengths", pa.list_(pa.int32())),
        ("rows", pa.list_(pa.list_(pa.int64()))),
    ]
)


def packed_file(sequences: Packed, pieces: Pieces, rows: TokenFile, conversations: StoredConversations) -> Dataset:
    """The sequences (of pieces) as a data set with the columns of `Prepared.train`, mapped from disk.

    From the cache where it has them. Few rows, or more than 2 GiB of them, are written anew: that file goes when the
    process does.
    """

    def write(path: Path) -> dict[str, Any]:
        return {"fingerprint": _write(path, sequences, pieces, rows, conversations)}

    if len(rows) >= WORTH_ROWS and 8 * pieces.total_tokens <= LARGEST_BYTES:
        with entry("packed", _key(sequences, pieces, rows, conversations)) as path:
            note = valid_note(path) or write_entry(path, write)
            return as_dataset(_mapped(path), fingerprint=note["fingerprint"])
    with entry("packed", f"of-{os.getpid()}") as path:  # locked, so that no other process makes room with it
        try:
            private_file(path)
            note = with_room(path, partial(write, path))
            table = _mapped(path)
        finally:
            for suffix in (".arrow", ".lock"):
                path.with_suffix(suffix).unlink(missing_ok=True)  # also where the run is stopped
    return as_dataset(table, fingerprint=note["fingerprint"])


def _mapped(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_stream(source).read_all()


def _key(sequences: Packed, pieces: Pieces, rows: TokenFile, conversations: StoredConversations) -> str:
    """Hash of everything that the file depends on."""
    digest = hashlib.sha256(f"{code_sha256()} {rows.sha256} {len(pieces)} {len(conversations)}".encode())
    for part in (pieces.row, pieces.start, pieces.end, sequences.indices, sequences.ends):
        digest.update(np.ascontiguousarray(part).data)
    for block in conversations.blocks():
        digest.update(block.sources.data)
        digest.update(block.lines.data)
    return digest.hexdigest()[:40]


def _write(path: Path, sequences: Packed, pieces: Pieces, rows: TokenFile, conversations: StoredConversations) -> str:
    """Write the stream; returns a hash of tokens, labels and lengths."""
    digest = hashlib.sha256()
    sources, lines = conversations.store.sources, conversations.store.lines
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as stream:
        for start in range(0, len(sequences), _CHUNK):
            ends = sequences.ends[start : start + _CHUNK + 1]
            flat = sequences.indices[ends[0] : ends[-1]]
            ids, mask = pieces.gathered(rows, flat)
            labels = np.where(mask, ids, np.int32(IGNORED))
            lengths = pieces.end[flat] - pieces.start[flat]
            edges = np.concatenate([[0], np.cumsum(lengths)])[ends - ends[0]]
            digest.update(ids.tobytes() + labels.tobytes() + lengths.tobytes())
            stood = conversations.indices[rows.conversation[pieces.row[flat]]]
            places = np.stack([sources[stood], lines[stood]], axis=1).astype(np.int64)
            stream.write_batch(_batch(ids, labels, lengths, edges=edges, ends=ends - ends[0], places=places))
    return digest.hexdigest()[:16]


def _batch(
    ids: np.ndarray,
    labels: np.ndarray,
    lengths: np.ndarray,
    *,
    edges: np.ndarray,
    ends: np.ndarray,
    places: np.ndarray,
) -> pa.RecordBatch:
    """One record batch from flat tokens; `edges` are the sequences' borders in tokens, `ends` in documents."""

    def lists(borders: np.ndarray, values: pa.Array) -> pa.ListArray:
        return pa.ListArray.from_arrays(pa.array(borders.astype(np.int32)), values)

    documents = lists(np.arange(len(places) + 1) * 2, pa.array(places.reshape(-1)))
    columns = [
        lists(edges, pa.array(ids)),
        lists(edges, pa.array(labels)),
        lists(ends, pa.array(lengths)),
        lists(ends, documents),
    ]
    return pa.record_batch(columns, schema=_SCHEMA)

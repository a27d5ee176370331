"""The packed sequences of an epoch on disk, memory-mapped; in the cache under a hash of what they are made of."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
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


def packed_file(
    sequences: Sequence[Sequence[int]], pieces: Pieces, rows: TokenFile, conversations: StoredConversations
) -> Dataset:
    """The sequences (indices of pieces) as a data set with the columns of `Prepared.train`, mapped from disk.

    From the cache where it has them. Few rows, or more than 2 GiB of them, are written anew: that file goes when the
    process does.
    """
    places = np.stack([conversations.sources, conversations.lines], axis=1).astype(np.int64)

    def write(path: Path) -> dict[str, Any]:
        return {"fingerprint": _write(path, sequences, pieces, rows, places)}

    if len(rows) >= WORTH_ROWS and 8 * int((pieces.end - pieces.start).sum(dtype=np.int64)) <= LARGEST_BYTES:
        with entry("packed", _key(sequences, pieces, rows, places)) as path:
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


def _key(sequences: Sequence[Sequence[int]], pieces: Pieces, rows: TokenFile, places: np.ndarray) -> str:
    """Hash of everything that the file depends on."""
    digest = hashlib.sha256(f"{code_sha256()} {rows.sha256}".encode())
    for part in (pieces.row, pieces.start, pieces.end, places):
        digest.update(part.tobytes())
    for start in range(0, len(sequences), _CHUNK):
        chunk = sequences[start : start + _CHUNK]
        digest.update(np.array([len(sequence) for sequence in chunk], dtype=np.int64).tobytes())
        digest.update(np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in chunk]).tobytes())
    return digest.hexdigest()[:40]


def _write(path: Path, sequences: Sequence[Sequence[int]], pieces: Pieces, rows: TokenFile, places: np.ndarray) -> str:
    """Write the stream; returns a hash of tokens, labels and lengths."""
    digest = hashlib.sha256()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as stream:
        for start in range(0, len(sequences), _CHUNK):
            chunk = sequences[start : start + _CHUNK]
            flat = [index for sequence in chunk for index in sequence]
            tokens = [pieces.tokens(rows, index) for index in flat]
            ids = np.concatenate([ids for ids, _ in tokens])
            labels = np.where(np.concatenate([mask for _, mask in tokens]), ids, np.int32(IGNORED))
            lengths = np.array([len(ids) for ids, _ in tokens], dtype=np.int32)
            ends = np.concatenate([[0], np.cumsum([len(sequence) for sequence in chunk])])
            edges = np.concatenate([[0], np.cumsum(lengths)])[ends]
            digest.update(ids.tobytes() + labels.tobytes() + lengths.tobytes())
            stood = places[rows.conversation[pieces.row[flat]]]
            stream.write_batch(_batch(ids, labels, lengths, edges=edges, ends=ends, places=stood))
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

"""Token rows on disk: encoded once, memory-mapped, kept in a cache by content, template and code.

One Arrow stream, a record batch for each chunk of conversations:

    ids           list<int32>, mask list<uint8>   of one length T; mask is 1 where the token is trained

and behind it, for each row, four numbers of 4 bytes (columns.py):

    conversation  index into the conversations that were encoded
    length        T
    trained       how many of the tokens
    notes         bits in the order of NOTES

Beside it stands a note with the sha256 of the stream (`cache.py`): damage is found before a row is used, and the rows
are made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lora_tune.data.cache import code_sha256, entry, valid_note, write_entry
from lora_tune.data.chat_template import NOTES, ChatTemplate, TokenRow
from lora_tune.data.columns import Columns
from lora_tune.data.store import StoredConversations
from lora_tune.data.turn_drafts import LossOn

_CHUNK = 1024  # conversations encoded at a time
_SCHEMA = pa.schema([("ids", pa.large_list(pa.int32())), ("mask", pa.large_list(pa.uint8()))])
_FIELDS = (("conversation", "<i4"), ("length", "<i4"), ("trained", "<i4"), ("notes", "<i4"))


@dataclass
class TokenFile:
    """Token rows, all mapped from disk: arrays over rows (N,) int32, and all tokens.

    `conversation`, `length`, `trained` (number of trained tokens), `notes`. `errors`: {conversation: why the template
    cannot render it}. `sha256` is that of the file.
    """

    conversation: np.ndarray
    length: np.ndarray
    trained: np.ndarray
    notes: np.ndarray
    errors: dict[int, str]
    sha256: str
    _tokens: _Tokens

    def __len__(self) -> int:
        return len(self.conversation)

    def tokens(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """ids (T,) int32 and mask (T,) uint8 of a row, without a copy."""
        return self._tokens.of(row, int(self.length[row]))

    def gathered(self, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids and mask of tokens `starts` to `ends` of `rows` (N,), one behind the other, as copies."""
        return self._tokens.gathered(rows, starts, ends)


class _Tokens:
    """The tokens in a mapped Arrow stream, whose buffers are found by where they stand in the file."""

    def __init__(self, path: Path) -> None:
        whole = pa.memory_map(str(path)).read_buffer()
        self._numbers, self._ids, self._mask = (
            np.frombuffer(whole, dtype, count=whole.size // np.dtype(dtype).itemsize) for dtype in ("<i8", "<i4", "u1")
        )
        starts: list[list[int]] = []  # of each batch: first row, then where offsets, ids and mask stand in the file
        rows = 0
        with pa.ipc.open_stream(pa.BufferReader(whole)) as stream:
            for batch in stream:
                ids, mask = (batch.column(name) for name in ("ids", "mask"))
                buffers = (ids.buffers()[1], ids.values.buffers()[1], mask.values.buffers()[1])
                starts.append([rows, *(buffer.address - whole.address if buffer else 0 for buffer in buffers)])
                rows += batch.num_rows
        found = np.array(starts, dtype=np.int64).reshape(-1, 4) // (1, 8, 4, 1)
        self._first, self._at = found[:, 0].copy(), found[:, 1:]

    def of(self, row: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """ids (T,) and mask (T,) of a row, without a copy."""
        batch = int(self._first.searchsorted(row, side="right")) - 1
        offsets, ids, mask = self._at[batch].tolist()
        start = int(self._numbers[offsets + row - int(self._first[batch])])
        return self._ids[ids + start : ids + start + length], self._mask[mask + start : mask + start + length]

    def gathered(self, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids and mask of tokens `starts` to `ends` of `rows`, one behind the other."""
        batch = self._first.searchsorted(rows, side="right") - 1
        at = self._at[batch]
        lengths = (ends - starts).astype(np.int64)
        begin = self._numbers[at[:, 0] + rows - self._first[batch]] + starts - (np.cumsum(lengths) - lengths)
        place = np.arange(lengths.sum())
        ids = self._ids[np.repeat(at[:, 1] + begin, lengths) + place]
        return ids, self._mask[np.repeat(at[:, 2] + begin, lengths) + place]


def token_file(
    conversations: StoredConversations, chat: ChatTemplate, *, loss_on: LossOn, fingerprint: str
) -> TokenFile:
    """The token rows of all conversations in order: from the cache where they are whole, else encoded now.

    `fingerprint` is the `encoder_fingerprint` of `chat`.
    """
    with entry("tokens", _key(conversations, fingerprint, loss_on)) as path:
        note = valid_note(path)
        errors = None if note is None else _errors(note)
        if note is None or errors is None:

            def write(temporary: Path) -> dict[str, Any]:
                return _encode(temporary, conversations, chat, loss_on)

            note = write_entry(path, write)
            errors = dict(note["errors"])
        return _open(path, note, errors=errors)


def _errors(note: dict[str, Any]) -> dict[int, str] | None:
    """Why conversations have no rows, by number; None for a note that does not say it."""
    try:
        return {int(number): reason for number, reason in note["errors"].items()}
    except (KeyError, ValueError, AttributeError):
        return None


def _key(conversations: StoredConversations, fingerprint: str, loss_on: LossOn) -> str:
    """Hash of all that the token rows depend on."""
    digest = hashlib.sha256(f"{fingerprint} {loss_on} ".encode())
    for block in conversations.blocks():
        digest.update(block.digests.tobytes())
    return digest.hexdigest()[:40]


def encoder_fingerprint(chat: ChatTemplate) -> str:
    """Hash of what turns conversations into tokens: template, tokenizer, this package's code, versions, and the day
    where the template writes the date. Takes up to a second for a large vocabulary."""
    digest = hashlib.sha256()
    tokenizer = chat.tokenizer
    vocabulary = (
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(sorted(tokenizer.get_vocab().items()))
    )
    day = str(date.today()) if chat.writes_date else ""
    versions = " ".join(map(version, ("transformers", "tokenizers", "jinja2")))
    parts = (chat.sha256, chat.ends, versions, day, vocabulary, code_sha256())
    for part in (*(text.encode() for text in parts), str(tokenizer.special_tokens_map).encode()):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _encode(path: Path, conversations: StoredConversations, chat: ChatTemplate, loss_on: LossOn) -> dict[str, Any]:
    """Write the file; returns how many rows it has, and why the template refuses conversations, by their number."""
    errors: dict[int, str] = {}
    numbers = Columns(_FIELDS, folder=path.parent)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as stream:
        for start in range(0, len(conversations), _CHUNK):
            chunk = list(conversations[start : start + _CHUNK])
            rows: list[TokenRow] = []
            of: list[int] = []
            for number, found in enumerate(chat.rows(chunk, loss_on=loss_on), start):
                if isinstance(found, list):
                    rows.extend(found)
                    of.extend([number] * len(found))
                else:
                    errors[number] = found.reason
            if rows:
                stream.write_batch(_batch(rows, of, numbers))
    with open(path, "ab") as file:
        numbers.write(file)
    return {"errors": errors, "rows": len(numbers)}


def _batch(rows: Sequence[TokenRow], conversations: Sequence[int], numbers: Columns) -> pa.RecordBatch:
    """The tokens of rows as a batch; what is known of each, its conversation first, goes to `numbers`."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row.input_ids) for row in rows], out=offsets[1:])
    ids = np.concatenate([row.input_ids for row in rows]).astype(np.int32, copy=False)
    mask = np.concatenate([row.mask for row in rows]).astype(np.uint8)
    mask[offsets[:-1][np.diff(offsets) > 0]] = 0  # nothing predicts the first token of a document
    before = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
    trained = before[offsets[1:]] - before[offsets[:-1]]
    notes = [sum(1 << bit for bit, note in enumerate(NOTES) if note in row.notes) for row in rows]
    for values in zip(conversations, np.diff(offsets).tolist(), trained.tolist(), notes, strict=True):
        numbers.append(*values)
    lists = [pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat)) for flat in (ids, mask)]
    return pa.record_batch(lists, schema=_SCHEMA)


def _open(path: Path, note: Mapping[str, Any], *, errors: dict[int, str]) -> TokenFile:
    """The file mapped: tokens and numbers."""
    rows = int(note["rows"])
    with open(path, "rb") as file:
        numbers = Columns(_FIELDS)
        file.seek(-rows * numbers.dtype.itemsize, os.SEEK_END)
        found = Columns.read(file, _FIELDS, rows=rows).rows()
    columns = (found["conversation"], found["length"], found["trained"], found["notes"])
    return TokenFile(*columns, errors, note["sha256"], _Tokens(path))

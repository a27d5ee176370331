"""Token rows on disk: encoded once, memory-mapped, kept in a cache by content, template and code.

One Arrow stream, a record batch for each chunk of conversations:

    conversation  int64   index into the conversations that were encoded
    ids           list<int32>, mask list<uint8>   of one length T; mask is 1 where the token is trained
    notes         uint8   bits in the order of NOTES

Beside it stands a note with the sha256 of the stream (`cache.py`): damage is found before a row is used, and the rows
are made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lora_tune.data.cache import code_sha256, entry, valid_note, write_entry
from lora_tune.data.chat_template import NOTES, ChatTemplate, TokenRow
from lora_tune.data.store import StoredConversations
from lora_tune.data.turn_drafts import LossOn

_CHUNK = 1024  # conversations encoded at a time
_SCHEMA = pa.schema(
    [
        ("conversation", pa.int64()),
        ("ids", pa.large_list(pa.int32())),
        ("mask", pa.large_list(pa.uint8())),
        ("notes", pa.uint8()),
    ]
)


@dataclass
class TokenFile:
    """Token rows, mapped from disk: arrays over rows (N,), 21 bytes a row, and flat arrays of all tokens of a batch.

    `conversation`, `length`, `trained` (number of trained tokens), `last_trained` (index of the last one, -1 without),
    `notes`. `errors`: {conversation: why the template cannot render it}. `sha256` is that of the file.
    """

    conversation: np.ndarray
    length: np.ndarray
    trained: np.ndarray
    last_trained: np.ndarray
    notes: np.ndarray
    errors: dict[int, str]
    sha256: str
    _batches: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]  # first row, offsets, ids, mask

    def __len__(self) -> int:
        return len(self.conversation)

    def tokens(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """ids (T,) int32 and mask (T,) uint8 of a row, without a copy."""
        low, high = 0, len(self._batches) - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._batches[middle][0] <= row else (low, middle - 1)
        first, offsets, ids, mask = self._batches[low]
        start, end = offsets[row - first], offsets[row - first + 1]
        return ids[start:end], mask[start:end]


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
                return {"errors": _encode(temporary, conversations, chat, loss_on)}

            note = write_entry(path, write)
            errors = dict(note["errors"])
        return _open(path, errors, sha256=note["sha256"])


def _errors(note: dict[str, Any]) -> dict[int, str] | None:
    """Why conversations have no rows, by number; None for a note that does not say it."""
    try:
        return {int(number): reason for number, reason in note["errors"].items()}
    except (KeyError, ValueError, AttributeError):
        return None


def _key(conversations: StoredConversations, fingerprint: str, loss_on: LossOn) -> str:
    """Hash of all that the token rows depend on."""
    digest = hashlib.sha256(f"{fingerprint} {loss_on} ".encode())
    digest.update(conversations.digests.tobytes())
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


def _encode(path: Path, conversations: StoredConversations, chat: ChatTemplate, loss_on: LossOn) -> dict[int, str]:
    """Write the stream; returns the reasons of the conversations that the template refuses, by number."""
    errors: dict[int, str] = {}
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as stream:
        for start in range(0, len(conversations), _CHUNK):
            chunk = list(conversations[start : start + _CHUNK])
            numbers, rows = [], []
            for number, found in enumerate(chat.rows(chunk, loss_on=loss_on), start):
                if isinstance(found, list):
                    rows.extend(found)
                    numbers.extend([number] * len(found))
                else:
                    errors[number] = found.reason
            if rows:
                stream.write_batch(_batch(numbers, rows))
    return errors


def _batch(numbers: list[int], rows: Sequence[TokenRow]) -> pa.RecordBatch:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row.input_ids) for row in rows], out=offsets[1:])
    ids = np.concatenate([row.input_ids for row in rows]).astype(np.int32, copy=False)
    mask = np.concatenate([row.mask for row in rows]).astype(np.uint8)
    mask[offsets[:-1][np.diff(offsets) > 0]] = 0  # nothing predicts the first token of a document
    notes = [sum(1 << bit for bit, note in enumerate(NOTES) if note in row.notes) for row in rows]
    lists = [pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat)) for flat in (ids, mask)]
    return pa.record_batch([pa.array(numbers, pa.int64()), *lists, pa.array(notes, pa.uint8())], schema=_SCHEMA)


def _open(path: Path, errors: dict[int, str], *, sha256: str) -> TokenFile:
    conversation, length, trained, last_trained, notes = [], [], [], [], []
    batches = []
    first = 0
    with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
        for batch in stream:
            offsets = batch.column("ids").offsets.to_numpy()
            ids, mask = (batch.column(name).values.to_numpy() for name in ("ids", "mask"))
            batches.append((first, offsets, ids, mask))
            first += batch.num_rows
            conversation.append(batch.column("conversation").to_numpy())
            notes.append(batch.column("notes").to_numpy())
            length.append(np.diff(offsets).astype(np.int32))
            before = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
            trained.append((before[offsets[1:]] - before[offsets[:-1]]).astype(np.int32))
            last = np.maximum.accumulate(np.where(mask, np.arange(len(mask)), -1)) if len(mask) else mask
            ends = last[offsets[1:] - 1] - offsets[:-1]
            last_trained.append(np.where((ends >= 0) & (np.diff(offsets) > 0), ends, -1).astype(np.int32))

    def joined(parts: list[np.ndarray], dtype: type = np.int32) -> np.ndarray:
        return np.concatenate(parts) if parts else np.zeros(0, dtype)

    numbers, kinds = joined(conversation, np.int64), joined(notes, np.uint8)
    return TokenFile(numbers, joined(length), joined(trained), joined(last_trained), kinds, errors, sha256, batches)

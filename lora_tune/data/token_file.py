"""Token rows on disk: encoded once, memory-mapped, kept in a cache by content, template and code.

One Arrow stream, a record batch for each chunk of conversations:

    conversation  int64   index into the conversations that were encoded
    ids           list<int32>, mask list<uint8>   of one length T; mask is 1 where the token is trained
    notes         uint8   bits in the order of NOTES

Beside it stands a JSON file with the sha256 of the stream: damage is found before a row is used, and the rows are made
again. `LORA_TUNE_CACHE` names another folder than the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import platformdirs
import pyarrow as pa
from filelock import FileLock, Timeout

from lora_tune.data.chat_template import NOTES, ChatTemplate, TokenRow
from lora_tune.data.store import StoredConversations
from lora_tune.data.turn_drafts import LossOn
from lora_tune.disk import FULL, disk_text
from lora_tune.errors import ResourceError

_CHUNK = 1024  # conversations encoded at a time
_KEPT_BYTES = 8 << 30  # of the cache; the entries unused for longest go first
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
    """Token rows, mapped from disk: arrays over rows (N,), and flat arrays of all tokens of a batch.

    `conversation`, `length`, `trained` (number of trained tokens), `last_trained` (index of the last one, -1 without),
    `notes`. `errors`: {conversation: why the template cannot render it}.
    """

    conversation: np.ndarray
    length: np.ndarray
    trained: np.ndarray
    last_trained: np.ndarray
    notes: np.ndarray
    errors: dict[int, str]
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


def cache_folder() -> Path:
    """Where token rows are kept: `LORA_TUNE_CACHE`, else the user's cache folder. Created where it is missing."""
    folder = Path(os.environ.get("LORA_TUNE_CACHE") or platformdirs.user_cache_dir("lora_tune", appauthor=False))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def token_file(
    conversations: StoredConversations, chat: ChatTemplate, *, loss_on: LossOn, fingerprint: str
) -> TokenFile:
    """The token rows of all conversations in order: from the cache where they are whole, else encoded now.

    `fingerprint` is the `encoder_fingerprint` of `chat`.
    """
    folder = cache_folder() / "tokens"
    folder.mkdir(exist_ok=True)
    path = folder / f"{_key(conversations, fingerprint, loss_on)}.arrow"
    with FileLock(path.with_suffix(".lock")):
        errors = _valid(path)
        if errors is None:
            errors = _write(path, conversations, chat, loss_on)
            _remove_unfinished(folder)
            _make_room(folder, keep=path)
        os.utime(path)
        return _open(path, errors)


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
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    day = str(date.today()) if "strftime_now" in chat.text else ""
    parts = (chat.sha256, version("transformers"), version("tokenizers"), day, vocabulary)
    for part in (*(text.encode() for text in parts), code, str(tokenizer.special_tokens_map).encode()):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _valid(path: Path) -> dict[int, str] | None:
    """The errors stored beside a whole file; None where it is missing, damaged, or was not finished."""
    try:
        note = json.loads(path.with_suffix(".json").read_text())
        with open(path, "rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == note["sha256"]
        return {int(number): reason for number, reason in note["errors"].items()} if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(path: Path, conversations: StoredConversations, chat: ChatTemplate, loss_on: LossOn) -> dict[int, str]:
    """Encode in chunks; the file appears under its name when it is complete, its note after that."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        errors = _encode(temporary, conversations, chat, loss_on)
        with open(temporary, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        path.with_suffix(".json").unlink(missing_ok=True)
        temporary.replace(path)
        temporary.write_text(json.dumps({"sha256": sha256, "errors": errors}))
        temporary.replace(path.with_suffix(".json"))
    except OSError as error:
        if error.errno not in FULL:
            raise
        fix = "make room, or name another folder with LORA_TUNE_CACHE"
        raise ResourceError(f"token rows cannot be kept: {disk_text(error, path.parent)}", fix) from None
    finally:
        temporary.unlink(missing_ok=True)  # of a run that was stopped
    return errors


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


def _open(path: Path, errors: dict[int, str]) -> TokenFile:
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
            length.append(np.diff(offsets))
            before = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
            trained.append(before[offsets[1:]] - before[offsets[:-1]])
            last = np.maximum.accumulate(np.where(mask, np.arange(len(mask)), -1)) if len(mask) else mask
            ends = last[offsets[1:] - 1] - offsets[:-1]
            last_trained.append(np.where((ends >= 0) & (np.diff(offsets) > 0), ends, -1))

    def joined(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    return TokenFile(
        joined(conversation), joined(length), joined(trained), joined(last_trained), joined(notes), errors, batches
    )


def _remove_unfinished(folder: Path) -> None:
    """Delete what killed processes left half-written: nobody holds the lock of its entry."""
    for left in folder.glob("*.tmp"):
        with suppress(Timeout), FileLock(folder / f"{left.name.partition('.')[0]}.lock", timeout=0):
            left.unlink(missing_ok=True)


def _make_room(folder: Path, *, keep: Path) -> None:
    """Delete the entries that were not used for longest until the cache is small enough."""
    entries = sorted((path for path in folder.glob("*.arrow") if path != keep), key=lambda path: path.stat().st_mtime)
    used = sum(path.stat().st_size for path in entries)
    for path in entries:
        if used <= _KEPT_BYTES:
            return
        used -= path.stat().st_size
        for suffix in (".json", ".arrow", ".lock"):
            path.with_suffix(suffix).unlink(missing_ok=True)

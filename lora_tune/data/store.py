"""Conversations on disk: what a checking pass keeps of every good row, so that data need not fit in memory.

A conversation is written once, as compact JSON, to an anonymous temporary file (in memory below 16 MiB); its offset,
place and two hashes, 56 bytes a row, to another one (columns.py).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from json.encoder import encode_basestring
from typing import IO, Any, overload

import numpy as np

from lora_tune.data.columns import Columns
from lora_tune.data.conversation import Conversation, Message

_IN_MEMORY_BYTES = 16 << 20
_BLOCK = 1 << 20
_ROWS_AT_ONCE = 1 << 16
# the texts of a row end at `end`: `content` bytes, then `about` bytes
_FIELDS = (
    ("end", "<i8"),
    ("line", "<i8"),
    ("digest", "V16"),
    ("prompt", "<u8"),
    ("source", "<i4"),
    ("file", "<i4"),
    ("about", "<u4"),
    ("content", "<u4"),
)
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_DEFAULTS = ((), 1, None, None, None)  # of the fields of Message after role and content


def _packed(message: Message) -> list:
    rest = [message.tool_calls, message.weight, message.name, message.tool_call_id, message.reasoning]
    while rest and rest[-1] == _DEFAULTS[len(rest) - 1]:
        rest.pop()
    return [message.role, message.content, *rest]


def _unpacked(packed: list) -> Message:
    role, content, *rest = packed
    if rest:
        rest[0] = tuple(rest[0])
    return Message(role, content, *rest)


def _turn(message: Message) -> str:
    """A message as compact JSON."""
    if (message.tool_calls, message.weight, message.name, message.tool_call_id, message.reasoning) == _DEFAULTS:
        return f'["{message.role}",{encode_basestring(message.content)}]'  # the same bytes in a fifth of the time
    return _ENCODE(_packed(message))


def content_of(conversation: Conversation) -> bytes:
    """The content of a conversation (turns, tools, text; not its place) as compact JSON: equal content, equal bytes."""
    return _content([_turn(message) for message in conversation.messages], conversation)


def _content(turns: Sequence[str], conversation: Conversation) -> bytes:
    tools = _ENCODE(conversation.tools) if conversation.tools else "[]"
    text = "null" if conversation.text is None else encode_basestring(conversation.text)
    return f"[[{','.join(turns)}],{tools},{text}]".encode()


def _about(conversation: Conversation) -> bytes:
    """What evaluation groups and scores by; no part of the content, so that it changes no hash. Empty without any."""
    found = (conversation.task, conversation.template, conversation.choices, conversation.references)
    return _ENCODE(found).encode() if any(found) else b""


def _prompt_of(turns: Sequence[str], content: bytes) -> bytes:
    """All but the last turn; the whole content where there is no prompt, so that such rows never share one."""
    return f"[{','.join(turns[:-1])}]".encode() if len(turns) > 1 else content


class ConversationStore:
    """Appended to while data is read, then read by index. `digests` (N,) are BLAKE2b hashes of the content.

    Its columns are mapped from disk: not to be written to.

    `names_tasks`: whether a conversation has a task or a template.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES)  # type: ignore[assignment]  # noqa: SIM115
        self._texts_at = 0  # where they begin in the file
        self._end = 0  # of all texts, from there
        self._numbers = Columns(_FIELDS)
        self._names: dict[str, int] = {}
        self._shown: list[str] = []
        self.names_tasks = False

    def append(self, conversation: Conversation, *, source: int, file: str, line: int) -> int:
        """Keep a conversation that stands at `file:line` of the `source`-th data source; returns its index."""
        turns = [_turn(message) for message in conversation.messages]
        content = _content(turns, conversation)
        about = _about(conversation)
        self.names_tasks = self.names_tasks or bool(conversation.task or conversation.template)
        self._file.seek(self._texts_at + self._end)
        self._file.write(content + about)
        self._end += len(content) + len(about)
        number = self._names.setdefault(file, len(self._names))
        digest, prompt = blake2b(content, digest_size=16).digest(), blake2b(_prompt_of(turns, content), digest_size=8)
        found = int.from_bytes(prompt.digest(), "little")
        self._numbers.append(self._end, line, digest, found, source, number, len(about), len(content))
        return len(self._numbers) - 1

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def text_bytes(self) -> int:
        """The size of all texts."""
        return self._end

    def __getitem__(self, index: int) -> Conversation:
        end, line, _, _, source, file, about_size, size = self._numbers.row(index)
        self._file.seek(self._texts_at + end - about_size - size)
        messages, tools, text = json.loads(self._file.read(size))
        about = self._file.read(about_size)
        task, template, choices, references = json.loads(about) if about else ("", "", (), ())
        return Conversation(
            tuple(_unpacked(packed) for packed in messages),
            tuple(tools),
            text,
            source=source,
            file=self.file_names()[file],
            line=line,
            task=task,
            template=template,
            choices=tuple(choices),
            references=tuple(references),
        )

    def write(self, target: IO[bytes]) -> dict[str, Any]:
        """Write all of it to `target`; returns what `read` needs beside that."""
        self._numbers.write(target)
        self._file.seek(self._texts_at)
        shutil.copyfileobj(self._file, target, _BLOCK)
        return {"rows": len(self), "files": self.file_names(), "names_tasks": self.names_tasks}

    @classmethod
    def read(cls, file: IO[bytes], facts: Mapping[str, Any]) -> ConversationStore:
        """The store that `write` wrote to `file`, which is mapped, and whose texts are read when they are asked for."""
        store = cls()
        store._numbers = Columns.read(file, _FIELDS, rows=int(facts["rows"]))
        store._texts_at, store._file = file.tell(), file
        store._end = store._numbers.row(len(store) - 1)[0] if len(store) else 0
        store._names = {name: number for number, name in enumerate(facts["files"])}
        store.names_tasks = bool(facts["names_tasks"])
        return store

    def place(self, index: int) -> tuple[str, int]:
        """File and line of a row."""
        _, line, _, _, _, file, _, _ = self._numbers.row(index)
        return self.file_names()[file], line

    def source(self, index: int) -> int:
        """Number of the data source of one row."""
        return int(self._numbers.row(index)[4])

    def digest(self, index: int) -> bytes:
        """The content hash of one row."""
        return bytes(self._numbers.row(index)[2])

    @property
    def files(self) -> np.ndarray:
        """Which of `file_names` each row stands in, (N,) int32."""
        return self._numbers["file"]

    def file_names(self) -> list[str]:
        """The files as shown, in the order in which they were read."""
        if len(self._shown) != len(self._names):
            self._shown = list(self._names)
        return self._shown

    @property
    def digests(self) -> np.ndarray:
        """Content hashes, (N,) of 16 bytes each."""
        return self._numbers["digest"]

    @property
    def prompts(self) -> np.ndarray:
        """Hashes of all turns but the last (of the whole content where there is no prompt), (N,) uint64."""
        return self._numbers["prompt"]

    @property
    def sources(self) -> np.ndarray:
        """Number of the data source of each row, (N,) int32."""
        return self._numbers["source"]

    @property
    def lines(self) -> np.ndarray:
        """Line of each row, (N,) int64."""
        return self._numbers["line"]


class StoredConversations(Sequence[Conversation]):
    """Some rows of a store, in the order of `indices` (N,) int32; each is read from the store when it is asked for."""

    def __init__(self, store: ConversationStore, indices: Iterable[int] | np.ndarray) -> None:
        self.store = store
        self.indices = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> StoredConversations: ...
    def __getitem__(self, index: int | slice) -> Conversation | StoredConversations:
        if isinstance(index, slice):
            return StoredConversations(self.store, self.indices[index])
        return self.store[int(self.indices[index])]

    def __iter__(self) -> Iterator[Conversation]:
        return (self.store[int(index)] for index in self.indices)

    def place(self, index: int) -> tuple[str, int]:
        """File and line of a row, without reading it."""
        return self.store.place(int(self.indices[index]))

    def source(self, index: int) -> int:
        """Number of the data source of a row, without reading it."""
        return self.store.source(int(self.indices[index]))

    def blocks(self) -> Iterator[StoredConversations]:
        """All of them, some rows at a time."""
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield self[start : start + _ROWS_AT_ONCE]

    @property
    def digests(self) -> np.ndarray:
        """Content hashes, (N,) of 16 bytes each."""
        return self.store.digests[self.indices]

    @property
    def sources(self) -> np.ndarray:
        """Number of the data source of each row, (N,) int32."""
        return self.store.sources[self.indices]

    @property
    def lines(self) -> np.ndarray:
        """Line of each row, (N,) int64."""
        return self.store.lines[self.indices]

    def content_sha256(self) -> str:
        """Hash of the content of all rows and of where they stand, in order."""
        digest = hashlib.sha256(json.dumps(list(self.store.file_names())).encode("utf-8", "surrogatepass"))
        for column in (self.store.digests, self.store.files, self.store.lines):
            for block in self.blocks():
                digest.update(column[block.indices].tobytes())
        return digest.hexdigest()

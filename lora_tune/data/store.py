"""Conversations on disk: what a checking pass keeps of every good row, so that data need not fit in memory.

A conversation is written once, as compact JSON, to an anonymous temporary file (in memory below 64 MiB). In memory stay
its offset, place and two hashes, about 50 bytes a row.
"""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import overload

import numpy as np

from lora_tune.data.conversation import Conversation, Message

_IN_MEMORY_BYTES = 64 << 20
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


def content_of(conversation: Conversation) -> bytes:
    """The content of a conversation (turns, tools, text; not its place) as compact JSON: equal content, equal bytes."""
    content = [[_packed(message) for message in conversation.messages], conversation.tools, conversation.text]
    return _ENCODE(content).encode()


def _about(conversation: Conversation) -> bytes:
    """What evaluation groups and scores by; no part of the content, so that it changes no hash. Empty without any."""
    found = (conversation.task, conversation.template, conversation.choices, conversation.references)
    return _ENCODE(found).encode() if any(found) else b""


def _prompt_of(conversation: Conversation, content: bytes) -> bytes:
    """All but the last turn; the whole content where there is no prompt, so that such rows never share one."""
    if len(conversation.messages) < 2:
        return content
    return _ENCODE([_packed(message) for message in conversation.messages[:-1]]).encode()


class ConversationStore:
    """Appended to while data is read, then read by index. `digests` (N, 16) uint8 are BLAKE2b hashes of the content.

    `names_tasks`: whether a conversation has a task or a template.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES)  # noqa: SIM115
        self._ends, self._content_ends = array("q", [0]), array("q")
        self._digests, self._prompts = bytearray(), bytearray()
        self._sources, self._files, self._lines = array("i"), array("i"), array("q")
        self._names: dict[str, int] = {}
        self._shown: list[str] = []
        self.names_tasks = False

    def append(self, conversation: Conversation, *, source: int, file: str, line: int) -> int:
        """Keep a conversation that stands at `file:line` of the `source`-th data source; returns its index."""
        content = content_of(conversation)
        about = _about(conversation)
        self.names_tasks = self.names_tasks or bool(conversation.task or conversation.template)
        self._file.seek(self._ends[-1])
        self._file.write(content + about)
        self._ends.append(self._ends[-1] + len(content) + len(about))
        self._content_ends.append(self._ends[-1] - len(about))
        self._digests += blake2b(content, digest_size=16).digest()
        self._prompts += blake2b(_prompt_of(conversation, content), digest_size=8).digest()
        self._sources.append(source)
        self._files.append(self._names.setdefault(file, len(self._names)))
        self._lines.append(line)
        return len(self._lines) - 1

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Conversation:
        self._file.seek(self._ends[index])
        messages, tools, text = json.loads(self._file.read(self._content_ends[index] - self._ends[index]))
        about = self._file.read(self._ends[index + 1] - self._content_ends[index])
        task, template, choices, references = json.loads(about) if about else ("", "", (), ())
        file, line = self.place(index)
        return Conversation(
            tuple(_unpacked(packed) for packed in messages),
            tuple(tools),
            text,
            source=self._sources[index],
            file=file,
            line=line,
            task=task,
            template=template,
            choices=tuple(choices),
            references=tuple(references),
        )

    def place(self, index: int) -> tuple[str, int]:
        """File and line of a row."""
        return self._file_names()[self._files[index]], self._lines[index]

    def digest(self, index: int) -> bytes:
        """The content hash of one row."""
        return bytes(self._digests[16 * index : 16 * index + 16])

    def _file_names(self) -> list[str]:
        if len(self._shown) != len(self._names):
            self._shown = list(self._names)
        return self._shown

    @property
    def digests(self) -> np.ndarray:
        """Content hashes, (N,) of 16 bytes each."""
        return np.frombuffer(bytes(self._digests), dtype="V16")

    @property
    def prompts(self) -> np.ndarray:
        """Hashes of all turns but the last (of the whole content where there is no prompt), (N,) uint64."""
        return np.frombuffer(bytes(self._prompts), dtype=np.uint64)

    @property
    def sources(self) -> np.ndarray:
        """Number of the data source of each row, (N,) int32."""
        return np.array(self._sources, dtype=np.int32)


class StoredConversations(Sequence[Conversation]):
    """Some rows of a store, in the order of `indices` (N,) int64; each is read from the store when it is asked for."""

    def __init__(self, store: ConversationStore, indices: Iterable[int] | np.ndarray) -> None:
        self.store = store
        self.indices = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices), dtype=np.int64)

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

    @property
    def digests(self) -> np.ndarray:
        """Content hashes, (N,) of 16 bytes each."""
        return self.store.digests[self.indices]

    @property
    def sources(self) -> np.ndarray:
        """Number of the data source of each row, (N,) int32."""
        return self.store.sources[self.indices]

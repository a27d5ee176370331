"""The ids that llama.cpp makes of a rendered prompt: by llama.cpp itself where it is installed.

Without llama.cpp the base's own tokenizer stands in. Tokenizers that llama.cpp cuts otherwise are never written; texts
that it is known to cut otherwise are refused here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_tune.errors import CheckFailed, Problem
from lora_tune.model.gguf_file import Value, f32, u32, write_gguf
from lora_tune.model.gguf_tokenizer import GgufTokenizer

if TYPE_CHECKING:
    from lora_tune.data.chat_template import ChatTemplate

_OTHER_ENGINE = "export it for an engine that reads tokenizer.json, such as vLLM"


@dataclass(frozen=True, slots=True)
class LlamaTokenizer:
    """A GGUF file's tokenizer, callable: `ids` of a prompt whose control tokens are read as such.

    `bos`: the text of the token that llama.cpp puts before every prompt, "" where it puts none; `stop_ids` are where it
    stops; `by`: who makes the ids; `notes`: texts that are cut otherwise.
    """

    ids: Callable[[str], list[int]]
    bos: str
    stop_ids: tuple[int, ...]
    notes: tuple[str, ...]
    by: Literal["llama.cpp", "transformers"]

    def facts(self) -> dict[str, Any]:
        """What `--json` says of it."""
        return {"tokens_by": self.by, "notes": list(self.notes)}


def llama_tokenizer(written: GgufTokenizer, chat: ChatTemplate) -> LlamaTokenizer:
    """The tokenizer of a GGUF file, executed. Raises: UsageError where the package gguf is not installed."""
    bos = str(chat.tokenizer.bos_token) if written.adds_bos else ""
    if importlib.util.find_spec("llama_cpp") is not None:
        notes = tuple(written.cut_otherwise.values())
        return LlamaTokenizer(_in_llama_cpp(written), bos, written.stop_ids, notes, "llama.cpp")
    first = [int(chat.tokenizer.bos_token_id)] if written.adds_bos else []

    controls = [token.content for token in chat.tokenizer.added_tokens_decoder.values() if token.content.strip()]
    before_space = re.compile("(?:" + "|".join(["^", *map(re.escape, controls)]) + ") ")

    def ids(text: str) -> list[int]:
        if "not NFC" in written.cut_otherwise and not unicodedata.is_normalized("NFC", text):
            raise CheckFailed(Problem(written.cut_otherwise["not NFC"], "write the data in NFC"))
        if "space after control token" in written.cut_otherwise and before_space.search(text):
            raise CheckFailed(Problem(written.cut_otherwise["space after control token"], _OTHER_ENGINE))
        return [*first, *map(int, chat.tokenizer.encode(text, add_special_tokens=False))]

    return LlamaTokenizer(ids, bos, written.stop_ids, tuple(written.cut_otherwise.values()), "transformers")


def _in_llama_cpp(written: GgufTokenizer) -> Callable[[str], list[int]]:
    """The tokenizer read by llama.cpp from a file without weights."""
    llama_cpp: Any = importlib.import_module("llama_cpp")
    shape: dict[str, Value] = {
        "llama.context_length": u32(512),
        "llama.embedding_length": u32(64),
        "llama.block_count": u32(1),
        "llama.feed_forward_length": u32(64),
        "llama.attention.head_count": u32(1),
        "llama.attention.layer_norm_rms_epsilon": f32(1e-6),
        "llama.rope.dimension_count": u32(64),
    }
    with tempfile.TemporaryDirectory() as folder, _silence():
        path = Path(folder) / "words.gguf"
        write_gguf(path, "llama", {**shape, **written.metadata}, ())
        model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)

    def ids(text: str) -> list[int]:
        return [int(token) for token in model.tokenize(text.encode(), add_bos=True, special=True)]

    return ids


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing on stderr, where llama.cpp writes what it does."""
    with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stderr(nothing):
        yield

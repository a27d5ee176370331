"""Templates, tokenizers and conversations for the tests of chat templates, and what every row must satisfy."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import mask_oracle
import numpy as np
import pytest
from transformers import AutoTokenizer

from lora_tune.data.chat_template import NOTES, ChatTemplate, TokenRow, load_chat_template
from lora_tune.data.conversation import Conversation, Message

CORPUS = Path(os.environ.get("LORA_TUNE_CORPUS") or "/nonexistent")
TRL = importlib.util.find_spec("trl")
needs_corpus = pytest.mark.skipif(not CORPUS.is_dir(), reason="LORA_TUNE_CORPUS does not name the corpus folder")
SPECIAL = re.compile(
    r"<[|｜][^<>\s'\"{}]*[|｜]>|<(?:start|end)_of_[a-z]+>|<end_of_utterance>|<turn\|>|<\|turn>|</?s>|\[/?INST\]"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "zq_weather",
            "description": "The weather of a place",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string", "description": "where"}},
                "required": ["place"],
            },
        },
    }
]


def _all_templates() -> dict[str, str]:
    """Every distinct template of the installed TRL and of the corpus, by name."""
    files = sorted((Path(TRL.origin).parent / "chat_templates").glob("*.jinja")) if TRL and TRL.origin else []
    if CORPUS.is_dir():
        files += sorted((CORPUS / "data/chat_templates").iterdir())
    found: dict[str, tuple[str, str]] = {}
    for file in files:
        text = file.read_text(encoding="utf-8")
        text = json.loads(text)["chat_template"] if file.suffix == ".json" else text
        found.setdefault(hashlib.sha256(text.encode()).hexdigest(), (file.name, text))
    return {f"{name}:{digest[:4]}": text for digest, (name, text) in found.items()}


TEMPLATES = _all_templates()


@lru_cache
def tokenizer_of(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(CORPUS / "data/tokenizers" / folder)


def tokenizer_for(text: str | None, folder: str = "gpt2_no-template") -> Any:
    """A copy of a real tokenizer in which the special tokens of a template are special tokens."""
    tokenizer = copy.deepcopy(tokenizer_of(folder))
    if text is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": sorted({*SPECIAL.findall(text), "<s>"})})
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "bos_token": "<s>"})
    return tokenizer


def conversation(*messages: Message, tools: tuple = ()) -> Conversation:
    return Conversation(messages=messages, tools=tools, source=1, file="data.jsonl", line=7)


def marked_conversations() -> dict[str, Conversation]:
    """Conversations whose contents are unique words, for the oracle."""
    user, answer = (
        [Message("user", mask_oracle.marker(i)) for i in (1, 2)],
        [Message("assistant", mask_oracle.marker(i) + " x.\n\nY " + mask_oracle.marker(i + 1)) for i in (10, 20)],
    )
    system = Message("system", mask_oracle.marker(3))
    call = {
        "type": "function",
        "id": "call00001",
        "function": {"name": "zq_weather", "arguments": {"place": mask_oracle.marker(30)}},
    }
    called = Message("assistant", "", tool_calls=(call,))
    result = Message("tool", mask_oracle.marker(31), name="zq_weather", tool_call_id="call00001")
    return {
        "one": conversation(user[0], answer[0]),
        "two": conversation(user[0], answer[0], user[1], answer[1]),
        "system": conversation(system, user[0], answer[0], user[1], answer[1]),
        "tools": conversation(user[0], called, result, answer[0], tools=tuple(TOOLS)),
    }


def reference_messages(template: ChatTemplate, row: Conversation) -> list[dict[str, Any]]:
    """The messages as the template reads them (a few take contents as lists of parts, or arguments as text)."""
    probe = template._drafter._probe
    messages = [message.as_template_input() for message in row.messages]
    for message in messages:
        if probe.content_as_parts:
            message["content"] = [{"type": "text", "text": message["content"]}]
        if probe.arguments_as_text and "tool_calls" in message:
            message["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
    return messages


def reference_ids(template: ChatTemplate, row: Conversation, turns: int | None = None, **more: Any) -> list[int]:
    messages = reference_messages(template, row)[:turns]
    return template.tokenizer.apply_chat_template(messages, tools=list(row.tools) or None, return_dict=False, **more)


def check_rows(template: ChatTemplate, row: Conversation, rows: list[TokenRow]) -> None:
    """Equality with the reference, the prefix property, exactness of the mask, something to train."""
    turns = [i for i, message in enumerate(row.messages) if message.role == "assistant"]
    for token_row in rows:
        assert token_row.input_ids.dtype == np.int32
        assert token_row.mask.dtype == bool
        assert len(token_row.mask) == len(token_row.input_ids)
        assert (token_row.source, token_row.file, token_row.line) == (1, "data.jsonl", 7)
        assert token_row.mask.any()
        assert token_row.notes <= set(NOTES)
    if "per_turn" in rows[0].notes:
        assert len(rows) == len(turns)
        starts = [
            (turn, token_row, int(np.argmax(token_row.mask))) for turn, token_row in zip(turns, rows, strict=True)
        ]
    else:
        assert len(rows) == 1
        firsts = np.flatnonzero(np.diff(np.concatenate(([0], rows[0].mask.astype(np.int8)))) == 1)
        starts = [(turn, rows[0], int(first)) for turn, first in zip(turns, firsts, strict=True)]
        if "straddles" not in rows[0].notes:
            want = reference_ids(template, row)
            got = rows[0].input_ids.tolist()
            if template._end.mode == "rendered":
                assert got == want
            else:  # nothing ends the turn: one token comes after the render without its trailing white space
                assert got[-1] == template.eos_id
                assert want[: len(got) - 1] == got[:-1]
    for turn, token_row, first in starts:
        before = token_row.input_ids[:first].tolist()
        assert before == template.prompt_ids(row.messages[:turn], tools=row.tools)
        assert before == reference_ids(template, row, turn, add_generation_prompt=True)
    pairs = [(token_row.input_ids, token_row.mask) for token_row in rows]
    tools = list(row.tools) or None
    assert not mask_oracle.complaints(template.tokenizer, reference_messages(template, row), pairs, tools=tools)


@lru_cache
def loaded(name: str) -> ChatTemplate:
    """The template of that name with a tokenizer that has its special tokens."""
    by_sentencepiece = re.match(r"llama-2|mistral|vicuna|phi|gemma|zephyr|llava|hf_", name)
    folder = "tinyllama-1.1b-chat" if by_sentencepiece else "gpt2_no-template"
    return load_chat_template(tokenizer_for(TEMPLATES[name], folder), template=TEMPLATES[name])


def starting_with(name: str) -> ChatTemplate:
    return loaded(next(other for other in TEMPLATES if other.startswith(name)))


@lru_cache
def own_template(folder: str) -> ChatTemplate:
    return load_chat_template(tokenizer_for(None, folder))

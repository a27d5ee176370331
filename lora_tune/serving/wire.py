"""Answers in the form of OpenAI's API: whole ones and the chunks of a stream, for chat and for text completions."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_tune.serving.answering import Answer
from lora_tune.serving.backend import Finished, ServedModel, TokenLogprob
from lora_tune.serving.tool_format import Call

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Envelope:
    """What stands around every answer to one request; `usage`: whether a stream ends with the counts."""

    kind: Literal["chat", "text"]
    model: str
    usage: Literal["usage", "no usage"] = "no usage"
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Json], *, usage: Json) -> Json:
        """The object of a whole answer."""
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._head(name), "choices": list(choices), "usage": usage}

    def chunk(self, choices: Sequence[Json], *, usage: Json | None = None) -> Json:
        """One chunk of a stream; `usage` is null in all but the last where it was asked for."""
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        made = {**self._head(name), "choices": list(choices)}
        return {**made, "usage": usage} if self.usage == "usage" else made

    def _head(self, name: str) -> Json:
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": name, "created": self.created, "model": self.model}


def usage_of(ends: Iterable[Finished | None], *, prompts: int = 1) -> Json:
    """Token counts of all answers; the tokens of a prompt count once, however many answers it got."""
    known = [end for end in ends if end is not None]
    each = len(known) // max(1, prompts) or 1
    prompt = sum(end.prompt_tokens for end in known[::each])
    completion = sum(end.completion_tokens for end in known)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def chat_choice(number: int, answer: Answer, *, text: str, calls: Sequence[Call], logprobs: int | None) -> Json:
    """One choice of a whole chat answer."""
    message: Json = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    reason = "tool_calls" if calls else answer.end.reason if answer.end else None
    content = None if logprobs is None else {"content": [_chat_logprob(one, logprobs) for one in answer.logprobs]}
    return {"index": number, "message": message, "logprobs": content, "finish_reason": reason}


def chat_delta(
    number: int,
    delta: Json,
    *,
    reason: str | None = None,
    logprobs: Sequence[TokenLogprob] = (),
    top: int | None = None,
) -> Json:
    """One choice of a chunk of a chat answer."""
    content = None if top is None or not logprobs else {"content": [_chat_logprob(one, top) for one in logprobs]}
    return {"index": number, "delta": delta, "logprobs": content, "finish_reason": reason}


def call_deltas(calls: Sequence[Call]) -> Json:
    """The delta that holds all calls."""
    return {"tool_calls": [{"index": number, **_call(call)} for number, call in enumerate(calls)]}


def text_choice(
    number: int,
    text: str,
    *,
    reason: str | None,
    logprobs: Sequence[TokenLogprob] = (),
    top: int | None = None,
    offset: int = 0,
) -> Json:
    """One choice of a text completion, whole or of a chunk; `offset` is how many characters came before it."""
    return {
        "index": number,
        "text": text,
        "logprobs": None if top is None else _text_logprobs(logprobs, top, offset),
        "finish_reason": reason,
    }


def model_object(model: ServedModel) -> Json:
    """A model as `/v1/models` lists it: `parent` and `root` as vLLM has them, and never a path."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "lora_tune",
        "root": model.parent or model.name,
        "parent": model.parent,
        "max_model_len": model.context,
    }


def _call(call: Call) -> Json:
    name, arguments = call
    text = json.dumps(arguments, ensure_ascii=False)
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": text}}


def _chat_logprob(one: TokenLogprob, top: int) -> Json:
    return {**_token(one), "top_logprobs": [_token(other) for other in one.top[:top]]}


def _token(one: TokenLogprob) -> Json:
    return {"token": one.text, "logprob": max(one.logprob, -9999.0), "bytes": list(one.data)}


def _text_logprobs(logprobs: Sequence[TokenLogprob], top: int, offset: int) -> Json:
    offsets = []
    for one in logprobs:
        offsets.append(offset)
        offset += len(one.text)
    return {
        "tokens": [one.text for one in logprobs],
        "token_logprobs": [max(one.logprob, -9999.0) for one in logprobs],
        "top_logprobs": [{other.text: max(other.logprob, -9999.0) for other in one.top[:top]} for one in logprobs],
        "text_offset": offsets,
    }

"""The ids that a running engine feeds a model for a request, asked over HTTP in the engine's own way.

vLLM (`/tokenize` with messages) and llama-server (`/apply-template`, then `/tokenize`) say them. SGLang and
llama-cpp-python's server do not render for others: there the text of training is cut by the engine's own tokenizer, and
the chat endpoint must count as many tokens, and where it gives log-probabilities be as sure of its first word as the
completion endpoint is behind that text.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from lora_tune.adapter.parity import Render
from lora_tune.data.conversation import Conversation
from lora_tune.errors import CheckFailed, Problem

if TYPE_CHECKING:
    from lora_tune.data.chat_template import ChatTemplate
    from lora_tune.serving.engines import EngineCommand

_S = 120.0
_NEAR = 1e-3  # nats between two first words after the same prompt, read in batches of other shapes
IDS = "the engine's own renderer and tokenizer gave the ids"
COUNTED = (
    "the engine's own tokenizer gave the ids of training's text; its chat endpoint counts as many tokens and expects "
    "the same first words within 0.001 nats (it does not say the ids themselves)"
)


def served_render(command: EngineCommand, *, model: str, chat: ChatTemplate) -> tuple[Render, str]:
    """How this engine renders a request for a model, and what that proves."""
    ask = _Asker(command.url, command.token, model)
    if command.engine == "vllm":
        return ask.vllm_ids, IDS
    if command.server == "llama-server":
        return ask.llama_server_ids, IDS
    path = "/extras/tokenize" if command.server == "llama_cpp.server" else "/tokenize"

    def counted(request: Conversation) -> list[int]:
        return ask.counted_ids(request, chat, path=path)

    return counted, COUNTED


class _Asker:
    """Requests to one engine about one model."""

    def __init__(self, url: str, token: str | None, model: str) -> None:
        self._url, self._token, self._model = url, token, model

    def vllm_ids(self, request: Conversation) -> list[int]:
        """vLLM: `entrypoints/serve/tokenize/protocol.py`, TokenizeChatRequest."""
        body = {"model": self._model, "add_generation_prompt": True, **_messages(request)}
        return _ids(self._post("/tokenize", body)["tokens"])

    def llama_server_ids(self, request: Conversation) -> list[int]:
        """llama.cpp `tools/server/README.md`: what /v1/chat/completions does, in two steps."""
        text = self._post("/apply-template", _messages(request))["prompt"]
        body = {"content": text, "add_special": True, "parse_special": True}
        return _ids(self._post("/tokenize", body)["tokens"])

    def counted_ids(self, request: Conversation, chat: ChatTemplate, *, path: str) -> list[int]:
        """The ids of training's text by the engine's tokenizer, with what the chat endpoint shows of its own."""
        if request.tools or any(message.tool_calls for message in request.messages):
            raise CheckFailed("tools are not compared with this engine", "compare rows without tools")
        text = chat.prompt_text(request.messages)
        name = "input" if path.startswith("/extras") else "prompt"
        ids = _ids(self._post(path, {"model": self._model, name: text})["tokens"])
        added = chat.tokenizer.bos_token_id  # put before every text, and so before one that has it
        ids = ids[1:] if added is not None and ids[:2] == [added, added] else ids
        asked = {"model": self._model, "max_tokens": 1, "temperature": 0, "repeat_penalty": 1.0}
        chatted = self._post(
            "/v1/chat/completions", {**asked, "logprobs": True, "top_logprobs": 3, **_messages(request)}
        )
        counted = int(chatted["usage"]["prompt_tokens"])
        if counted != len(ids):
            raise CheckFailed(f"its chat endpoint feeds {counted} tokens, and training's text has {len(ids)}")
        completed = self._post("/v1/completions", {**asked, "logprobs": 3, "prompt": text})
        self._same_first_word(chatted["choices"][0], completed["choices"][0])
        return ids

    def _same_first_word(self, chatted: Any, completed: Any) -> None:
        """Raises: CheckFailed where the two endpoints expect different first words."""
        if not chatted.get("logprobs") or not completed.get("logprobs"):
            return
        content = chatted["logprobs"]["content"]
        tops = completed["logprobs"]["top_logprobs"]
        if not content or not tops:  # the answer ended at once
            return
        one = {found["token"]: float(found["logprob"]) for found in content[0]["top_logprobs"]}
        other = {str(word): float(value) for word, value in tops[0].items()}
        shared = one.keys() & other.keys()
        if not shared or any(abs(one[word] - other[word]) > _NEAR for word in shared):
            raise CheckFailed(f"its chat endpoint expects {one} next, and behind training's text it expects {other}")

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer of the engine. Raises: CheckFailed with what it said instead."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token}")
        try:
            with urllib.request.urlopen(request, timeout=_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read(300).decode(errors="replace")
            raise CheckFailed(Problem(f"POST {path} answers {error.code}: {said}")) from None
        except (OSError, ValueError) as error:
            raise CheckFailed(Problem(f"POST {path} gets no answer: {error}")) from None


def _messages(request: Conversation) -> dict[str, Any]:
    found: dict[str, Any] = {"messages": [message.as_template_input() for message in request.messages]}
    return {**found, "tools": list(request.tools)} if request.tools else found


def _ids(tokens: Any) -> list[int]:
    """Ids, of engines that give objects with `id` as well."""
    return [int(token["id"] if isinstance(token, dict) else token) for token in tokens]

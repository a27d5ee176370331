"""Prompts as the model is fed them: rendered and encoded by the training's template, in one thread of their own.

A template serves one thread at a time, and a long prompt may take a second: the event loop goes on meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from lora_tune.data.conversation import Conversation
from lora_tune.errors import CheckFailed
from lora_tune.serving.asked import ChatAsked
from lora_tune.serving.backend import Backend
from lora_tune.serving.refusals import Refusal, bad, without_paths
from lora_tune.serving.tool_format import ToolFormat, tool_format

if TYPE_CHECKING:
    from lora_tune.data.chat_template import ChatTemplate

_Result = TypeVar("_Result")


class Prompting:
    """Everything that a server does with chat templates."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self._formats: dict[str, ToolFormat | None] = {}
        self._longest: dict[str, int] = {}

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """The result of something that uses a template or its tokenizer, which no other thread may do meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def chat(self, asked: ChatAsked, *, context: int | None = None) -> tuple[tuple[int, ...], ToolFormat | None]:
        """The prompt of a chat request, and how its answer would write tool calls (None where it may not, or cannot).

        With a `context`, words that cannot fit into so many tokens are not encoded.

        Raises: UnknownModel; Refusal where the template refuses the conversation.
        """
        chat = self._backend.chat(asked.model)
        return await self.run(lambda: self._chat(chat, asked, context))

    def _chat(
        self, chat: ChatTemplate, asked: ChatAsked, context: int | None
    ) -> tuple[tuple[int, ...], ToolFormat | None]:
        tools = () if asked.choice == "none" else asked.tools
        self._check_length(chat, sum(len(turn.content) for turn in asked.messages), context)
        try:
            ids = chat.prompt_ids(asked.messages, tools=tools)
        except CheckFailed as error:
            raise bad("messages", without_paths(error.problems[0].reason)) from None
        if not tools:
            return tuple(ids), None
        found = self._format(chat)
        if asked.choice in ("required", "named"):
            if found is None:
                reason = f"this model's template has no form of tool calls that could be forced, got {asked.choice}"
                raise bad("tool_choice", reason, code="unsupported_parameter")
            ids = [*ids, *chat.tokenizer.encode(found.forced(asked.forced), add_special_tokens=False)]
        return tuple(ids), found

    def _format(self, chat: ChatTemplate) -> ToolFormat | None:
        if chat.sha256 not in self._formats:
            self._formats[chat.sha256] = tool_format(chat)
        return self._formats[chat.sha256]

    def _check_length(self, chat: ChatTemplate, characters: int, context: int | None) -> None:
        """Raises: Refusal where even the longest tokens would be more than the context has."""
        if chat.sha256 not in self._longest:
            self._longest[chat.sha256] = max(map(len, chat.tokenizer.get_vocab()), default=1)
        if context is not None and characters > context * self._longest[chat.sha256]:
            reason = f"at most {context:,} tokens together, got {characters:,} characters of the prompt"
            raise Refusal(400, reason, code="context_length_exceeded", param="messages")

    async def texts(
        self, model: str, prompts: Sequence[str | tuple[int, ...]], *, context: int
    ) -> list[tuple[int, ...]]:
        """Prompts without turns: text as training encodes text without turns, token ids as they are.

        Raises: UnknownModel; Refusal for an id that the model does not have, or text that cannot be encoded.
        """
        chat = self._backend.chat(model)

        def encoded() -> list[tuple[int, ...]]:
            self._check_length(chat, max(len(prompt) for prompt in prompts), context)
            return [_text_ids(chat, prompt) for prompt in prompts]

        return await self.run(encoded)

    async def written(self, model: str, ids: Sequence[int]) -> str:
        """Token ids as text, control tokens included."""
        chat = self._backend.chat(model)
        return await self.run(lambda: str(chat.tokenizer.decode(list(ids), skip_special_tokens=False)))

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _text_ids(chat: ChatTemplate, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        if max(prompt) >= len(chat.tokenizer):
            raise bad("prompt", f"token ids go to {len(chat.tokenizer) - 1:,}, got {max(prompt):,}")
        return prompt
    rows = chat.rows([Conversation(text=prompt)], loss_on="all")[0]
    if not isinstance(rows, list):
        raise Refusal(400, f"prompt: {without_paths(rows.reason)}", param="prompt")
    return tuple(int(token) for token in rows[0].input_ids[:-1])  # without the eos that ends a text in training

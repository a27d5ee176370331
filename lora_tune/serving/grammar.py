"""Answers that must be one JSON object: which tokens may come next, by llguidance (its only caller)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_tune.serving.backend import Unsupported

if TYPE_CHECKING:
    from lora_tune.data.chat_template import ChatTemplate

_OBJECT = {"type": "object"}


class Grammar:
    """Which tokens one answer may still take."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, vocabulary: int) -> torch.Tensor:
        """(V,) bool. Raises: RuntimeError where the grammar has failed."""
        words = np.zeros((1, (vocabulary + 31) // 32), dtype=np.int32)
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, words, 0)
        self._check()
        bits = np.unpackbits(words.view(np.uint8)[0], bitorder="little")[:vocabulary]
        return torch.from_numpy(bits.astype(bool))

    def take(self, token: int) -> None:
        """The token that was taken. Raises: RuntimeError where it was not allowed."""
        self._matcher.consume_token(token)
        self._check()

    def is_whole(self) -> bool:
        """Whether nothing more may come."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(f"grammar: {self._matcher.get_error()}")


class Grammars:
    """The grammars of one tokenizer; reading a vocabulary takes a second, and is done at the first request."""

    def __init__(self, chat: ChatTemplate) -> None:
        self._chat = chat
        self._tokenizer: Any = None

    def json_object(self, *, vocabulary: int) -> Grammar:
        """A grammar of one JSON object, at its beginning; `vocabulary` is how many logits the model has.

        Raises: Unsupported where llguidance is not installed or cannot read this tokenizer.
        """
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError:
            reason = "response_format json_object needs llguidance"
            raise Unsupported(reason, "pip install 'lora_tune[serve]'") from None
        if self._tokenizer is None:
            try:
                self._tokenizer = from_tokenizer(
                    self._chat.tokenizer, n_vocab=vocabulary, eos_token=sorted(map(int, self._chat.stop_ids))
                )
            except ValueError as error:
                raise Unsupported(f"response_format json_object: {error}") from None
        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_json_schema(_OBJECT), log_level=0)
        if matcher.is_error():
            raise Unsupported(f"response_format json_object: {matcher.get_error()}")
        return Grammar(matcher)

"""One request on its way through the engine, and its row in a batch."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from lora_tune.errors import LoraTuneError
from lora_tune.serving.answer_text import AnswerText, Vocabulary
from lora_tune.serving.backend import Finished, Piece, Reason, Request, TokenLogprob
from lora_tune.serving.grammar import Grammar

Item = Piece | Finished | LoraTuneError
_numbers = itertools.count()


@dataclass(eq=False)
class Job:
    """A request, who waits for it and how it stands. `cancelled` is set by whoever waits, all else by the engine."""

    request: Request
    adapter: str | None
    """PEFT's name of the adapter, None for the base."""
    own_batch: Literal["own batch", "shared batch"]
    vocabulary: Vocabulary
    logits: int
    """How many tokens the model can choose from."""
    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[Item]
    grammar: Grammar | None = None
    cancelled: bool = False
    ended: bool = False
    suspected: bool = False
    """Its batch failed: it is tried once more, alone."""
    number: int = field(default_factory=lambda: next(_numbers))


class Row:
    """A job that is being answered: what it has made so far."""

    def __init__(self, job: Job, draws: list[float]) -> None:
        sampling = job.request.sampling
        self.job = job
        self.ids: list[int] = list(job.request.prompt_ids)
        self.made: list[int] = []
        self.draws = draws
        self.grammar = job.grammar
        self.text = AnswerText(job.vocabulary, sampling.stop)
        self.read = 0
        """Tokens of `ids` that are in the cache."""
        self.tokens = 0
        """Tokens made, a stop token included."""

    @property
    def last(self) -> int:
        """The newest token, which the model has not read yet."""
        return self.ids[-1]

    def take(self, token: int, logprobs: tuple[TokenLogprob, ...]) -> list[Piece | Finished]:
        """Go on by one token: what the client gets; the last item is Finished where the answer has ended."""
        sampling = self.job.request.sampling
        self.tokens += 1
        if token in self.job.vocabulary.stop_ids:
            return [*self._remaining(), self.end("stop")]
        self.ids.append(token)
        self.made.append(token)
        if self.grammar is not None:
            self.grammar.take(token)
        piece = Piece(self.text.add(token), (token,), logprobs)
        if self.text.stopped or (self.grammar is not None and self.grammar.is_whole()):
            return [piece, *self._remaining(), self.end("stop")]
        if self.tokens >= sampling.max_new_tokens:
            return [piece, *self._remaining(), self.end("length")]
        return [piece]

    def _remaining(self) -> Iterable[Piece]:
        text = self.text.rest()
        return [Piece(text, ())] if text else []

    def end(self, reason: Reason) -> Finished:
        """The last item of this answer."""
        return Finished(reason, len(self.job.request.prompt_ids), self.tokens)

"""From requests to answers: several at once, counted, and cancelled together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from lora_tune.serving.backend import Backend, Finished, Piece, Request, TokenLogprob
from lora_tune.serving.metrics import Metrics
from lora_tune.serving.refusals import Refusal, draining

Item = tuple[int, Piece | Finished]
"""The number of the answer, and what came for it."""


@dataclass(slots=True)
class Answer:
    """One answer as it grows."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    end: Finished | None = None

    def add(self, item: Piece | Finished) -> None:
        """Append a piece, or note the end."""
        if isinstance(item, Finished):
            self.end = item
            return
        self.text += item.text
        self.ids += item.ids
        self.logprobs += item.logprobs


async def answers(backend: Backend, requests: Sequence[Request], metrics: Metrics) -> AsyncGenerator[Item, None]:
    """Everything that comes for these requests, in the order in which it comes; closing it cancels all of them.

    Raises: what the backend's `stream` raises, for the first request that fails; Refusal (503) for an answer that the
    engine cut short because it stops.
    """
    began = time.monotonic()
    source = _one(backend, requests[0]) if len(requests) == 1 else _several(backend, requests)
    waiting = set(range(len(requests)))
    async with aclosing(source):
        async for number, item in source:
            if number in waiting and isinstance(item, Piece) and item.ids:
                waiting.discard(number)
                metrics.first_token(requests[number].model, time.monotonic() - began)
            if isinstance(item, Finished):
                metrics.finished(requests[number].model, item, time.monotonic() - began)
                if item.reason == "cancelled":
                    raise draining()
            yield number, item


async def whole_answers(backend: Backend, requests: Sequence[Request], metrics: Metrics) -> list[Answer]:
    """All answers, each whole. Raises: as `answers`."""
    made = [Answer() for _ in requests]
    async with aclosing(answers(backend, requests, metrics)) as items:
        async for number, item in items:
            made[number].add(item)
    if any(answer.end is None for answer in made):
        raise Refusal(500, "the engine ended an answer without a word")
    return made


async def _one(backend: Backend, request: Request) -> AsyncGenerator[Item, None]:
    async with aclosing(backend.stream(request)) as stream:
        async for item in stream:
            yield 0, item


async def _several(backend: Backend, requests: Sequence[Request]) -> AsyncGenerator[Item, None]:
    """Answers that are made at the same time, each by a task of its own."""
    queue: asyncio.Queue[Item | int] = asyncio.Queue()  # a lone number: this answer's task has ended

    async def run(number: int, request: Request) -> None:
        try:
            async with aclosing(backend.stream(request)) as stream:
                async for item in stream:
                    queue.put_nowait((number, item))
        finally:
            queue.put_nowait(number)

    tasks = [asyncio.create_task(run(number, request)) for number, request in enumerate(requests)]
    left = len(tasks)
    try:
        while left:
            found = await queue.get()
            if isinstance(found, int):
                await tasks[found]  # raises what it raised
                left -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

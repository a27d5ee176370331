"""Questions to a backend, answers to a screen: one model or two at once; Ctrl-C stops them and not the chat."""

from __future__ import annotations

import asyncio
import signal
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from types import FrameType

from lora_tune.errors import CheckFailed, Problem, UsageError
from lora_tune.interrupts import Stop, handled_by
from lora_tune.serving.backend import Backend, Finished, Reason, Request
from lora_tune.serving.chat_screen import Screen
from lora_tune.serving.chat_session import Said, Session, Turn


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is fed for a question, and how its answer is drawn."""

    request: Request
    context: int

    @property
    def is_cut_by_context(self) -> bool:
        """Whether the answer ends where the context does, before `max_new_tokens`."""
        return len(self.request.prompt_ids) + self.request.sampling.max_new_tokens == self.context


class Answers:
    """The asking side of a chat: one event loop for all requests, as backends want it."""

    def __init__(self, backend: Backend, runner: asyncio.Runner) -> None:
        self._backend, self._runner = backend, runner

    def prompt(self, session: Session, model: str, turn: Turn) -> Prompt:
        """The prompt of a question for one model, rendered as in training.

        Raises: UsageError where it does not fit into the context or the template refuses it.
        """
        try:
            ids = self._backend.chat(model).prompt_ids(session.messages(model))
        except CheckFailed as error:
            raise UsageError(error.problems[0].reason, "/new, or another /system") from None
        context = next(one.context for one in self._backend.models() if one.name == model)
        room = context - len(ids)
        if room < 1:
            reason = f"the conversation has {len(ids):,} tokens, and {model} holds {context:,} with the answer"
            raise UsageError(Problem(reason, "/new starts another one"))
        sampling = session.sampling_of(turn)
        limited = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        return Prompt(Request(model, tuple(ids), limited), context)

    def ask(self, session: Session, turn: Turn, screen: Screen, *, at_once: str) -> list[Prompt]:
        """Let every speaker answer; their answers are in `turn` afterwards, whole or as far as they came.

        `at_once`: "together" or "in turn". Ctrl-C stops the answers, a second one ends the command. Raises: UsageError
        as above, before anything is asked; Stop for another signal.
        """
        prompts = [self.prompt(session, model, turn) for model in session.speakers]
        with _Stopping(self._runner.get_loop()) as stopping:
            self._runner.run(self._ask(prompts, turn, screen, stopping, at_once))
        if stopping.signal not in (None, signal.SIGINT):
            raise Stop(stopping.signal)
        return prompts

    async def _ask(self, prompts: list[Prompt], turn: Turn, screen: Screen, stopping: _Stopping, at_once: str) -> None:
        if at_once == "together":
            asked = [self._one(prompt, turn, screen, stopping, column) for column, prompt in enumerate(prompts)]
            for found in await asyncio.gather(*asked, return_exceptions=True):
                if isinstance(found, BaseException):
                    raise found
            return
        for column, prompt in enumerate(prompts):
            if not stopping.event.is_set():
                await self._one(prompt, turn, screen, stopping, column)

    async def _one(self, prompt: Prompt, turn: Turn, screen: Screen, stopping: _Stopping, column: int) -> None:
        """One answer: pieces to the screen until it ends or is stopped."""
        words: list[str] = []
        end: Reason | None = None
        stop = asyncio.ensure_future(stopping.event.wait())
        async with aclosing(self._backend.stream(prompt.request)) as stream:
            while end is None:
                item = asyncio.ensure_future(anext(stream))
                await asyncio.wait((item, stop), return_when=asyncio.FIRST_COMPLETED)
                if not item.done():
                    item.cancel()
                    with suppress(asyncio.CancelledError, StopAsyncIteration):
                        await item
                    end = "cancelled"
                elif isinstance(found := item.result(), Finished):
                    end = found.reason
                else:
                    words.append(found.text)
                    screen.piece(column, found.text)
        stop.cancel()
        said = Said("".join(words), end)
        turn.answers[prompt.request.model] = said
        screen.end(column, said)


class _Stopping:
    """While answers come: the first signal sets `event`, a second one ends the command at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.event = asyncio.Event()
        self.signal: int | None = None
        self._loop = loop
        self._handling = handled_by(self._handle)

    def __enter__(self) -> _Stopping:
        self._handling.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._handling.__exit__(None, None, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise Stop(number)
        self.signal = number
        self._loop.call_soon_threadsafe(self.event.set)

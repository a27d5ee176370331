"""`/v1/chat/completions` and `/v1/completions`: from a checked body to one object, or to the chunks of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from lora_tune.serving.answering import Answer, answers, whole_answers
from lora_tune.serving.asked import ChatAsked, CompletionAsked, Wanted
from lora_tune.serving.backend import Backend, Finished, Piece, Request, ServedModel, UnknownModel
from lora_tune.serving.call_watch import CallWatch
from lora_tune.serving.metrics import Metrics
from lora_tune.serving.prompting import Prompting
from lora_tune.serving.refusals import Refusal, bad
from lora_tune.serving.sending import Chunks
from lora_tune.serving.settings import Caps
from lora_tune.serving.tool_format import Call, ToolFormat
from lora_tune.serving.wire import Envelope, call_deltas, chat_choice, chat_delta, text_choice, usage_of

Json = dict[str, Any]
_ANSWERS_OF_ALL_PROMPTS = 8  # times Caps.answers


class Completions:
    """Answers requests with one backend."""

    def __init__(self, backend: Backend, *, prompting: Prompting, metrics: Metrics, caps: Caps) -> None:
        self._backend, self._prompting, self._metrics, self._caps = backend, prompting, metrics, caps

    async def chat(self, asked: ChatAsked) -> Json:
        """The whole answer to a chat. Raises: Refusal, and what the backend raises."""
        form, requests = await self._chat_requests(asked)
        made = await whole_answers(self._backend, requests, self._metrics)
        choices = []
        for number, answer in enumerate(made):
            text, calls = await self._read(asked, form, answer)
            choices.append(chat_choice(number, answer, text=text, calls=calls, logprobs=asked.wanted.logprobs))
        return Envelope("chat", asked.model).whole(choices, usage=usage_of(answer.end for answer in made))

    async def _read(self, asked: ChatAsked, form: ToolFormat | None, answer: Answer) -> tuple[str, list[Call]]:
        """What an answer says, and its calls; those that hit no form stay text."""
        if form is None:
            return answer.text, []
        forced = _forced(asked, form)
        written = forced + await self._prompting.written(asked.model, answer.ids)
        text, calls = form.parse(written, tools=asked.tools)
        return (text, calls) if calls else (forced + answer.text, [])

    async def chat_chunks(self, asked: ChatAsked) -> Chunks:
        """The chunks of an answer to a chat: the role, words and calls as they come, why it ended, and the counts."""
        form, requests = await self._chat_requests(asked)
        envelope = Envelope("chat", asked.model, asked.wanted.usage)
        watches = [CallWatch(form, forced=_forced(asked, form), tools=asked.tools) if form else None for _ in requests]
        top, begun = asked.wanted.logprobs, set[int]()
        ends: list[Finished] = []
        async with aclosing(answers(self._backend, requests, self._metrics)) as items:
            async for number, item in items:
                if number not in begun:
                    begun.add(number)
                    yield envelope.chunk([chat_delta(number, {"role": "assistant", "content": ""})])
                if isinstance(item, Piece):
                    watch = watches[number]
                    text = item.text if watch is None else watch.feed(item)
                    if text or item.logprobs:
                        delta = chat_delta(number, {"content": text}, logprobs=item.logprobs, top=top)
                        yield envelope.chunk([delta])
                    continue
                ends.append(item)
                for choice in await self._last_deltas(asked, number, watches[number], item):
                    yield envelope.chunk([choice])
        if asked.wanted.usage == "usage":
            yield envelope.chunk([], usage=usage_of(ends))

    async def _last_deltas(self, asked: ChatAsked, number: int, watch: CallWatch | None, end: Finished) -> list[Json]:
        made, reason = [], str(end.reason)
        if watch is not None:
            text, calls = watch.end(await self._prompting.written(asked.model, watch.ids))
            if text:
                made.append(chat_delta(number, {"content": text}))
            if calls:
                made.append(chat_delta(number, call_deltas(calls)))
                reason = "tool_calls"
        return [*made, chat_delta(number, {}, reason=reason)]

    async def _chat_requests(self, asked: ChatAsked) -> tuple[ToolFormat | None, list[Request]]:
        model = self._model(asked.model)
        ids, form = await self._prompting.chat(asked, context=model.context)
        return form, self._requests(model, [ids], asked.wanted)

    async def text(self, asked: CompletionAsked) -> Json:
        """The whole answers to texts. Raises: Refusal, and what the backend raises."""
        requests = await self._text_requests(asked)
        made = await whole_answers(self._backend, requests, self._metrics)
        choices = [
            text_choice(
                number,
                answer.text,
                reason=answer.end.reason if answer.end else None,
                logprobs=answer.logprobs,
                top=asked.wanted.logprobs,
            )
            for number, answer in enumerate(made)
        ]
        counts = usage_of((answer.end for answer in made), prompts=len(asked.prompts))
        return Envelope("text", asked.model).whole(choices, usage=counts)

    async def text_chunks(self, asked: CompletionAsked) -> Chunks:
        """The chunks of answers to texts."""
        requests = await self._text_requests(asked)
        envelope, top = Envelope("text", asked.model, asked.wanted.usage), asked.wanted.logprobs
        lengths = [0] * len(requests)
        ends: dict[int, Finished] = {}
        async with aclosing(answers(self._backend, requests, self._metrics)) as items:
            async for number, item in items:
                if isinstance(item, Finished):
                    ends[number] = item
                    yield envelope.chunk([text_choice(number, "", reason=item.reason)])
                elif item.text or item.logprobs:
                    offset = lengths[number]
                    choice = text_choice(number, item.text, reason=None, logprobs=item.logprobs, top=top, offset=offset)
                    lengths[number] += len(item.text)
                    yield envelope.chunk([choice])
        if asked.wanted.usage == "usage":
            in_order = (ends[number] for number in sorted(ends))
            yield envelope.chunk([], usage=usage_of(in_order, prompts=len(asked.prompts)))

    async def _text_requests(self, asked: CompletionAsked) -> list[Request]:
        model = self._model(asked.model)
        most = self._caps.answers * _ANSWERS_OF_ALL_PROMPTS
        if len(asked.prompts) * asked.wanted.answers > most:
            raise bad("n", f"at most {most} answers to all prompts together")
        prompts = await self._prompting.texts(asked.model, asked.prompts, context=model.context)
        return self._requests(model, prompts, asked.wanted)

    def _model(self, name: str) -> ServedModel:
        """Raises: UnknownModel."""
        for model in self._backend.models():
            if model.name == name:
                return model
        raise UnknownModel(f"no model {name[:80]!r} is served here", "GET /v1/models lists them")

    def _requests(self, model: ServedModel, prompts: Sequence[tuple[int, ...]], wanted: Wanted) -> list[Request]:
        """Every prompt as often as answers are wanted. Raises: Refusal where it does not fit into the context."""
        made = []
        for ids in prompts:
            room = model.context - len(ids)
            if room < (wanted.max_tokens or 1):
                asked_for = f" and {wanted.max_tokens:,} of the answer" if wanted.max_tokens else ""
                reason = f"at most {model.context:,} tokens together, got {len(ids):,} of the prompt{asked_for}"
                raise Refusal(400, reason, code="context_length_exceeded", param="messages")
            room = min(room, self._caps.max_tokens)
            made += [Request(model.name, ids, wanted.sampling(number, room=room)) for number in range(wanted.answers)]
        return made


def _forced(asked: ChatAsked, form: ToolFormat) -> str:
    """The beginning of a call that the prompt holds already."""
    return form.forced(asked.forced) if asked.choice in ("required", "named") else ""

"""Does an endpoint speak OpenAI's API as its own client expects? Run against any engine, by its URL.

    python -m lora_tune.serving.conformance http://127.0.0.1:8000 --model NAME

Every check is one call, or a few, through the official `openai` client, and says what came instead of what must. An
engine that refuses a field with a 4xx that names it "does not offer" it: that is said, and is no failure where the
check allows it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lora_tune.errors import CheckFailed, UsageError
from lora_tune.serving.settings import TOKEN_VARIABLE
from lora_tune.terminal import print_json, print_table, run_app

if TYPE_CHECKING:
    from openai import OpenAI

Json = dict[str, Any]
Outcome = Literal["passed", "failed", "not offered"]
_ASK: list[dict[str, Any]] = [{"role": "user", "content": "Say something short."}]
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Check:
    """One check: what it is, how it ended, and what was found where it did not pass."""

    name: str
    outcome: Outcome
    found: str = ""


class _Wrong(Exception):
    """What came instead of what must."""


@dataclass(frozen=True, slots=True)
class _Engine:
    client: OpenAI
    model: str

    def chat(self, *, more: dict[str, Any] | None = None) -> Any:
        """A short greedy answer with more fields."""
        asked = {"model": self.model, "messages": _ASK, "max_tokens": _TOKENS, "temperature": 0, **(more or {})}
        return self.client.chat.completions.create(**asked)

    def text(self, *, more: dict[str, Any] | None = None) -> Any:
        """A short greedy completion with more fields."""
        asked = {"model": self.model, "prompt": "Once upon", "max_tokens": _TOKENS, "temperature": 0, **(more or {})}
        return self.client.completions.create(**asked)


def _must(holds: object, said: str) -> None:
    if not holds:
        raise _Wrong(said)


def _models(engine: _Engine) -> None:
    listed = {model.id: model for model in engine.client.models.list()}
    _must(engine.model in listed, f"{engine.model!r} is not among {sorted(listed)}")
    _must(listed[engine.model].object == "model", f"object is {listed[engine.model].object!r}")


def _chat(engine: _Engine) -> None:
    answer = engine.chat()
    choice, usage = answer.choices[0], answer.usage
    _must(answer.object == "chat.completion" and answer.id and answer.created > 0, f"object is {answer.object!r}")
    _must(choice.message.role == "assistant", f"role is {choice.message.role!r}")
    _must(isinstance(choice.message.content, str), "content is no text")
    _must(choice.finish_reason in ("stop", "length"), f"finish_reason is {choice.finish_reason!r}")
    _must(0 < usage.completion_tokens <= _TOKENS, f"{usage.completion_tokens} tokens of at most {_TOKENS}")
    _must(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, "the counts do not add up")
    _must(choice.finish_reason != "length" or usage.completion_tokens == _TOKENS, "length, before max_tokens")


def _greedy(engine: _Engine) -> None:
    first, second = (engine.chat().choices[0].message.content for _ in range(2))
    _must(first == second, f"temperature 0 gave {first!r}, then {second!r}")


def _stream(engine: _Engine) -> None:
    chunks = list(engine.chat(more={"stream": True}))
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    _must(all(chunk.object == "chat.completion.chunk" for chunk in chunks), "a chunk is of another kind")
    _must(len({chunk.id for chunk in chunks}) == 1, "the chunks have several ids")
    _must(deltas[0].delta.role == "assistant", f"the first delta has the role {deltas[0].delta.role!r}")
    text = "".join(one.delta.content or "" for one in deltas)
    whole = engine.chat().choices[0]
    _must(text == whole.message.content, f"streamed {text!r}, whole {whole.message.content!r}")
    reasons = [one.finish_reason for one in deltas if one.finish_reason]
    _must(reasons == [whole.finish_reason], f"finish reasons {reasons}, whole {whole.finish_reason!r}")


def _stream_usage(engine: _Engine) -> None:
    chunks = list(engine.chat(more={"stream": True, "stream_options": {"include_usage": True}}))
    _must(not chunks[-1].choices and chunks[-1].usage, "the last chunk is not the counts alone")
    _must(all(chunk.usage is None for chunk in chunks[:-1]), "counts stand in other chunks too")
    whole = engine.chat().usage
    _must(
        chunks[-1].usage.completion_tokens == whole.completion_tokens, "the counts differ from those of a whole answer"
    )
    _must(chunks[-1].usage.prompt_tokens == whole.prompt_tokens, "the prompt's count differs")


def _raw_stream(engine: _Engine) -> None:
    asked = {"model": engine.model, "messages": _ASK, "max_tokens": 4, "temperature": 0, "stream": True}
    with engine.client.chat.completions.with_streaming_response.create(**asked) as response:  # type: ignore[call-overload]
        kind = response.headers.get("content-type", "")
        lines = [line for line in response.iter_lines() if line]
    _must(kind.startswith("text/event-stream"), f"content-type is {kind!r}")
    _must(lines[-1] == "data: [DONE]", f"the last event is {lines[-1][:80]!r}")
    _must(all(line.startswith("data: ") for line in lines), "a line is no event")


def _several(engine: _Engine) -> None:
    answer = engine.chat(more={"n": 2, "temperature": 1, "seed": 5})
    _must([choice.index for choice in answer.choices] == [0, 1], f"{len(answer.choices)} choices of 2")


def _several_streamed(engine: _Engine) -> None:
    chunks = engine.chat(more={"n": 2, "stream": True})
    ended = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    _must(sorted(ended) == [0, 1], f"ends of the choices {ended}")


def _seed(engine: _Engine) -> None:
    more = {"temperature": 1, "seed": 11}
    first, second = (engine.chat(more=more).choices[0].message.content for _ in range(2))
    _must(first == second, f"the same seed gave {first!r}, then {second!r}")


def _stop(engine: _Engine) -> None:
    whole = engine.chat(more={"max_tokens": 24}).choices[0].message.content
    place = len(whole) // 2
    stop = whole[place : place + 2]
    if not stop.strip():
        return  # an answer without a middle: nothing to stop at
    answer = engine.chat(more={"max_tokens": 24, "stop": [stop]}).choices[0]
    wanted = whole[: whole.index(stop)]
    _must(answer.message.content.rstrip() == wanted.rstrip(), f"stopped at {stop!r}: {answer.message.content!r}")
    _must(answer.finish_reason == "stop", f"finish_reason is {answer.finish_reason!r}")
    parts = [
        chunk.choices[0].delta.content or ""
        for chunk in engine.chat(more={"max_tokens": 24, "stop": stop, "stream": True})
    ]
    _must(stop not in "".join(parts), "the stop text was streamed")


def _logprobs(engine: _Engine) -> None:
    answer = engine.chat(more={"logprobs": True, "top_logprobs": 2})
    content = answer.choices[0].logprobs.content
    _must(0 < len(content) <= answer.usage.completion_tokens, f"{len(content)} log-probabilities")
    for one in content:
        _must(
            one.logprob <= 0 and len(one.top_logprobs) == 2,
            f"{one.token!r}: {one.logprob}, {len(one.top_logprobs)} others",
        )
        _must(one.logprob <= one.top_logprobs[0].logprob + 1e-4, "a greedy token is likelier than the likeliest")
        _must(all(a.logprob >= b.logprob for a, b in pairwise(one.top_logprobs)), "the likeliest are not in order")
    said = b"".join(bytes(one.bytes or one.token.encode()) for one in content).decode("utf-8", "replace")
    text = answer.choices[0].message.content
    _must(text.strip() in said, f"the tokens say {said!r}, the answer {text!r}")


def _json(engine: _Engine) -> None:
    asked = [{"role": "user", "content": "Answer in JSON: an object with a name."}]
    answer = engine.chat(more={"response_format": {"type": "json_object"}, "messages": asked, "max_tokens": 48})
    choice = answer.choices[0]
    if choice.finish_reason == "length":
        _must(choice.message.content.lstrip().startswith("{"), f"begins with {choice.message.content[:20]!r}")
        return
    _must(isinstance(json.loads(choice.message.content), dict), f"{choice.message.content!r} is no object")


def _tools(engine: _Engine) -> None:
    asked = [{"role": "user", "content": "What is the weather in Oslo?"}]
    answer = engine.chat(more={"messages": asked, "tools": [_TOOL], "max_tokens": 32})
    choice = answer.choices[0]
    for call in choice.message.tool_calls or ():
        _must(call.id and call.type == "function" and call.function.name, "a call lacks id, type or name")
        _must(isinstance(json.loads(call.function.arguments), dict), f"arguments {call.function.arguments!r}")
    _must(
        bool(choice.message.tool_calls) == (choice.finish_reason == "tool_calls"), f"ends with {choice.finish_reason!r}"
    )


def _tool_result(engine: _Engine) -> None:
    call = {
        "id": "call_123456789",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
    }
    asked = [
        {"role": "user", "content": "What is the weather in Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_123456789", "content": "Rain."},
    ]
    answer = engine.chat(more={"messages": asked, "tools": [_TOOL]})
    _must(answer.usage.prompt_tokens > 0, "no prompt was read")


def _system(engine: _Engine) -> None:
    plain = engine.chat().usage.prompt_tokens
    told = engine.chat(more={"messages": [{"role": "system", "content": "Be brief."}, *_ASK]}).usage.prompt_tokens
    _must(told > plain, f"a system message left the prompt at {told} tokens")


def _parts(engine: _Engine) -> None:
    asked = [{"role": "user", "content": [{"type": "text", "text": _ASK[0]["content"]}]}]
    found = engine.chat(more={"messages": asked}).usage.prompt_tokens
    _must(found == engine.chat().usage.prompt_tokens, "text in parts became another prompt")


def _max_completion(engine: _Engine) -> None:
    asked: Any = {"model": engine.model, "messages": _ASK, "temperature": 0, "max_completion_tokens": 3}
    answer = engine.client.chat.completions.create(**asked)
    _must(answer.usage and answer.usage.completion_tokens <= 3, "more than max_completion_tokens")


def _text(engine: _Engine) -> None:
    answer = engine.text()
    _must(
        answer.object == "text_completion" and isinstance(answer.choices[0].text, str), f"object is {answer.object!r}"
    )
    _must(answer.usage.completion_tokens <= _TOKENS, f"{answer.usage.completion_tokens} tokens")
    streamed = "".join(chunk.choices[0].text for chunk in engine.text(more={"stream": True}) if chunk.choices)
    _must(streamed == answer.choices[0].text, f"streamed {streamed!r}, whole {answer.choices[0].text!r}")


def _texts(engine: _Engine) -> None:
    answer = engine.text(more={"prompt": ["Once upon", "The end"]})
    _must(sorted(choice.index for choice in answer.choices) == [0, 1], f"{len(answer.choices)} choices of 2 prompts")


def _text_logprobs(engine: _Engine) -> None:
    found = engine.text(more={"logprobs": 2}).choices[0].logprobs
    _must(found is not None and len(found.tokens) == len(found.token_logprobs) > 0, "no log-probabilities")
    _must(all(value <= 0 for value in found.token_logprobs), "a log-probability above 0")


def _unknown_model(engine: _Engine) -> None:
    _refused(404, lambda: engine.chat(more={"model": "no-such-model"}))


def _wrong_values(engine: _Engine) -> None:
    wrong: list[Json] = [{"messages": []}, {"max_tokens": -1}, {"temperature": "hot"}, {"n": 0}, {"messages": "hello"}]
    for more in wrong:
        _refused((400, 422), lambda more=more: engine.chat(more=more))  # type: ignore[misc]


def _leaving(engine: _Engine) -> None:
    for _ in range(3):
        stream = engine.chat(more={"stream": True, "max_tokens": 64})
        next(iter(stream))
        stream.close()
    _chat(engine)


def _refused(status: int | tuple[int, ...], call: Callable[[], Any]) -> None:
    """Raises: _Wrong where the call is not refused with this status and a message."""
    from openai import APIStatusError

    try:
        call()
    except APIStatusError as error:
        wanted = (status,) if isinstance(status, int) else status
        _must(error.status_code in wanted, f"status {error.status_code}, not {status}")
        _must(error.message, "no message")
        return
    raise _Wrong(f"answered, instead of {status}")


CHECKS: dict[str, tuple[Callable[[_Engine], None], Literal["needed", "may be refused"]]] = {
    "models are listed": (_models, "needed"),
    "a chat is answered": (_chat, "needed"),
    "temperature 0 repeats itself": (_greedy, "needed"),
    "a stream says the same": (_stream, "needed"),
    "a stream counts its tokens": (_stream_usage, "needed"),
    "a stream ends with [DONE]": (_raw_stream, "needed"),
    "n": (_several, "may be refused"),
    "n, streamed": (_several_streamed, "may be refused"),
    "seed": (_seed, "needed"),
    "stop": (_stop, "needed"),
    "logprobs": (_logprobs, "may be refused"),
    "response_format json_object": (_json, "may be refused"),
    "tools": (_tools, "may be refused"),
    "a tool's result": (_tool_result, "may be refused"),
    "a system message is read": (_system, "may be refused"),
    "content in parts": (_parts, "needed"),
    "max_completion_tokens": (_max_completion, "needed"),
    "text completions": (_text, "needed"),
    "several texts": (_texts, "may be refused"),
    "logprobs of texts": (_text_logprobs, "may be refused"),
    "an unknown model is a 404": (_unknown_model, "needed"),
    "wrong values are refused": (_wrong_values, "needed"),
    "clients may leave": (_leaving, "needed"),
}
"""Name of a check: how it is done, and whether an engine may refuse it by name."""


def run_conformance(
    url: str, *, token: str | None, model: str, only: Sequence[str] = (), tolerate: Sequence[str] = ()
) -> list[Check]:
    """Every check of `CHECKS` (or `only` some) against the server at `url` (without `/v1`), in order.

    `tolerate` names checks in which this engine is known to differ: they are done, and come out as "not offered".

    Raises: UsageError where the client is not installed, or nobody answers there.
    """
    try:
        import openai
    except ImportError:
        raise UsageError("the conformance checks need openai", "pip install 'lora_tune[serve]'") from None
    with openai.OpenAI(base_url=f"{url.rstrip('/')}/v1", api_key=token or "none", max_retries=0, timeout=120) as client:
        engine = _Engine(client, model)
        found = []
        for name, (check, need) in CHECKS.items():
            if only and name not in only:
                continue
            allowed = need == "may be refused" or name in tolerate
            try:
                check(engine)
                found.append(Check(name, "passed"))
            except openai.APIConnectionError as error:
                raise UsageError(f"{url}: no answer ({error})", "start the server first") from None
            except openai.BadRequestError as error:
                said = " ".join(str(error.message).split())[:200]
                found.append(Check(name, "not offered" if allowed else "failed", said))
            except (openai.APIError, _Wrong, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                said = " ".join(f"{error}".split())[:200] or type(error).__name__
                found.append(Check(name, "not offered" if name in tolerate else "failed", said))
        return found


app = typer.Typer(help="Does an endpoint speak OpenAI's API?", add_completion=False)


@app.command("conformance")
def command(
    url: Annotated[str, typer.Argument(help="Where the server is, without /v1.")],
    model: Annotated[str, typer.Option(help="The model to ask.")],
    token: Annotated[str | None, typer.Option(help=f"Better in {TOKEN_VARIABLE}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a running server with the official client; exit 1 where a check fails."""
    checks = run_conformance(url, token=token or os.environ.get(TOKEN_VARIABLE), model=model)
    failed = [check for check in checks if check.outcome == "failed"]
    if as_json:
        rows = [{"name": check.name, "outcome": check.outcome, "found": check.found} for check in checks]
        print_json({"exit_code": 1 if failed else 0, "checks": rows})
    else:
        print_table("", ("check", "outcome", "found"), [(c.name, c.outcome, c.found) for c in checks], left=(0, 1, 2))
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(checks)} checks failed: {', '.join(c.name for c in failed)}")


if __name__ == "__main__":
    sys.exit(run_app(app, name="python -m lora_tune.serving.conformance"))

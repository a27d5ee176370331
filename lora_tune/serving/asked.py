"""What a client asks for: the bodies of OpenAI's API, checked field by field, everything else refused by name.

Nothing is ignored in silence: a field that this server does not have is refused, unless its value is the one that asks
for nothing (`frequency_penalty: 0`). Templates are never taken from a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_tune.data.conversation import Message
from lora_tune.data.messages import message as read_message
from lora_tune.data.messages import tools as read_tools
from lora_tune.data.rows import BadRow
from lora_tune.serving.backend import Response, Sampling
from lora_tune.serving.refusals import Refusal, bad, without_paths
from lora_tune.serving.settings import TOOL_NAME, Caps

_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "logit_bias": ({},), "min_p": (0,),
    "parallel_tool_calls": (True,), "store": (False,), "metadata": ({},), "service_tier": ("auto", "default"),
    "modalities": (["text"],), "best_of": (1,), "echo": (False,), "suffix": ("",), "ignore_eos": (False,),
    "functions": ([],), "function_call": ("none", "auto"), "prediction": (), "audio": (), "reasoning_effort": (),
    "verbosity": (), "web_search_options": (), "chat_template": (), "chat_template_kwargs": ({},), "lora_path": (),
    "prompt_embeds": (), "guided_json": (), "guided_regex": (), "guided_choice": (), "safety_identifier": (),
    "prompt_cache_key": (), "continue_final_message": (False,), "add_generation_prompt": (True,),
    "skip_special_tokens": (True,), "min_tokens": (0,), "length_penalty": (1,), "use_beam_search": (False,),
}  # fmt: skip
"""Fields that are not supported here, with the values that ask for nothing; null always does."""

_WHY = {
    "chat_template": "templates are never taken from a request",
    "chat_template_kwargs": "templates are never changed by a request",
    "functions": "use tools",
    "function_call": "use tool_choice",
}
_MESSAGE_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
_MESSAGE_NO_EFFECT: tuple[Any, ...] = (None, [], {})
_Parsed = TypeVar("_Parsed", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class _StreamOptions(_Strict):
    include_usage: bool = False


class _Common(_Strict):
    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Any = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None


class _Chat(_Common):
    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None


class _Completion(_Common):
    prompt: Any
    logprobs: Annotated[int, Field(ge=0)] | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """How the answers are made and sent. `max_tokens` None: as many as the server and the context allow."""

    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    logprobs: int | None
    response: Response
    answers: int
    stream: Literal["whole", "stream"]
    usage: Literal["usage", "no usage"]
    """Whether a stream ends with a chunk of token counts."""

    def sampling(self, number: int, *, room: int) -> Sampling:
        """The sampling of the `number`-th answer, of at most `room` tokens; with a seed each answer has its own."""
        return Sampling(
            max_new_tokens=room if self.max_tokens is None else self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=None if self.seed is None else (self.seed + number) % 2**63,
            stop=self.stop,
            logprobs=self.logprobs,
            response=self.response,
        )


@dataclass(frozen=True, slots=True)
class ChatAsked:
    """A checked body of `/v1/chat/completions`. `choice` is `none`, `auto`, `required`, or the name of one tool."""

    model: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    choice: str
    forced: str | None
    wanted: Wanted


@dataclass(frozen=True, slots=True)
class CompletionAsked:
    """A checked body of `/v1/completions`: prompts as text, or as token ids."""

    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    wanted: Wanted


def read_chat(content: Mapping[str, Any], *, caps: Caps, temperature: float) -> ChatAsked:
    """Check the body of a chat request. Raises: Refusal naming the field."""
    body = _validated(_Chat, content)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise bad("max_tokens", "says something else than max_completion_tokens; leave one out")
    if body.top_logprobs is not None and not body.logprobs:
        raise bad("top_logprobs", "needs logprobs: true")
    if body.top_logprobs is not None and body.top_logprobs > caps.top_logprobs:
        raise bad("top_logprobs", f"at most {caps.top_logprobs}, got {body.top_logprobs}")
    tools = _tools(body.tools, caps)
    choice, forced = _tool_choice(body.tool_choice, tools)
    wanted = _wanted(
        body,
        caps=caps,
        temperature=temperature,
        max_tokens=("max_completion_tokens", body.max_completion_tokens)
        if body.max_completion_tokens
        else ("max_tokens", body.max_tokens),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        response=_response(body.response_format),
    )
    if tools and choice != "none" and wanted.response == "json_object":
        raise bad("response_format", "json_object and tools exclude each other; set tool_choice: none")
    return ChatAsked(body.model, _messages(body.messages, caps), tools, choice, forced, wanted)


def read_completion(content: Mapping[str, Any], *, caps: Caps, temperature: float) -> CompletionAsked:
    """Check the body of a text completion request. Raises: Refusal naming the field."""
    body = _validated(_Completion, content)
    if body.logprobs is not None and body.logprobs > caps.top_logprobs:
        raise bad("logprobs", f"at most {caps.top_logprobs}, got {body.logprobs}")
    wanted = _wanted(
        body,
        caps=caps,
        temperature=temperature,
        max_tokens=("max_tokens", 16 if body.max_tokens is None else body.max_tokens),  # OpenAI's own default
        logprobs=body.logprobs,
        response="text",
    )
    return CompletionAsked(body.model, _prompts(body.prompt, caps), wanted)


class _Load(_Strict):
    lora_name: str
    lora_path: Annotated[str, Field(min_length=1, max_length=1024)]
    load_inplace: bool | None = None


class _Unload(_Strict):
    lora_name: str
    lora_int_id: int | None = None


def read_load(content: Mapping[str, Any]) -> tuple[str, str]:
    """Name and folder of `/v1/load_lora_adapter`. Raises: Refusal."""
    body = _validated(_Load, content)
    if body.load_inplace:
        raise bad("load_inplace", "not supported; unload the adapter, then load it")
    return body.lora_name, body.lora_path


def read_unload(content: Mapping[str, Any]) -> str:
    """The name in `/v1/unload_lora_adapter`. Raises: Refusal."""
    return _validated(_Unload, content).lora_name


def _validated(kind: type[_Parsed], content: Mapping[str, Any]) -> _Parsed:
    """The body as its model. Raises: Refusal with the first field that is wrong."""
    kept = {}
    for name, value in content.items():
        if name in kind.model_fields:
            kept[name] = value
        elif name not in _NO_EFFECT:
            raise bad(name[:80], "unknown field; leave it out", code="unknown_parameter")
        elif value is not None and not any(_same(value, no_effect) for no_effect in _NO_EFFECT[name]):
            why = _WHY.get(name, "leave it out")
            raise bad(name, f"this server does not support it; {why}", code="unsupported_parameter")
    try:
        return kind.model_validate(kept)
    except ValidationError as error:
        issue = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in issue["loc"])[:80]
    if issue["type"] == "extra_forbidden":
        raise bad(param, "unknown field; leave it out", code="unknown_parameter")
    if issue["type"] == "missing":
        raise bad(param, "is missing", code="missing_required_parameter")
    said = issue["msg"][:1].lower() + issue["msg"][1:]
    raise bad(param, f"{said}, got {_short(issue.get('input'))}")


def _same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _short(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", type(None): "null", bool: str(value).lower()}
    text = kinds.get(type(value), f"{value!r}")
    return text if len(text) <= 60 else text[:59] + "…"


def _wanted(
    body: _Common,
    *,
    caps: Caps,
    temperature: float,
    max_tokens: tuple[str, int | None],
    logprobs: int | None,
    response: Response,
) -> Wanted:
    field, most = max_tokens
    if most is not None and most > caps.max_tokens:
        raise bad(field, f"at most {caps.max_tokens:,}, got {_short(most)}")
    if body.n is not None and body.n > caps.answers:
        raise bad("n", f"at most {caps.answers}, got {_short(body.n)}")
    if body.stream_options is not None and not body.stream:
        raise bad("stream_options", "needs stream: true")
    return Wanted(
        max_tokens=most,
        temperature=temperature if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        seed=body.seed,
        stop=_stops(body.stop, caps),
        logprobs=logprobs,
        response=response,
        answers=body.n or 1,
        stream="stream" if body.stream else "whole",
        usage="usage" if body.stream_options is not None and body.stream_options.include_usage else "no usage",
    )


def _stops(given: Any, caps: Caps) -> tuple[str, ...]:
    stops = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops):
        raise bad("stop", f"must be text or a list of texts, got {_short(given)}")
    if len(stops) > caps.stops:
        raise bad("stop", f"at most {caps.stops} texts, got {len(stops):,}")
    if any(not one or len(one) > caps.stop_characters for one in stops):
        raise bad("stop", f"each must have 1 to {caps.stop_characters} characters")
    return tuple(dict.fromkeys(stops))


def _response(given: Mapping[str, Any] | None) -> Response:
    kind = (given or {"type": "text"}).get("type")
    if kind == "json_schema":
        reason = "json_schema is not supported; use json_object and say in a message what it should hold"
        raise bad("response_format", reason, code="unsupported_parameter")
    if kind not in ("text", "json_object") or len(given or {}) > 1:
        raise bad("response_format", 'must be {"type": "text"} or {"type": "json_object"}')
    return "json_object" if kind == "json_object" else "text"


def _messages(given: Sequence[dict[str, Any]], caps: Caps) -> tuple[Message, ...]:
    if not given:
        raise bad("messages", "is empty; give at least one")
    if len(given) > caps.messages:
        raise bad("messages", f"at most {caps.messages}, got {len(given):,}")
    return tuple(_message(turn, number) for number, turn in enumerate(given))


def _message(turn: Mapping[str, Any], number: int) -> Message:
    where = f"messages.{number}"
    kept = {}
    for name, value in turn.items():
        if name in _MESSAGE_FIELDS:
            kept[name] = value
        elif not any(_same(value, no_effect) for no_effect in _MESSAGE_NO_EFFECT):
            raise bad(f"{where}.{name}"[:80], "unknown field; leave it out", code="unknown_parameter")
    if kept.get("role") == "developer":
        kept["role"] = "system"  # OpenAI's newer word for it
    if kept.get("tool_calls") in (None, []):
        kept.pop("tool_calls", None)
    if not isinstance(kept.get("tool_call_id"), str | None):
        raise bad(f"{where}.tool_call_id", f"must be text, got {_short(kept['tool_call_id'])}")
    try:
        return read_message(kept, number + 1)
    except BadRow as error:
        reason = without_paths(f"{error.reason}; {error.fix}" if error.fix else error.reason)
        raise Refusal(400, f"messages: {reason}", param=where) from None


def _tools(given: Sequence[dict[str, Any]] | None, caps: Caps) -> tuple[dict[str, Any], ...]:
    if given is not None and len(given) > caps.tools:
        raise bad("tools", f"at most {caps.tools}, got {len(given):,}")
    for number, tool in enumerate(given or ()):
        if tool.get("type", "function") != "function":
            raise bad(f"tools.{number}.type", f"must be function, got {_short(tool['type'])}")
    try:
        tools = read_tools(list(given or ()))
    except BadRow as error:
        raise bad("tools", error.reason) from None
    names = [tool["function"]["name"] for tool in tools]
    wrong = next((name for name in names if TOOL_NAME.fullmatch(name) is None), None)
    if wrong is not None:
        raise bad("tools", f"names have 1 to 64 letters, digits, _, - and ., got {_short(wrong)}")
    if len(set(names)) < len(names):
        raise bad("tools", "two of them have the same name")
    return tools


def _tool_choice(given: Any, tools: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """`none`, `auto`, `required` or `named`, and which one is named. Raises: Refusal."""
    if given is None:
        return ("auto" if tools else "none"), None
    if given in ("none", "auto"):
        return (given if tools else "none"), None
    if not tools:
        raise bad("tool_choice", "needs tools")
    if given == "required":
        return "required", None
    function = given.get("function") if isinstance(given, dict) and given.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if name not in [tool["function"]["name"] for tool in tools]:
        raise bad("tool_choice", "must be none, auto, required, or name a function of tools")
    return "named", str(name)


def _prompts(given: Any, caps: Caps) -> tuple[str | tuple[int, ...], ...]:
    """One prompt or several, each text or token ids. Raises: Refusal."""
    prompts = given if isinstance(given, list) and given and not _is_ids(given) else [given]
    if len(prompts) > caps.prompts:
        raise bad("prompt", f"at most {caps.prompts}, got {len(prompts):,}")
    if not all(isinstance(one, str) or _is_ids(one) for one in prompts):
        raise bad("prompt", f"must be text, token ids, or a list of either, got {_short(given)}")
    if any(not one for one in prompts):
        raise bad("prompt", "is empty")
    return tuple(one if isinstance(one, str) else tuple(one) for one in prompts)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int and one >= 0 for one in value)

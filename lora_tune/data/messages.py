"""From the message dictionaries of a row to checked `Message`s: roles, content, tool calls, weights, order of turns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lora_tune.data.conversation import ROLES, Message, Role
from lora_tune.data.rows import BadRow, did_you_mean, kind_of

SHAREGPT_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
_CALL_ROLES = ("function_call", "tool_call")
_ROLE_HINTS = {
    "developer": "say `system`",
    "model": "say `assistant`",
    "bot": "say `assistant`",
    "function": "say `tool`",
    "ipython": "say `tool`",
    "human": "say `user`, or name `format: sharegpt`",
    "gpt": "say `assistant`, or name `format: sharegpt`",
}
_MEDIA = ("image", "image_url", "video", "audio", "input_audio", "file")


def message(turn: Any, number: int) -> Message:
    """One turn of the `messages` format, the `number`-th of its row (from 1). Raises: BadRow."""
    where = f"turn {number}"
    if not isinstance(turn, dict):
        raise BadRow("wrong shape", f"{where} must be an object with role and content, got {kind_of(turn)}")
    if "role" not in turn:
        if "from" in turn and "value" in turn:
            raise BadRow("wrong shape", f"{where} has the keys from/value of ShareGPT", fix="say `format: sharegpt`")
        raise BadRow("wrong shape", f"{where}: role is missing", fix=_near(turn, "role"))
    role = known_role(turn["role"], where)
    calls = _calls_of(turn, where)
    content, reasoning = turn.get("content"), turn.get("reasoning_content") or turn.get("thinking")
    if isinstance(content, list):
        content, said, more = _joined(content, where)
        calls, reasoning = calls + more, reasoning or said
    if content is None and calls:
        content = ""
    if content is None and "content" not in turn:
        raise BadRow("wrong shape", f"{where}: content is missing", fix=_near(turn, "content"))
    if not isinstance(content, str):
        raise BadRow("wrong shape", f"{where}: content {must_be_text(content)}")
    for name, value in (("reasoning_content", reasoning), ("name", turn.get("name"))):
        if not isinstance(value, str | None):
            raise BadRow("wrong shape", f"{where}: {name} {must_be_text(value)}")
    if calls and role != "assistant":
        raise BadRow("wrong shape", f"{where}: only the assistant calls tools, got role `{role}`")
    return Message(
        role=role,
        content=content,
        tool_calls=calls,
        weight=_weight(turn, where) if role == "assistant" else 1,
        name=turn.get("name"),
        tool_call_id=turn.get("tool_call_id"),
        reasoning=reasoning,
    )


def _near(turn: Mapping[str, Any], name: str) -> str:
    for other in turn:
        if did_you_mean(other, (name,)):
            return f"did you mean `{name}` by `{other}`?"
    return f"every turn needs a {name}"


def must_be_text(value: Any) -> str:
    """The rest of a sentence about a value that is no text: "is null", "must be text, got the number 5"."""
    return "is null" if value is None else f"must be text, got {kind_of(value)}"


def known_role(role: Any, where: str) -> Role:
    """`role` if it is one of the four. Raises: BadRow with the nearest name."""
    if role in ROLES:
        return role
    if not isinstance(role, str):
        raise BadRow("unmapped role", f"{where}: role {must_be_text(role)}", fix=f"use one of {', '.join(ROLES)}")
    hint = did_you_mean(role, ROLES) or _ROLE_HINTS.get(role.lower(), "")
    raise BadRow("unmapped role", f"{where}: unknown role `{role}`", fix=hint or f"use one of {', '.join(ROLES)}")


def _weight(turn: Mapping[str, Any], where: str) -> int:
    weight = turn.get("weight", turn.get("loss_weight"))
    if weight is None:
        return 1
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadRow("wrong shape", f"{where}: weight must be 0 or 1, got {weight!r}")
    return int(weight)


def _joined(parts: list[Any], where: str) -> tuple[str, str | None, tuple[dict[str, Any], ...]]:
    """Text, reasoning and tool calls of a list of typed parts (text under `text` or `value`). Raises: BadRow."""
    text: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        value = part.get("text", part.get("value")) if isinstance(part, dict) else part
        if kind in _MEDIA:
            raise BadRow("not text", f"{where}: a part of type `{kind}`; only text can be trained", fix="drop the row")
        if kind == "tool_call":
            calls.extend(tool_calls(value, where))
        elif kind in ("text", "reasoning", "thinking") and isinstance(value or part.get("thinking"), str):
            (text if kind == "text" else reasoning).append(value or part.get("thinking"))
        else:
            raise BadRow("wrong shape", f"{where}: content must be text or text parts, got a part {_short(part)}")
    return "".join(text), "".join(reasoning) or None, tuple(calls)


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 60 else shown[:57] + "…"


def _calls_of(turn: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    given = turn.get("tool_calls")
    if given is None and turn.get("function_call") is not None:
        given = [turn["function_call"]]
    return () if given is None else tool_calls(given, where)


def tool_calls(given: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Tool calls in OpenAI's form with arguments as an object, from it or from `{name, arguments}`, JSON text allowed.

    Raises: BadRow.
    """
    given = _unpacked(given, f"{where}: a tool call")
    calls = []
    for call in given if isinstance(given, list) else [given]:
        function = _unpacked(call.get("function", call) if isinstance(call, dict) else call, f"{where}: a tool call")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRow("bad tool call", f"{where}: a tool call needs a name, got {_short(call)}")
        arguments = function.get("arguments", function.get("parameters"))
        arguments = (
            {} if arguments in (None, "") else _unpacked(arguments, f"{where}: arguments of `{function['name']}`")
        )
        if not isinstance(arguments, dict):
            reason = f"{where}: arguments of `{function['name']}` must be an object, got {kind_of(arguments)}"
            raise BadRow("bad tool call", reason)
        made: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if isinstance(call, dict) and isinstance(call.get("id"), str):
            made["id"] = call["id"]
        calls.append(made)
    return tuple(calls)


def tools(given: Any) -> tuple[dict[str, Any], ...]:
    """A row's tools in OpenAI's form, from a list (bare functions are wrapped) or JSON text. Raises: BadRow."""
    if given is None or given == "":
        return ()
    given = _unpacked(given, "tools")
    if not isinstance(given, list):
        raise BadRow("bad tools", f"tools must be a list, got {kind_of(given)}")
    made = []
    for number, tool in enumerate(given, 1):
        tool = _unpacked(tool, f"tool {number}")
        while isinstance(tool, dict) and isinstance(tool.get("function"), dict) and "function" in tool["function"]:
            tool = tool["function"]  # wrapped twice, as some published data sets have it
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("bad tools", f"tool {number} needs a name, got {_short(tool)}")
        made.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(made)


def _unpacked(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow("bad tool call", f"{where} must be JSON, got {_short(value)}") from None


def sharegpt_message(turn: Any, number: int) -> Message:
    """One turn of the `sharegpt` format: from/value, or role/content with ShareGPT's role names too. Raises: BadRow."""
    where = f"turn {number}"
    if not isinstance(turn, dict):
        raise BadRow("wrong shape", f"{where} must be an object with from and value, got {kind_of(turn)}")
    keys = ("role", "content") if "role" in turn and "from" not in turn else ("from", "value")
    if keys[0] not in turn:
        raise BadRow("wrong shape", f"{where}: {keys[0]} is missing", fix=_near(turn, keys[0]))
    role = turn[keys[0]]
    if role not in SHAREGPT_ROLES or not isinstance(role, str):
        known = tuple(SHAREGPT_ROLES)
        shown = f"unknown role `{role}`" if isinstance(role, str) else f"{keys[0]} {must_be_text(role)}"
        fix = did_you_mean(str(role), known) or f"use one of {', '.join(known)}"
        raise BadRow("unmapped role", f"{where}: {shown}", fix=fix)
    if keys[1] not in turn:
        raise BadRow("wrong shape", f"{where}: {keys[1]} is missing", fix=_near(turn, keys[1]))
    if role in _CALL_ROLES:
        calls = tool_calls(turn[keys[1]], where)
        return Message("assistant", "", tool_calls=calls, weight=_weight(turn, where))
    return message({**turn, "role": SHAREGPT_ROLES[role], "content": turn[keys[1]]}, number)


def check_turns(turns: Sequence[Message]) -> None:
    """Refuse what teaches nothing: no assistant turn, none that counts, an empty or blank answer. Raises: BadRow."""
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        raise BadRow("no answer", "nothing to train on: no assistant turn", fix="add the answer or drop the row")
    if not any(turn.weight for turn in answers):
        raise BadRow("no answer", "nothing to train on: every assistant turn has weight 0", fix="drop the row")
    for number, turn in enumerate(turns, 1):
        if turn.role == "assistant" and turn.weight and not turn.tool_calls and not turn.content.strip():
            what = "blank" if turn.content else "empty"
            raise BadRow("empty answer", f"turn {number}: {what} answer", fix="write the answer or drop the row")


def order_notes(turns: Sequence[Message]) -> tuple[str, ...]:
    """What is odd in the order of the turns, in words; nothing where user and assistant take turns to the end."""
    notes = []
    roles = [turn.role for turn in turns]
    talk = [role for role in roles if role != "system"]
    if talk and talk[0] == "assistant":
        notes.append("starts with the assistant")
    for first, second in pairwise(roles):
        if second == "system":
            notes.append("system turn in the middle")
        elif first == second and first in ("user", "assistant"):
            notes.append(f"two {first} turns in a row")
    for before, turn in zip((None, *turns), turns, strict=False):
        called = before is not None and (before.role == "tool" or before.tool_calls)
        if turn.role == "tool" and not called:
            notes.append("tool result without a tool call")
    if any(turn.role == "user" and not turn.content.strip() for turn in turns):
        notes.append("empty user turn")
    if roles and roles[-1] != "assistant":
        notes.append(f"the last {roles[-1]} turn has no answer")
    return tuple(dict.fromkeys(notes))

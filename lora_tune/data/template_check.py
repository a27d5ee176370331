"""Is a chat template usable? Rendered once in a limited child process, judged, and refused with one reason if not."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_tune.errors import CheckFailed

MAX_TEMPLATE_BYTES = 1 << 20  # the longest template that is in use has about 20 kB
_CHILD_WALL_S = 20  # the CPU limit inside (1 s) comes first; this one holds where the system has no such limit
_SYSTEM, _USER, _ANSWER, _USER_2, _ANSWER_2 = "Zqsystem", "Zq1user", "Zq1answer", "Zq2user", "Zq2answer"
_TOOL, _ARGUMENT, _RESULT, _REASON = "zq_tool", "Zqargument", "Zqresult", "Zqreason"
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": _TOOL,
            "description": "Zqdescription",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "string", "description": "x"}},
                "required": ["x"],
            },
        },
    }
]
_ABOUT_TOOLS = frozenset({"tools", "tool_calls", "tool"})
_NEVER_WORDS = re.compile(r"</?\w+>|\s+")


@dataclass(frozen=True, slots=True)
class TemplateProbe:
    """What a few renders of a usable template show about it.

    `lead` is what an answer's turn holds before its words, counted from where it agrees with the generation prompt;
    `prompt_extra` is what the generation prompt holds from there on ("" for most templates: the prompt is a prefix of
    the turn). `last_tail` follows the words of an answer at the end of a conversation, `next_tail` stands between an
    answer and the words of the user turn after it (None where the template refuses a second exchange). `call_tail`
    follows the arguments of a tool call at the end of a conversation. `drops` holds what the template leaves out
    without a word: "system", "tools" (definitions), "tool_calls", "tool" (results), "reasoning". `tools_error` is why
    it refuses tools, "" if it does not. `content_as_parts` and `arguments_as_text`: it reads contents only as a list of
    parts (vision models), and the arguments of tool calls only as JSON text. `notices`: worth a user's attention, no
    error.
    """

    lead: str
    prompt_extra: str
    last_tail: str
    next_tail: str | None
    call_tail: str
    drops: frozenset[str]
    tools_error: str
    content_as_parts: bool
    arguments_as_text: bool
    notices: tuple[str, ...]

    def with_tools_of(self, other: TemplateProbe) -> TemplateProbe:
        """This probe, with what another template does with tools (tokenizers may have one for them)."""
        drops = (self.drops - _ABOUT_TOOLS) | (other.drops & _ABOUT_TOOLS)
        return replace(
            self,
            drops=drops,
            call_tail=other.call_tail,
            tools_error=other.tools_error,
            arguments_as_text=other.arguments_as_text,
        )


class _Unusable(Exception):
    """Why a template cannot be used, in the words that stand in the message."""


def probe_template(text: str, *, variables: Mapping[str, Any], where: str) -> TemplateProbe:
    """Render a template with unique words for contents, in a child process with limits, and say what it does.

    `variables` are the tokenizer's special tokens (`bos_token`, `eos_token` …), as transformers hands them over;
    `where` names the template in messages. Takes about 0.2 s.

    Raises:
        CheckFailed: the template drops words, fails, writes too much, does not end or adds nothing.
    """
    try:
        if len(text.encode("utf-8", "surrogatepass")) > MAX_TEMPLATE_BYTES:
            raise _Unusable(f"it is longer than {MAX_TEMPLATE_BYTES:,} bytes")
        cases = [_cases(parts) for parts in (False, True)]
        renders = _render_in_child(text, variables, [case for both in cases for case in both.values()])
        answers = iter(renders)
        named = [{name: next(answers) for name in both} for both in cases]
        try:
            return _judge(named[0], content_as_parts=False)
        except _Unusable as reason:
            try:
                return _judge(named[1], content_as_parts=True)
            except _Unusable:
                raise reason from None
    except _Unusable as reason:
        raise CheckFailed(
            f"{where}: the chat template is refused: {reason}", "give another one as base.chat_template"
        ) from None


def _cases(parts: bool) -> dict[str, dict[str, Any]]:
    """The conversations that the child renders, by name."""

    def turn(role: str, content: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": content}] if parts else content}

    def call(arguments: Any) -> dict[str, Any]:
        function = {"name": _TOOL, "arguments": arguments}
        return {**turn("assistant", ""), "tool_calls": [{"type": "function", "id": "zqcall001", "function": function}]}

    def case(*messages: dict[str, Any], prompt: bool = False, tools: bool = False) -> dict[str, Any]:
        return {"messages": list(messages), "tools": _TOOLS if tools else None, "add_generation_prompt": prompt}

    user, answer = turn("user", _USER), turn("assistant", _ANSWER)
    cases = {
        "prompt": case(user, prompt=True),
        "turn": case(user, answer),
        "next": case(user, answer, turn("user", _USER_2), prompt=True),
        "two": case(user, answer, turn("user", _USER_2), turn("assistant", _ANSWER_2)),
        "system": case(turn("system", _SYSTEM), user, answer),
        "reasoning": case(user, {**answer, "reasoning_content": _REASON, "thinking": _REASON}),
        "tools": case(user, prompt=True, tools=True),
    }
    for name, arguments in (("object", {"x": _ARGUMENT}), ("text", json.dumps({"x": _ARGUMENT}))):
        result = {**turn("tool", _RESULT), "tool_call_id": "zqcall001", "name": _TOOL}
        cases[f"call_{name}"] = case(user, call(arguments), tools=True)
        cases[f"result_{name}"] = case(user, call(arguments), result, answer, tools=True)
    return cases


def _render_in_child(
    text: str, variables: Mapping[str, Any], renders: Sequence[dict[str, Any]]
) -> list[dict[str, str]]:
    """`{"text"}` or `{"error"}` for each case, from `template_child.py` in a process of its own."""
    request = json.dumps({"text": text, "variables": dict(variables), "renders": list(renders)})
    command = [sys.executable, "-P", str(Path(__file__).with_name("template_child.py"))]
    try:
        done = subprocess.run(command, input=request.encode(), capture_output=True, timeout=_CHILD_WALL_S, check=False)
    except subprocess.TimeoutExpired:
        raise _Unusable(f"it does not end within {_CHILD_WALL_S} s") from None
    if done.returncode == -getattr(signal, "SIGXCPU", 0):
        raise _Unusable("it does not end within 1 s of CPU time")
    if done.returncode < 0:
        raise _Unusable(f"it needs too much time, memory or stack (signal {-done.returncode})")
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        last_line = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise _Unusable(f"rendering it ended the process (exit {done.returncode}: {last_line[:200]})") from None
    if "refused" in answer:
        raise _Unusable(answer["refused"])
    return list(answer["renders"])


def common_prefix(left: str, right: str) -> str:
    """The characters with which both texts begin."""
    length = next((i for i, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), None)
    return left[: min(len(left), len(right)) if length is None else length]


def _judge(renders: Mapping[str, Mapping[str, str]], *, content_as_parts: bool) -> TemplateProbe:
    """The probe's findings, or `_Unusable` with the first reason found."""
    prompt = _text(renders["prompt"], _USER)
    turn = _text(renders["turn"], _USER, _ANSWER)
    if content_as_parts and re.search(r"['\"]type['\"]: ", turn):
        raise _Unusable("it writes the parts of a message as Python or JSON")
    if not turn.replace(_USER, "").replace(_ANSWER, "").strip():
        raise _Unusable("it adds nothing to the words, so that nobody can tell the turns apart")
    next_tail = _next_tail(renders)
    start = turn.rindex(_ANSWER)
    agree = min(len(common_prefix(prompt, turn)), start)
    lead, extra = turn[agree:start], prompt[agree:]
    if extra and _NEVER_WORDS.sub("", extra) != _NEVER_WORDS.sub("", lead):
        raise _Unusable(f"its generation prompt ends in {extra!r} where the turn of an answer begins with {lead!r}")
    call, arguments_as_text = _call(renders)
    return TemplateProbe(
        lead=lead,
        prompt_extra=extra,
        last_tail=turn[start + len(_ANSWER) :],
        next_tail=next_tail,
        call_tail=call.rpartition(_ARGUMENT)[2] if _ARGUMENT in call else "",
        drops=_drops(renders, arguments_as_text),
        tools_error=renders["result_text" if arguments_as_text else "result_object"].get("error", ""),
        content_as_parts=content_as_parts,
        arguments_as_text=arguments_as_text,
        notices=_notices(turn, prompt, lead),
    )


def _text(render: Mapping[str, str], *words: str) -> str:
    """The text of a render in which all words stand in order; `_Unusable` if not."""
    if "error" in render:
        raise _Unusable(f"it fails: {render['error']}")
    position = 0
    for word in words:
        found = render["text"].find(word, position)
        if found < 0:
            who = "user" if "user" in word else "assistant"
            raise _Unusable(f"the {who}'s words are not in the render, or not in order")
        position = found + len(word)
    return render["text"]


def _next_tail(renders: Mapping[str, Mapping[str, str]]) -> str | None:
    """What stands between an answer and the next user's words, or None where only one exchange is allowed."""
    if "error" in renders["two"] or "error" in renders["next"]:
        return None
    _text(renders["two"], _USER, _ANSWER, _USER_2, _ANSWER_2)
    text = _text(renders["next"], _USER, _ANSWER, _USER_2)
    return text[text.index(_ANSWER) + len(_ANSWER) : text.index(_USER_2)]


def _call(renders: Mapping[str, Mapping[str, str]]) -> tuple[str, bool]:
    """The render of a tool call at the end, and whether the template wants the arguments as JSON text."""
    as_object, as_text = renders["call_object"].get("text", ""), renders["call_text"].get("text", "")
    if _ARGUMENT not in as_object and _ARGUMENT in as_text:
        return as_text, True
    return as_object, False


def _drops(renders: Mapping[str, Mapping[str, str]], arguments_as_text: bool) -> frozenset[str]:
    """What the template leaves out without failing."""
    result = renders["result_text" if arguments_as_text else "result_object"]
    looked_for = (
        ("system", renders["system"], (_SYSTEM,)),
        ("reasoning", renders["reasoning"], (_REASON,)),
        ("tools", renders["tools"], (_TOOL,)),
        ("tool_calls", result, (_TOOL, _ARGUMENT)),
        ("tool", result, (_RESULT,)),
    )
    return frozenset(
        name
        for name, render, words in looked_for
        if "text" in render and any(word not in render["text"] for word in words)
    )


def _notices(turn: str, prompt: str, lead: str) -> tuple[str, ...]:
    """Odd but usable: words of the template's own, a missing generation prompt."""
    notices = []
    before = turn[: turn.index(_USER)]
    if len(re.findall(r"\w+", re.sub(r"<[^<>]*>|\[\w+\]", "", before))) > 3:
        notices.append(f"the chat template adds words that stand in no message: {before[:200]!r}")
    header = re.sub(r"<[^<>]*>", "", lead).strip()
    if header and turn.startswith(prompt):
        notices.append(f"the chat template has no generation prompt: answers are trained with their header {lead!r}")
    return tuple(notices)

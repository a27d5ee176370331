"""One conversation to drafts of rows: rendered text, and which characters of it the assistant wrote.

The words of assistant turn i begin where the generation prompt ends, which is what serving feeds the model
(`render(messages[:i], add_generation_prompt=True)`), and end with the token or text that closes an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from lora_tune.data.conversation import ROLES, Conversation
from lora_tune.data.segment_encoder import Marks, Segment, SegmentEncoder
from lora_tune.data.template_check import TemplateProbe
from lora_tune.data.turn_end import TurnEnd

LossOn = Literal["assistant", "last_assistant", "all"]
_DROPPED = {
    "system": "the system turn",
    "tools": "the tools",
    "tool_calls": "tool calls",
    "tool": "tool results",
    "reasoning": "the reasoning of answers",
}
_OPEN_TAG = re.compile(r"<(\w+)>\s*\Z")
_LEADING_BLOCK = re.compile(r"(\s*<(\w+)>)(.*?)(</\2>)(.*)", re.DOTALL)


class CannotRender(Exception):
    """Why one conversation has no rows."""


@dataclass(slots=True)
class Draft:
    """A row before encoding: its text, the trained characters (start, end), the trained ids added at its end.

    `whole`: all characters but those of `spans` are trained. `marks`: control tokens in somebody's words stand between
    marks (segment_encoder.py). `lone_text`: no chat, the tokenizer's bos comes first. `segments`: of `text`, once cut.
    """

    text: str
    spans: list[tuple[int, int]]
    marks: Marks
    added_ids: tuple[int, ...] = ()
    whole: bool = False
    lone_text: bool = False
    segments: list[Segment] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A conversation as the template reads it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    marks: Marks


class TurnDrafter:
    """Renders conversations with one template and finds the assistant's turns in them."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, probe: TemplateProbe, encoder: SegmentEncoder, end: TurnEnd
    ) -> None:
        self._probe, self._encoder, self._end = probe, encoder, end
        texts = (tokenizer.get_chat_template(None, None), tokenizer.get_chat_template(None, [{}]))
        self._templates = [_compile_jinja_template(text) for text in texts]
        # one clock for all renders: a date in the prompt must not change between two renders of one conversation
        own = {**tokenizer.special_tokens_map, "strftime_now": datetime.now().strftime, "documents": None}
        self._variables = [{**template.globals, **own} for template in self._templates]
        self._roles_are_words = not any(encoder.control_re.search(role) for role in ROLES)

    def inputs(self, conversation: Conversation) -> Inputs:
        """The messages and tools as dictionaries, control tokens in their words marked. Raises `CannotRender`."""
        messages = [message.as_template_input() for message in conversation.messages]
        if self._is_plain(conversation, messages):
            return Inputs([self._adapt(message) for message in messages], None, "no marks")
        tools: list[dict[str, Any]] | None = list(conversation.tools) or None
        present = {message["role"] for message in messages} | ({"tools"} if tools else set())
        present |= {"tool_calls"} if any("tool_calls" in message for message in messages) else set()
        if not _OPEN_TAG.search(
            self._probe.prompt_extra
        ):  # where the prompt opens a tag, `_answer_after` adds the reasoning
            present |= {"reasoning"} if any("reasoning_content" in message for message in messages) else set()
        dropped = sorted(present & self._probe.drops)
        if dropped:
            raise CannotRender(f"the chat template drops {_DROPPED[dropped[0]]} without a word")
        parts = [self._mark_message(message) for message in messages]
        marked = any(is_marked for _, is_marked in parts) or self._encoder.has_control_token(tools)
        if marked:
            messages = [message for message, _ in parts]
            tools = self._encoder.mark(tools)
        return Inputs([self._adapt(message) for message in messages], tools, "marks" if marked else "no marks")

    def _is_plain(self, conversation: Conversation, messages: list[dict[str, Any]]) -> bool:
        """Whether all is text of roles that the template shows, without a control token in it: one search for all."""
        if conversation.tools or not self._roles_are_words or any(len(message) > 2 for message in messages):
            return False
        if any(message["role"] in self._probe.drops for message in messages):
            return False
        return self._encoder.control_re.search("\0".join([message["content"] for message in messages])) is None

    def _mark_message(self, message: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """The message with its control tokens marked, and whether it has any.

        A reasoning block at the start of an answer (`<think>…</think>`) keeps its tags where they are no special
        tokens: the template looks for them, and the model has to write them.
        """
        if not self._encoder.has_control_token(message):
            return message, False
        tags = _LEADING_BLOCK.match(message["content"]) if message["role"] == "assistant" else None
        if tags is None or not {tags[1].strip(), tags[4]} <= self._encoder.plain_tags:
            return self._encoder.mark(message), True
        rest = {key: value for key, value in message.items() if key != "content"}
        if not self._encoder.has_control_token([rest, tags[3], tags[5]]):
            return message, False
        content = tags[1] + self._encoder.mark(tags[3]) + tags[4] + self._encoder.mark(tags[5])
        return {**self._encoder.mark(rest), "content": content}, True

    def _adapt(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message in the form that this template reads (see `TemplateProbe`), with gpt-oss's name for reasoning."""
        if "reasoning_content" in message:
            message = {"thinking": message["reasoning_content"], **message}
        if self._probe.content_as_parts:
            message = {**message, "content": [{"type": "text", "text": message["content"]}]}
        if self._probe.arguments_as_text and "tool_calls" in message:
            calls = [{**call, "function": _with_text_arguments(call["function"])} for call in message["tool_calls"]]
            message = {**message, "tool_calls": calls}
        return message

    def render(self, inputs: Inputs, *, turns: int | None = None, then: Literal["end", "prompt"] = "end") -> str:
        """The first `turns` turns as text, with the generation prompt if `then` says so. Raises `CannotRender`."""
        messages = inputs.messages if turns is None else inputs.messages[:turns]
        number = 1 if inputs.tools else 0
        template = self._templates[number]
        variables = {**self._variables[number], "messages": messages, "tools": inputs.tools}
        variables["add_generation_prompt"] = then == "prompt"
        try:  # as `template.render`, which copies the environment's variables anew, in half of the time
            context = template.new_context(variables, shared=True)
            return template.environment.concat(template.root_render_func(context))  # type: ignore[attr-defined]
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CannotRender(f"the chat template refuses it: {reason}") from None

    def drafts(self, conversation: Conversation, *, loss_on: LossOn) -> list[Draft]:
        """The rows of a conversation with turns. Raises `CannotRender`."""
        inputs = self.inputs(conversation)
        wanted = self._wanted(conversation, loss_on)
        full = self.render(inputs)
        draft = self._one_row(full, inputs, wanted)
        if loss_on == "all":
            return [self._whole(full, inputs, draft)]
        return [draft] if draft is not None else self.row_per_turn(conversation, loss_on=loss_on)

    def row_per_turn(self, conversation: Conversation, *, loss_on: LossOn) -> list[Draft]:
        """One row for each trained turn: its prompt as it is served, then the answer. Raises `CannotRender`."""
        inputs = self.inputs(conversation)
        return [self._turn_row(inputs, turn) for turn in self._wanted(conversation, loss_on)]

    def _wanted(self, conversation: Conversation, loss_on: LossOn) -> list[int]:
        """The turns whose characters are looked for: the trained ones or, with `all`, those that are left out."""
        turns = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
        if loss_on == "last_assistant":
            turns = turns[-1:]
        return [i for i in turns if (conversation.messages[i].weight == 0) == (loss_on == "all")]

    def _whole(self, full: str, inputs: Inputs, silent: Draft | None) -> Draft:
        if silent is None:
            raise CannotRender("a turn of weight 0 cannot be left out, the chat template rewrites it later")
        draft = Draft(full, silent.spans, inputs.marks, whole=True)
        if self._end.mode != "rendered" and inputs.messages[-1]["role"] == "assistant" and not silent.added_ids:
            draft.text, draft.added_ids = full.rstrip(), (self._end.eos_id,)
        return draft

    def _one_row(self, full: str, inputs: Inputs, wanted: Sequence[int]) -> Draft | None:
        """All wanted turns in the whole render, or None where a turn or its prompt is no prefix of it."""
        draft = Draft(full, [], inputs.marks)
        for i in wanted:
            prompt = self.render(inputs, turns=i, then="prompt")
            if not full.startswith(prompt):
                return None
            end = self._end_at_once(full, len(prompt), inputs.messages[i])
            if end is None:
                is_last = i == len(inputs.messages) - 1
                turn = full if is_last else self.render(inputs, turns=i + 1)
                end, closed = self._turn_end(turn, len(prompt))
                opener = None if closed or self._end.mode != "next" else self._encoder.control_re.match(full, end)
                if opener is not None:
                    end, closed = opener.end(), True
                if end < len(prompt) or not full.startswith(turn[: min(end, len(turn))]) or not (closed or is_last):
                    return None
                if not closed:
                    draft.text, draft.added_ids = full[:end], (self._end.eos_id,)
            draft.spans.append((len(prompt), end))
        return draft

    def _end_at_once(self, full: str, start: int, message: dict[str, Any]) -> int | None:
        """Where the answer ends that stands at `start`, as it is or stripped, closed as usual; else None."""
        content = message["content"]
        if self._end.mode != "rendered" or not isinstance(content, str) or "tool_calls" in message:
            return None
        for words in (content, content.strip()):
            answer = self._probe.lead + words + self._end.text
            if full.startswith(answer, start):
                return start + len(answer)
        return None

    def _turn_end(self, turn: str, start: int) -> tuple[int, bool]:
        """The end of the answer that closes a render (characters), and whether a token of the template's ends it."""
        tail, text = self._end.tail, self._end.text
        if turn.endswith(tail) and len(turn) - len(tail) >= start:
            return len(turn) - len(tail) + len(text), self._end.mode == "rendered"
        if self._end.mode == "rendered":  # another kind of turn, e.g. a tool call of gpt-oss, ends in another token
            matches = list(self._encoder.control_re.finditer(turn, start))
            if matches and not turn[matches[-1].end() :].strip():
                return matches[-1].end(), True
        return max(start, len(turn.rstrip())), False

    def _turn_row(self, inputs: Inputs, i: int) -> Draft:
        """The row that trains turn i alone."""
        prompt, turn = self.render(inputs, turns=i, then="prompt"), self.render(inputs, turns=i + 1)
        if not turn.startswith(prompt):
            turn = prompt + self._answer_after(prompt, turn, inputs.messages[i])
        end, closed = self._turn_end(turn, len(prompt))
        draft = Draft(turn if closed else turn[:end], [(len(prompt), end)], inputs.marks, notes={"per_turn"})
        draft.added_ids = () if closed else (self._end.eos_id,)
        return draft

    def _answer_after(self, prompt: str, turn: str, message: dict[str, Any]) -> str:
        """The answer's text where the generation prompt holds what the turn lacks (DeepSeek-R1's opened `<think>`).

        Serving feeds that prompt, so it stands in the row. A tag that it opens is closed before the answer's words,
        after the reasoning if the message has any.
        """
        base = prompt.removesuffix(self._probe.prompt_extra)
        body = turn[len(base) :]
        if (
            not self._probe.prompt_extra
            or base == prompt
            or not turn.startswith(base)
            or not body.startswith(self._probe.lead)
        ):
            raise CannotRender("its generation prompt is no prefix of the rendered turn")
        opened = _OPEN_TAG.search(prompt)
        if opened is None:
            return body.removeprefix(self._probe.lead)
        closing = f"</{opened[1]}>"
        if closing in self._probe.lead:
            return body
        return f"{message.get('reasoning_content') or ''}\n{closing}\n\n{body.removeprefix(self._probe.lead).lstrip()}"


def _with_text_arguments(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    return (
        function if isinstance(arguments, str) else {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
    )

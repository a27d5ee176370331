"""Questions: held-out conversations up to their last assistant turn, and which of them are asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_tune.data.conversation import Conversation, Message

if TYPE_CHECKING:
    from lora_tune.recipe import Eval


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out conversation up to its last assistant turn, and what that turn says.

    `reference` is the text of that turn, empty where it consists of tool `calls` alone; `others` are further right
    answers. `number` is the place of the conversation among those it was chosen from.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    reference: str
    rank: str  # seeded hash of the content: the order in which rows are chosen
    calls: tuple[dict[str, Any], ...] = ()
    others: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    number: int = 0

    @property
    def references(self) -> tuple[str, ...]:
        """Every right answer, that of the row first."""
        return (self.reference, *self.others)

    @property
    def shown_reference(self) -> str:
        """The reference as a person reads it: the text, or the tool calls as JSON."""
        return self.reference if self.reference.strip() or not self.calls else calls_text(self.calls)


def choose(
    conversations: Sequence[Conversation], most: int | None, *, seed: int, tasks: Sequence[str] = ()
) -> list[int]:
    """Places of at most `most` conversations, chosen by a seeded hash of their content and kept in their order.

    The same rows are chosen whatever the order of the data set is. Those of the held-out `tasks` stay, all of them:
    their rows were chosen before the templates multiplied them.
    """
    if most is None or most >= len(conversations):
        return list(range(len(conversations)))
    apart = [place for place, conversation in enumerate(conversations) if conversation.task in tasks]
    others = [place for place, conversation in enumerate(conversations) if conversation.task not in tasks]
    if most < len(others):
        others = sorted(others, key=lambda place: (rank_of(conversations[place], seed), place))[:most]
    return sorted([*others, *apart])


def as_question(conversation: Conversation, *, seed: int, number: int = 0) -> Question | None:
    """The conversation up to its last assistant turn; None for plain text, and where that turn says nothing."""
    turns = [place for place, message in enumerate(conversation.messages) if message.role == "assistant"]
    if not turns or not turns[-1]:
        return None
    last = conversation.messages[turns[-1]]
    if not last.content.strip() and not last.tool_calls:
        return None
    return Question(
        conversation.messages[: turns[-1]],
        conversation.tools,
        last.content,
        rank_of(conversation, seed),
        calls=last.tool_calls,
        others=conversation.references,
        choices=conversation.choices,
        number=number,
    )


def questions_of(conversations: Sequence[Conversation], evaluation: Eval, *, seed: int) -> list[Question]:
    """The questions of the conversations that are evaluated, in their order."""
    chosen = choose(conversations, evaluation.max_rows, seed=seed, tasks=evaluation.hold_out_tasks)
    found = (as_question(conversations[place], seed=seed, number=place) for place in chosen)
    return [question for question in found if question]


def shown(questions: Sequence[Question], evaluation: Eval) -> list[int]:
    """Numbers of the questions whose answers are shown as samples."""
    return sorted(range(len(questions)), key=lambda place: questions[place].rank)[: evaluation.samples]


def readable(messages: Sequence[Message]) -> str:
    """A prompt as a person reads it: a single user message as it is, else one paragraph per turn with its role."""
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].content
    turns = [(message.role, message.content or calls_text(message.tool_calls)) for message in messages]
    return "\n".join(f"{role}: {text}" for role, text in turns)


def calls_text(calls: Sequence[dict[str, Any]]) -> str:
    """Tool calls as JSON, one call a line."""
    return "\n".join(json.dumps(call.get("function", call), ensure_ascii=False) for call in calls)


def rank_of(conversation: Conversation, seed: int) -> str:
    """A seeded hash of the content."""
    turns = [message.as_template_input() for message in conversation.messages]
    content = json.dumps([seed, turns, conversation.text], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()

"""A conversation: what every data format becomes and what the chat template renders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    `content` is text ("" where an assistant turn consists of tool calls alone). `tool_calls` are in the form of the
    OpenAI API (`{"type": "function", "id"?, "function": {"name", "arguments": object}}`), arguments as an object.
    `weight` 0 keeps a turn out of the loss (OpenAI's fine-tuning format). `reasoning` is the text of
    `reasoning_content` (or `thinking`) where the data has one.
    """

    role: Role
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    weight: int = 1
    name: str | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None

    def as_template_input(self) -> dict[str, Any]:
        """The message as the dictionary that chat templates read; absent fields are left out."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        others = {"name": self.name, "tool_call_id": self.tool_call_id, "reasoning_content": self.reasoning}
        for key, value in others.items():
            if value is not None:
                message[key] = value
        return message


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of data: turns (and the tools they may call), or plain `text` without turns.

    `source` counts the data sources of the recipe from 0, `file` is the file's name as the user wrote it and `line` its
    line (or record number, from 1), so that every message about the row can say where it stands.

    `task` and `template` name the task (a cluster such as `nli`) and the prompt template that the row was rendered by,
    "" where there is none: evaluation groups by them. `choices` are the answers among which rank classification
    chooses; one of them is the answer. `references` are further right answers beside the last assistant turn, of which
    a metric counts the best.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    source: int = 0
    file: str = ""
    line: int = 0
    task: str = ""
    template: str = ""
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()

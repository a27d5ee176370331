"""An answer that may turn into tool calls while it is streamed: words go out at once, what may be a call is held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_tune.serving.backend import Piece
from lora_tune.serving.tool_format import Call, ToolFormat


class CallWatch:
    """Watches one answer. `forced` is the beginning of a call that the prompt already holds, "" where it holds none."""

    def __init__(self, form: ToolFormat, *, forced: str, tools: Sequence[Mapping[str, Any]]) -> None:
        self._form, self._forced, self._tools = form, forced, tools
        self._holds, self._is_plain = bool(forced), False
        self._held = ""
        self.ids: list[int] = []

    def feed(self, piece: Piece) -> str:
        """The text that may go out now."""
        self.ids += piece.ids
        self._held += piece.text
        opener = self._form.opener
        if self._is_plain or self._holds:
            pass
        elif self._form.signal_id is not None and self._form.signal_id in piece.ids:
            self._holds = True
        elif not opener:  # calls are bare JSON: the first character decides
            begin = self._held.lstrip()[:1]
            self._holds, self._is_plain = begin in ("{", "["), begin not in ("", "{", "[")
        elif opener in self._held:
            self._holds = True
            return self._take(self._held.index(opener))
        else:
            sizes = range(min(len(opener) - 1, len(self._held)), 0, -1)
            kept = next((size for size in sizes if opener.startswith(self._held[-size:])), 0)
            return self._take(len(self._held) - kept)
        return self._take(len(self._held)) if self._is_plain else ""

    def end(self, written: str) -> tuple[str, list[Call]]:
        """What is left at the end: text that turned out to be no call, or the calls; `written` are `ids` as text."""
        _, calls = self._form.parse(self._forced + written, tools=self._tools)
        return ("", calls) if calls else (self._forced + self._held, [])

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

"""Answers on a terminal while they come: one below the other, or two side by side; or as plain text into a pipe.

What a model says is shown by `printable`: no control character reaches the terminal. Columns need no cursor movement
but the return to the start of a line: a row is printed when both columns have it whole, and the one that is still
growing is written over itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TextIO

from lora_tune.serving.chat_session import Said
from lora_tune.terminal import printable

if TYPE_CHECKING:
    from lora_tune.data.chat_template import ChatTemplate

WIDE = 100  # cells from which two columns are shown side by side
_GAP = " │ "


class Screen(Protocol):
    """Where answers go, piece by piece; `column` counts the speakers from 0."""

    def piece(self, column: int, text: str) -> None:
        """Words that one model has just added."""

    def end(self, column: int, said: Said) -> None:
        """The answer of this model is whole."""


class Plain:
    """Answers one below the other, each under its model's name where there are several."""

    def __init__(self, out: TextIO, names: Sequence[str]) -> None:
        self._out, self._names = out, names
        self._begun: set[int] = set()
        self._line_is_open = False

    def piece(self, column: int, text: str) -> None:
        """Write it at once."""
        self._begin(column)
        self._write(printable(text))

    def end(self, column: int, said: Said) -> None:
        """End the line, and leave one free before the next answer."""
        self._begin(column)
        if self._line_is_open or not said.text:
            self._write("\n")
        if len(self._names) > 1 and column < len(self._names) - 1:
            self._write("\n")

    def _begin(self, column: int) -> None:
        if column not in self._begun:
            self._begun.add(column)
            if len(self._names) > 1:
                self._write(f"[{self._names[column]}]\n")

    def _write(self, text: str) -> None:
        if text:
            self._out.write(text)
            self._out.flush()
            self._line_is_open = not text.endswith("\n")


class Silent:
    """Answers that nobody watches."""

    def piece(self, column: int, text: str) -> None:
        """Nothing is shown."""

    def end(self, column: int, said: Said) -> None:
        """Nothing is shown."""


class SideBySide:
    """Two answers in two columns of a terminal `width` cells wide, each growing as its model speaks."""

    def __init__(self, out: TextIO, names: Sequence[str], *, width: int) -> None:
        self._out = out
        self._cell = (width - 1 - len(_GAP)) // 2
        self._columns = [Column(self._cell) for _ in names]
        self._row = 0
        self._write_row([printable(name) for name in names], end="\n")
        out.write(f"{'─' * (self._cell + 1)}┼{'─' * (self._cell + 1)}\n")

    def piece(self, column: int, text: str) -> None:
        """Let the column grow, and show what can be shown."""
        self._columns[column].feed(printable(text))
        self._show()

    def end(self, column: int, said: Said) -> None:
        """Nothing more comes in this column; the last one ends the line."""
        self._columns[column].end()
        self._show()
        if all(column.ended for column in self._columns):
            rest = max(len(column.rows) for column in self._columns)
            while self._row < rest:
                self._next()
            self._out.write("\r")  # away from a row that was shown empty
            self._out.flush()

    def _show(self) -> None:
        """Print the rows that both columns have whole, then the one that is growing, to be written over."""
        while all(self._row < len(column.rows) or column.ended for column in self._columns):
            if all(self._row >= len(column.rows) for column in self._columns):
                return
            self._next()
        self._write_row([column.row(self._row) for column in self._columns], end="")
        self._out.flush()

    def _next(self) -> None:
        self._write_row([column.row(self._row) for column in self._columns], end="\n")
        self._row += 1

    def _write_row(self, cells: Sequence[str], *, end: str) -> None:
        """Always as wide as the columns, so that it covers what stood there."""
        self._out.write("\r" + _GAP.join(_padded(cell, self._cell) for cell in cells) + end)


class Column:
    """Text that grows, wrapped at words into rows of `width` cells; `rows` are those that will not change any more."""

    def __init__(self, width: int) -> None:
        self.rows: list[str] = []
        self.ended = False
        self._width = width
        self._tail = ""

    def feed(self, text: str) -> None:
        """Add text behind what is there."""
        *whole, tail = (self._tail + text.replace("\t", "    ")).split("\n")
        for line in whole:
            self.rows += wrapped(line, self._width)
        *more, self._tail = wrapped(tail, self._width)
        self.rows += more

    def end(self) -> None:
        """Nothing more comes."""
        if self._tail and not self.ended:
            self.rows.append(self._tail)
        self._tail, self.ended = "", True

    def row(self, number: int) -> str:
        """A row, the growing one, or nothing."""
        if number < len(self.rows):
            return self.rows[number]
        return self._tail if number == len(self.rows) else ""


def wrapped(line: str, width: int) -> list[str]:
    """A line as rows of at most `width` cells, at least one; spaces at the end of a full row fall away.

    All rows but the last stay what they are when the line grows: whatever may still change is in the last one.
    """
    from rich.cells import cell_len

    rows, row = [], ""
    for word in _words(line):
        if cell_len(row) + cell_len(word.rstrip(" ")) > width and row:
            rows.append(row.rstrip(" "))
            row = ""
        for character in word:  # a word that is wider than a row is cut
            if cell_len(row) + cell_len(character) > width:
                if character == " ":
                    continue
                rows.append(row)
                row = ""
            row += character
    return [*rows, row]


def _words(line: str) -> list[str]:
    """The words of a line, each with the spaces behind it."""
    words: list[str] = []
    for part in line.split(" "):
        words += [part + " "]
    words[-1] = words[-1][:-1]
    return words


def _padded(text: str, width: int) -> str:
    from rich.cells import cell_len

    return text + " " * (width - cell_len(text))


def tokens_text(chat: ChatTemplate, ids: Sequence[int]) -> str:
    """A prompt as its tokens: the text of each with its id, a line's end as ⏎ and a new line, spaces as ␣."""
    parts = []
    for token in ids:
        text = str(chat.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if "\ufffd" in text:  # part of a character
            text = str(chat.tokenizer.convert_ids_to_tokens(int(token)))
        shown = printable(text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥"))
        parts.append(f"{shown}·{token}" + ("\n" if text.endswith("\n") else " "))
    return "".join(parts).rstrip()

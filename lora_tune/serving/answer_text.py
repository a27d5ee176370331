"""From tokens to text while they come: whole characters alone, and nothing that may become a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lora_tune.serving.backend import TokenLogprob

if TYPE_CHECKING:
    from lora_tune.data.chat_template import ChatTemplate

_BROKEN = "\ufffd"  # stands for the bytes of a character that is not whole
_MOST_BROKEN = 3  # of them can still become one character


class Vocabulary:
    """How the tokens of one tokenizer are written. Made for one thread: it has its own copy of the tokenizer."""

    def __init__(self, chat: ChatTemplate) -> None:
        tokenizer = chat.tokenizer
        self.size = len(tokenizer)
        self.stop_ids = frozenset(int(token) for token in chat.stop_ids)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._words: Callable[[int], str | None]
        if backend is not None:
            own = type(backend).from_str(backend.to_str())  # encoding elsewhere changes a tokenizer meanwhile
            self.decode: Callable[[Sequence[int]], str] = lambda ids: str(own.decode(list(ids)))
            self._with_special: Callable[[int], str] = lambda token: str(
                own.decode([token], skip_special_tokens=False)
            )
            self._words = own.id_to_token
        else:
            self.decode = lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))
            self._with_special = lambda token: str(tokenizer.decode([token]))
            self._words = lambda token: str(tokenizer.convert_ids_to_tokens(token))
        self._known: dict[int, tuple[str, bytes]] = {}

    def logprob(self, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        """A token with its text and bytes."""
        known = self._known.get(token)
        if known is None:
            text = self._with_special(token)
            known = self._known[token] = text, self._bytes(token, text)
        return TokenLogprob(token, known[0], known[1], logprob, top)

    def _bytes(self, token: int, text: str) -> bytes:
        """The bytes of a token, also of a part of a character: byte-level letters, or `<0xE2>`."""
        if _BROKEN not in text:
            return text.encode("utf-8", "surrogatepass")
        word = self._words(token) or ""
        if word.startswith("<0x") and word.endswith(">"):
            return bytes([int(word[3:-1], 16)])
        if all(letter in _BYTE_OF_LETTER for letter in word):
            return bytes(_BYTE_OF_LETTER[letter] for letter in word)
        return text.encode()


def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + number): byte for number, byte in enumerate(hidden)}


_BYTE_OF_LETTER = _byte_letters()


class AnswerText:
    """The text of one answer. All that `add` and `rest` return, joined, is the answer without its stop string."""

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str]) -> None:
        self._vocabulary = vocabulary
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._from = self._read = 0  # tokens before the window, and tokens whose text is out
        self._shown = ""  # text of the window's tokens that is out
        self._held = ""
        self.stopped = False
        """A stop string was met: nothing more comes."""

    def add(self, token: int) -> str:
        """The text that this token sets free."""
        self._ids.append(token)
        window = self._vocabulary.decode(self._ids[self._from :])
        whole = _whole(window)
        fresh = whole[len(self._shown) :]
        if len(whole) == len(window):
            self._from, self._read = self._read, len(self._ids)
            self._shown = self._vocabulary.decode(self._ids[self._from : self._read])
        elif len(whole) > len(self._shown):
            self._shown = whole
        return self._pass(fresh)

    def rest(self) -> str:
        """What was held back, at the end of an answer that met no stop string."""
        if self.stopped:
            return ""
        window = self._vocabulary.decode(self._ids[self._from :])
        text = self._pass(window[len(self._shown) :])
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _pass(self, text: str) -> str:
        """Text up to a stop string, or up to what may become one."""
        if not self._stop:
            return text
        text, self._held = self._held + text, ""
        found = [place for place in (text.find(word) for word in self._stop) if place >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        held = max(_overlap(text, word) for word in self._stop)
        if held:
            text, self._held = text[:-held], text[-held:]
        return text


def _whole(text: str) -> str:
    """A text without what may be the beginning of a character at its end."""
    end = len(text)
    while end and text[end - 1] == _BROKEN and len(text) - end < _MOST_BROKEN:
        end -= 1
    return text[:end]


def _overlap(text: str, word: str) -> int:
    """How many letters at the end of a text begin this word."""
    return next((size for size in range(min(len(word) - 1, len(text)), 0, -1) if word.startswith(text[-size:])), 0)

"""Rendered chats to token ids: cut at special tokens, every distinct segment encoded once, in batches.

A tokenizer first splits a text at its special tokens and encodes what lies between on its own. So a rendered chat may
be cut in front of every special token and the ids of the segments joined: the result is the same, and the segments
that come back in every row (`<|im_start|>assistant\\n`) are encoded once.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

# The private-use characters that transformers (>= 5.20) wraps around control tokens in the words of users
MARK_START, MARK_END = "\U000f0000", "\U000f0001"

# start: at the start of a text or at a special token; middle: anywhere else; literal: a control token as plain text
Kind = Literal["start", "middle", "literal"]
Marks = Literal["marks", "no marks"]  # whether control tokens in somebody's words stand between marks


class Segment(NamedTuple):
    """A piece of a rendered chat: how it is encoded, its text, and where it begins in the chat (characters)."""

    kind: Kind
    text: str
    start: int
    end: int


class LiteralError(ValueError):
    """A control token in somebody's words that this tokenizer cannot encode as plain text."""


class SegmentEncoder:
    """Encodes rendered chats with one tokenizer; user words never become one of `control_tokens`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, control_tokens: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._cache: dict[tuple[Kind, str], list[int]] = {}
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        has_normalizer = self._backend is not None and self._backend.normalizer is not None
        hard = [token for token in added if not (token.normalized and has_normalizer)]
        # a token that swallows the space before it, or needs a word boundary, cannot be cut off from its left side
        cut_off = {token.content for token in hard if not token.lstrip and not token.single_word} & set(control_tokens)
        self._cut_tokens = frozenset(cut_off) if self._backend is not None else frozenset()
        self._hard_re = _any_of([token.content for token in hard])
        self.plain_tags = frozenset(token.content for token in added if not token.special)
        self.control_re = _any_of(control_tokens)
        self._marked_re = re.compile(f"{MARK_START}({self.control_re.pattern}){MARK_END}|[{MARK_START}{MARK_END}]")
        self._newline_ids = tokenizer.encode("\n", add_special_tokens=False)
        all_ids = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
        self._control_ids = {token: all_ids[token] for token in control_tokens if token in all_ids}

    def has_control_token(self, value: Any) -> bool:
        """Whether any string in a (nested) value contains a control token."""
        if isinstance(value, str):
            return self.control_re.search(value) is not None
        if isinstance(value, dict):
            return any(self.has_control_token(item) for item in value.values())
        if isinstance(value, list | tuple):
            return any(self.has_control_token(item) for item in value)
        return False

    def mark(self, value: Any) -> Any:
        """A copy in which every control token stands between two private-use characters: it is not the template's.

        Source: `mark_control_tokens` of transformers (`apply_chat_template(..., sanitize_control_tokens=True)`).
        """
        if isinstance(value, str):
            value = value.replace(MARK_START, "").replace(MARK_END, "")
            return self.control_re.sub(f"{MARK_START}\\g<0>{MARK_END}", value)
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def segments(self, text: str, *, marks: Marks, cuts: Iterable[int] = ()) -> list[Segment]:
        """Cut a rendered chat before every special token, at its marks, and at `cuts` (character positions)."""
        edges = sorted(cut for cut in set(cuts) if 0 < cut < len(text))
        found: list[Segment] = []
        position = 0
        for match in self._marked_re.finditer(text) if marks == "marks" else ():
            found += self._pieces(text, position, match.start(), edges)
            if match[1] is not None:
                found.append(Segment("literal", match[1], match.start(), match.end()))
            position = match.end()
        return found + self._pieces(text, position, len(text), edges)

    def _pieces(self, text: str, start: int, end: int, edges: Sequence[int]) -> list[Segment]:
        """The segments of the characters start:end, which contain no mark."""
        starts = {match.start() for match in self._hard_re.finditer(text, start, end) if match[0] in self._cut_tokens}
        cuts = sorted({start, end, *starts, *(edge for edge in edges if start < edge < end)})
        return [
            Segment("start" if left == 0 or left in starts else "middle", text[left:right], left, right)
            for left, right in itertools.pairwise(cuts)
        ]

    def prepare(self, keys: Iterable[tuple[Kind, str]]) -> None:
        """Encode all segments that `ids` will be asked for, in one batch."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._cache]
        plain = [text for kind, text in missing if kind == "start"]
        middle = [text for kind, text in missing if kind == "middle"]
        for text, ids in zip(plain, self._encode_batch(plain), strict=True):
            self._cache["start", text] = ids
        # SentencePiece puts a space before the start of a text: encode after a newline, then take the newline away
        count = len(self._newline_ids)
        for text, ids in zip(middle, self._encode_batch(["\n" + text for text in middle]), strict=True):
            clean = ids[:count] == self._newline_ids
            self._cache["middle", text] = ids[count:] if clean else self._encode_batch([text])[0]
        for kind, text in missing:
            if kind == "literal":
                self._cache[kind, text] = self._literal(text)

    def ids(self, kind: Kind, text: str) -> list[int]:
        """The token ids of one segment. Raises `LiteralError`."""
        if (kind, text) not in self._cache:
            self.prepare([(kind, text)])
        return self._cache[kind, text]

    def forget(self) -> None:
        """Empty the cache (after a batch of rows)."""
        self._cache.clear()

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._backend is None:
            return [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _literal(self, text: str) -> list[int]:
        """Ids of a control token written as ordinary text.

        Source: `encode_marked_chat` and `_encode_without_added_tokens` of transformers.
        """
        ids = self._without_added_tokens("\n" + text)
        count = len(self._newline_ids)
        ids = ids[count:] if ids[:count] == self._newline_ids else self._without_added_tokens(text)
        if self._control_ids.get(text) in ids:
            raise LiteralError(f"the tokenizer cannot write the control token {text!r} as plain text")
        return ids

    def _without_added_tokens(self, text: str) -> list[int]:
        if self._backend is None:
            return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        words = [text]
        if self._backend.pre_tokenizer is not None:
            words = [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in self._backend.model.tokenize(word)]


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of the tokens, the longest first; one that never matches where there are none."""
    longest_first = sorted(set(tokens), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

"""What must be trained, found by other means than chat_template.py: plain string search in reference renders.

Contents are unique marker words. The trained characters of an assistant turn are expected to be

    lead + words + end

- `words`: from the first to the last marker of that turn (and everything that the template writes between them);
- `lead`: what stands between the generation prompt and the words, if the prompt is a prefix of the render; where it is
  not, at most white space and the closing of a tag that the prompt opened;
- `end`: what the template writes after the words whether or not a user turn follows, in whole special tokens and
  without the white space after them; where nothing is common, what it writes at the end of the conversation; where
  it writes nothing, one special token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

MARKER = re.compile(r"zq\w*?qz")


def marker(number: int) -> str:
    """A word that no template contains."""
    return f"zq{number}mark{number}qz"


def expected(
    tokenizer: Any, messages: Sequence[dict[str, Any]], turn: int, *, tools: list[Any] | None = None
) -> re.Pattern[str]:
    """A pattern that the trained characters of assistant turn `turn` match in full."""
    until = tokenizer.apply_chat_template(list(messages[: turn + 1]), tools=tools, tokenize=False)
    prompt = tokenizer.apply_chat_template(
        list(messages[:turn]), tools=tools, tokenize=False, add_generation_prompt=True
    )
    own = MARKER.findall(str(messages[turn]))
    first, last = until.index(own[0]), until.rindex(own[-1]) + len(own[-1])
    if until.startswith(prompt):
        lead = re.escape(until[len(prompt) : first])
    else:
        lead = r"\s*(</\w+>\s*)?"
        if messages[turn].get("tool_calls"):  # the syntax before the name of the tool belongs to the call
            agree = next(i for i, (left, right) in enumerate(zip(until, prompt, strict=False)) if left != right)
            lead += "(" + re.escape(until[agree:first].lstrip()) + ")?"
    return re.compile(lead + re.escape(until[first:last]) + _end(tokenizer, messages[: turn + 1], until[last:], tools))


def _end(tokenizer: Any, messages: Sequence[dict[str, Any]], tail: str, tools: list[Any] | None) -> str:
    specials = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    split = re.compile("(" + "|".join(map(re.escape, specials)) + ")")
    pieces = [piece for piece in split.split(tail) if piece]
    after: list[str] = []
    content = messages[0]["content"] if isinstance(messages[0]["content"], str) else None
    if content is not None:
        try:
            follow = [*messages, {"role": "user", "content": marker(999)}]
            more = tokenizer.apply_chat_template(follow, tools=tools, tokenize=False)
            own = MARKER.findall(str(messages[-1]))[-1]
            after = [
                piece for piece in split.split(more[more.rindex(own) + len(own) : more.index(marker(999))]) if piece
            ]
        except Exception:
            after = []
    common = []
    for left, right in zip(pieces, after, strict=False):
        if left != right:
            break
        common.append(left)
    end = "".join(common).rstrip() or "".join(
        pieces[: 1 + max((i for i, p in enumerate(pieces) if p in specials), default=-1)]
    )
    one_of = "(" + "|".join(re.escape(special) for special in specials) + ")"
    return re.escape(end) if any(special in end for special in specials) else re.escape(end) + one_of


def trained_texts(tokenizer: Any, input_ids: np.ndarray, mask: np.ndarray) -> list[str]:
    """The text of every run of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    texts = []
    for start, end in edges.reshape(-1, 2):
        # from the whole text: SentencePiece takes the space away from the first token of what it decodes
        before, until = (tokenizer.decode([int(i) for i in input_ids[:stop]]) for stop in (start, end))
        texts.append(until[len(before) :] if until.startswith(before) else until)
    return texts


def complaints(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    rows: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    tools: list[Any] | None = None,
) -> list[str]:
    """What is wrong with the masks of a conversation's rows (input_ids, mask), [] if nothing is."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    texts = [text for ids, mask in rows for text in trained_texts(tokenizer, ids, mask)]
    if len(texts) != len(turns):
        return [f"{len(texts)} trained stretches for {len(turns)} assistant turns: {texts}"]
    found = []
    for turn, text in zip(turns, texts, strict=True):
        pattern = expected(tokenizer, messages, turn, tools=tools)
        if not pattern.fullmatch(text.replace("▁", " ")) and not pattern.fullmatch(text):
            found.append(f"turn {turn}: trained {text!r}, expected {pattern.pattern}")
        others = {word for i, other in enumerate(messages) if i != turn for word in MARKER.findall(str(other))}
        found += [f"turn {turn}: trained {word!r} of another turn" for word in others if word in text]
    return found

"""How a chat template ends an assistant's turn, and the eos, pad and stop tokens that follow from it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lora_tune.data.segment_encoder import SegmentEncoder
from lora_tune.data.template_check import TemplateProbe, common_prefix
from lora_tune.errors import CheckFailed

_EOS_NAMES = re.compile(r"endoftext|end_of_text|</s>|eos", re.IGNORECASE)
_PAD_NAMES = (re.compile(r"pad", re.IGNORECASE), re.compile(r"reserved|unused|extra_id|placeholder", re.IGNORECASE))


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """How an assistant's turn ends.

    - `rendered`: the template writes `text`, which ends in a special token (`<|im_end|>`, `</s>`, `<|return|>`);
    - `next`: it writes nothing, the special token that opens the next turn ends this one (GLM-4's `<|user|>`); after
      the last turn that token is added;
    - `added`: no token ends a turn (`text` may hold words that do); the tokenizer's eos is added after every answer, so
      that the model learns to stop, and every answer is a row of its own.

    `tail` is all that the template writes after an answer at the end of a conversation, `text` the part of it that
    belongs to the turn. `eos_id` ends a turn, `stop_ids` (eos_id first) end generation.
    """

    mode: Literal["rendered", "next", "added"]
    text: str
    tail: str
    eos_id: int
    stop_ids: tuple[int, ...]


def find_turn_end(probe: TemplateProbe, encoder: SegmentEncoder, *, eos_id: int | None, where: str) -> TurnEnd:
    """Read the end of a turn from the probe's renders; `eos_id` is the tokenizer's own.

    Raises:
        CheckFailed: no token ends a turn and the tokenizer has no eos either.
    """
    tail, following = probe.last_tail, probe.next_tail
    common = tail if following is None else common_prefix(tail, following)
    last = encoder.tokenizer.convert_tokens_to_ids
    end = _first_run(common, encoder) or _first_run(tail, encoder)
    opener = encoder.control_re.match(following) if following and not tail.strip() else None
    if end is not None:
        mode, text, token_id = "rendered", tail[: end[0]], last(end[1])
    elif opener is not None:
        mode, text, token_id = "next", "", last(opener[0])
    elif eos_id is not None:
        mode, text, token_id = "added", _words_that_end(tail, common, following), eos_id
    else:
        raise CheckFailed(
            f"{where}: no token ends an assistant's turn and the tokenizer has no eos token", "set eos_token"
        )
    call_end = [match[0] for match in encoder.control_re.finditer(probe.call_tail)][-1:] if mode == "rendered" else []
    stops = dict.fromkeys([token_id, *(i for i in (eos_id, *map(last, call_end)) if i is not None)])
    return TurnEnd(mode, text, tail, token_id, tuple(stops))  # type: ignore[arg-type]


def _first_run(text: str, encoder: SegmentEncoder) -> tuple[int, str] | None:
    """End position and last token of the first run of adjacent special tokens (Command R writes two), or None."""
    found: tuple[int, str] | None = None
    for match in encoder.control_re.finditer(text):
        if found is not None and match.start() != found[0]:
            break
        found = match.end(), match[0]
    return found


def _words_that_end(tail: str, common: str, following: str | None) -> str:
    """Plain words that close a turn (a foreign `<|im_end|>`), without the white space after them, or ""."""
    if following is not None and len(common) < len(tail):
        common = common[: max((common.rfind(space) + 1 for space in " \n\t"), default=0)]
    return common.rstrip()


def own_eos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The tokenizer's eos, or a special token named like one where the setting is missing (bare GPT-2 folders)."""
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special and _EOS_NAMES.search(token.content):
            return int(token_id)
    return None


def choose_pad_id(tokenizer: PreTrainedTokenizerBase, *, stop_ids: tuple[int, ...], template_text: str) -> int:
    """A pad token that does not end a turn: the tokenizer's own, an unused special one, unk, another stop token.

    Where there is none of these it is the end token itself. Training is right even then: the loss mask, not the pad id,
    keeps padding out of the loss.
    """
    eos_id = stop_ids[0]
    free = {
        token.content: int(token_id)
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and token_id not in (*stop_ids, tokenizer.bos_token_id) and token.content not in template_text
    }
    unused = [token_id for names in _PAD_NAMES for content, token_id in free.items() if names.search(content)]
    candidates = [tokenizer.pad_token_id, *unused[:1], tokenizer.unk_token_id, *stop_ids[1:]]
    return next((int(token_id) for token_id in candidates if token_id not in (None, eos_id)), eos_id)

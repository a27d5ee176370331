"""Training rows that stay hard: those on which the trained adapter still has the highest loss.

A row that an adapter cannot fit although it has seen it is often a label error (Swayamdipta et al. 2020, "Dataset
Cartography", section 5). The search reads rows in a seeded order and ends after a number of rows or a time.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_tune.data.ledger import place_of
from lora_tune.evaluation.questions import readable

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_tune.data.chat_template import ChatTemplate, TokenRow
    from lora_tune.data.fit import Documents
    from lora_tune.evaluation.losses import RowLoss

MOST_ROWS = 5_000
SHOWN = 20
_AT_ONCE = 64  # rows between two looks at the clock
_CHARACTERS = 600  # of a text that is shown


@dataclass(frozen=True, slots=True)
class HardRow:
    """A training row at `place` (file:line) with its loss (nats per trained token) under adapter and base."""

    place: str
    adapter: float
    base: float
    tokens: int
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class HardRows:
    """The hardest rows first; `losses` are those of all rows that were read, `of` is how many there are to read."""

    rows: tuple[HardRow, ...]
    losses: tuple[float, ...]
    of: int
    seconds: float


def time_for(training_s: float) -> float:
    """Seconds that the search may take: a twentieth of the training, at least 2 and at most 120."""
    return min(max(training_s / 20, 2.0), 120.0)


def hard_rows(
    model: PeftModel,
    documents: Documents,
    *,
    chat: ChatTemplate,
    seed: int,
    seconds: float,
    most_rows: int = MOST_ROWS,
) -> HardRows:
    """Measure training rows one by one, at most `most_rows` and about `seconds` long, and keep the hardest.

    The order is drawn by a generator of its own; mode, weights and random state of the model stay as they are. The
    base's loss is taken for the rows that are shown only. At least one block of rows is read, whatever the time.
    """
    from lora_tune.evaluation.losses import row_losses

    started = time.perf_counter()
    order = np.random.default_rng(seed).permutation(len(documents))[:most_rows].tolist()
    found: list[tuple[int, RowLoss]] = []
    for start in range(0, len(order), _AT_ONCE):
        block = order[start : start + _AT_ONCE]
        measured = row_losses(model, [documents[place] for place in block], pad_id=chat.pad_id)
        found += [(place, loss) for place, loss in zip(block, measured, strict=True) if loss.tokens]
        if time.perf_counter() - started > seconds:
            break
    hardest = sorted(found, key=lambda item: (-_hardness(item[1]), item[0]))[:SHOWN]
    rows = [documents[place] for place, _ in hardest]
    with model.disable_adapter():
        base = row_losses(model, rows, pad_id=chat.pad_id)
    shown = tuple(
        _shown(documents, place, row, chat=chat, adapter=adapter, base=before)
        for (place, adapter), row, before in zip(hardest, rows, base, strict=True)
    )
    losses = tuple(_mean(loss) for _, loss in found)
    return HardRows(shown, losses, len(documents), time.perf_counter() - started)


def _hardness(loss: RowLoss) -> float:
    """The loss, and one that is not a number above all."""
    return _mean(loss) if math.isfinite(loss.nll) else math.inf


def _mean(loss: RowLoss) -> float:
    return loss.nll / max(loss.tokens, 1)


def _shown(
    documents: Documents, place: int, row: TokenRow, *, chat: ChatTemplate, adapter: RowLoss, base: RowLoss
) -> HardRow:
    """A hard row as a person reads it: what was asked, and the tokens that were trained as text."""
    conversation = documents.conversation(place)
    turns = [number for number, message in enumerate(conversation.messages) if message.role == "assistant"]
    prompt = readable(conversation.messages[: turns[-1]]) if turns else ""
    answer = chat.tokenizer.decode(row.input_ids[row.mask].tolist(), skip_special_tokens=True)
    return HardRow(
        place=place_of(row.file, row.line),
        adapter=_mean(adapter),
        base=_mean(base),
        tokens=adapter.tokens,
        prompt=_excerpt(prompt, keep="end"),
        answer=_excerpt(str(answer), keep="start"),
    )


def _excerpt(text: str, *, keep: str) -> str:
    """At most `_CHARACTERS` of a text; a prompt ends with what is asked, so that its end is kept."""
    text = text.strip()
    if len(text) <= _CHARACTERS:
        return text
    return f"… {text[-_CHARACTERS:]}" if keep == "end" else f"{text[:_CHARACTERS]} …"

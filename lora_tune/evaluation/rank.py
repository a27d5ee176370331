"""Rank classification: which of the answer choices a model holds most likely, with the prompt computed once.

prompts (B, padded left)               choices (C, padded right)
. . p p p p                            p a a
└─ one forward pass; keys and values   p b b b
   are repeated for every choice       └─ one forward pass of C short rows
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_tune.data.chat_template import RowError, TokenRow
from lora_tune.data.conversation import Conversation, Message
from lora_tune.errors import DataError, Problem
from lora_tune.evaluation.losses import row_losses
from lora_tune.model.decoding import has_plain_cache
from lora_tune.model.divided import shape_of
from lora_tune.model.generation import evaluating, in_halves, transformer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lora_tune.data.chat_template import ChatTemplate
    from lora_tune.evaluation.questions import Question

_BATCH_TOKENS = 8_192  # padded tokens of prompts repeated for each choice, and of the choices
_LOGIT_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Choice:
    """Summed log-probability (nats) of a choice's tokens after its prompt, and how many they are."""

    log_prob: float
    tokens: int


@dataclass(frozen=True, slots=True)
class RankedRow:
    """A question with its choices as token ids: those of all of them up to `shared`, then each one's own.

    `scored` marks, for every choice, the tokens of it that count.
    """

    ids: tuple[tuple[int, ...], ...]
    scored: tuple[tuple[bool, ...], ...]
    shared: int

    @property
    def longest(self) -> int:
        """Tokens of the longest choice with its prompt."""
        return max(map(len, self.ids))


def ranked_rows(chat: ChatTemplate, questions: Sequence[Question]) -> list[RankedRow]:
    """The questions with each choice in place of the answer, as training would encode them.

    The tokens of the choice's words count; the token that ends the turn does not (T0 has none). Raises DataError where
    the template cannot render a choice.
    """
    wanted = [(question, choice) for question in questions for choice in question.choices]
    conversations = [
        Conversation((*question.messages, Message("assistant", choice)), question.tools) for question, choice in wanted
    ]
    encoded = iter(chat.rows(conversations, loss_on="last_assistant"))
    made = []
    for question in questions:
        rows = [_last(next(encoded), choice) for choice in question.choices]
        ids = [tuple(map(int, row.input_ids)) for row in rows]
        scored = [_words(row, chat.stop_ids) for row in rows]
        first = min(mask.index(True) for mask in scored)
        made.append(RankedRow(tuple(ids), tuple(scored), min(first, _common(ids))))
    return made


def choice_scores(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[RankedRow],
    *,
    pad_id: int,
    progress: Callable[[int], None] | None = None,
) -> list[list[Choice]]:
    """The log-probability of every choice of every row, as if each were computed alone, up to rounding.

    In float32 that is 1e-5 nats on tiny models, and 5e-5 with the embedded base, whose sums reach 55 nats.
    Rows of similar length share a batch. What the choices of a row have in common goes through the model once; its keys
    and values are repeated for each choice. Mode and random state of the model stay as they are.
    """
    base = transformer(model)
    if not has_plain_cache(base):
        return _without_cache(model, rows, pad_id=pad_id, progress=progress)
    position_bytes = shape_of(base.get_output_embeddings().weight)[0] * 4
    found: dict[int, list[Choice]] = {}

    def measure(batch: list[int]) -> None:
        found.update(zip(batch, _batch_scores(base, [rows[place] for place in batch], pad_id), strict=True))
        if progress:
            progress(len(batch))

    with evaluating(model):
        for batch in _batches(rows, most_positions=max(1, _LOGIT_BYTES // position_bytes)):
            in_halves(batch, measure)
    return [found[place] for place in range(len(rows))]


def _last(encoded: list[TokenRow] | RowError, choice: str) -> TokenRow:
    """The row that holds the choice. Raises DataError."""
    if isinstance(encoded, RowError):
        raise DataError(Problem(f"the chat template cannot render the choice {choice!r}: {encoded.reason}"))
    row = encoded[-1]
    if not row.mask.any():
        raise DataError(Problem("a choice has no token to predict", "give every choice a text", key="choices"))
    return row


def _words(row: TokenRow, stop_ids: Sequence[int]) -> tuple[bool, ...]:
    """The tokens of the answer, without the one that ends the turn where there are others."""
    mask = np.array(row.mask, dtype=bool)
    mask[0] = False  # nothing predicts it
    places = np.flatnonzero(mask)
    end = next((place for place in places if int(row.input_ids[place]) in set(stop_ids)), None)
    if end is not None and end > places[0]:
        mask[end:] = False
    return tuple(bool(value) for value in mask)


def _common(rows: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all rows have in common at their beginning."""
    shortest = min(map(len, rows))
    return next((place for place in range(shortest) if len({row[place] for row in rows}) > 1), shortest)


def _batches(rows: Sequence[RankedRow], *, most_positions: int) -> Iterator[list[int]]:
    """Row numbers in batches, longest first, at least one row each."""
    batch: list[int] = []
    choices = longest = own = 0
    for place in sorted(range(len(rows)), key=lambda place: -rows[place].longest):
        row = rows[place]
        longest_now, own_now = max(longest, row.longest), max(own, row.longest - row.shared + 1)
        choices_now = choices + len(row.ids)
        if batch and (choices_now * longest_now > _BATCH_TOKENS or choices_now * own_now > most_positions):
            yield batch
            batch, longest_now, own_now, choices_now = [], row.longest, row.longest - row.shared + 1, len(row.ids)
        batch.append(place)
        choices, longest, own = choices_now, longest_now, own_now
    if batch:
        yield batch


def _batch_scores(base: PreTrainedModel, rows: Sequence[RankedRow], pad_id: int) -> list[list[Choice]]:
    """One forward pass over the prompts, one over all choices of them."""
    from transformers import DynamicCache

    heads = [max(0, row.shared - 1) for row in rows]  # the last shared token predicts the first own one
    length, device = max(heads), base.device
    accepted = inspect.signature(base.forward).parameters
    cache = DynamicCache(config=base.config)
    owners = [place for place, row in enumerate(rows) for _ in row.ids]
    mask_BT = torch.zeros((len(rows), length), dtype=torch.long)
    if length:
        ids_BT = torch.full((len(rows), length), pad_id, dtype=torch.long)
        for place, (row, head) in enumerate(zip(rows, heads, strict=True)):
            ids_BT[place, length - head :] = torch.tensor(row.ids[0][:head], dtype=torch.long)
            mask_BT[place, length - head :] = 1
        inputs = {
            "input_ids": ids_BT.to(device),
            "attention_mask": mask_BT.to(device),
            "position_ids": (mask_BT.cumsum(dim=1) - 1).clamp(min=0).to(device),
            "logits_to_keep": 1,
        }
        base(past_key_values=cache, use_cache=True, **{k: v for k, v in inputs.items() if k in accepted})
        cache.batch_select_indices(torch.tensor(owners, device=device))
    ids_CL, given_CL, scored_CL = _continuations(rows, heads, pad_id)
    starts_C1 = torch.tensor([[heads[owner]] for owner in owners])
    inputs = {
        "input_ids": ids_CL.to(device),
        "attention_mask": torch.cat([mask_BT[owners], given_CL.long()], dim=1).to(device),
        "position_ids": (starts_C1 + torch.arange(ids_CL.shape[1])[None]).to(device),
    }
    output = base(past_key_values=cache, use_cache=True, **{k: v for k, v in inputs.items() if k in accepted})
    logits_CLV = output.logits[:, :-1].float()
    targets_CL = ids_CL[:, 1:].to(device)
    nll_CL = torch.nn.functional.cross_entropy(logits_CLV.transpose(1, 2), targets_CL, reduction="none").double()
    sums = (nll_CL * scored_CL[:, 1:].to(device)).sum(dim=1).tolist()
    counts = scored_CL[:, 1:].sum(dim=1).tolist()
    found = iter(Choice(-nll, count) for nll, count in zip(sums, counts, strict=True))
    return [[next(found) for _ in row.ids] for row in rows]


def _continuations(
    rows: Sequence[RankedRow], heads: Sequence[int], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, which are given, and which count, all (C, L), of what follows the heads; padded on the right."""
    parts = [
        (ids[head:], scored[head:])
        for row, head in zip(rows, heads, strict=True)
        for ids, scored in zip(row.ids, row.scored, strict=True)
    ]
    longest = max(len(ids) for ids, _ in parts)
    ids_CL = torch.full((len(parts), longest), pad_id, dtype=torch.long)
    given_CL = torch.zeros((len(parts), longest), dtype=torch.bool)
    scored_CL = torch.zeros((len(parts), longest), dtype=torch.bool)
    for place, (ids, scored) in enumerate(parts):
        ids_CL[place, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        given_CL[place, : len(ids)] = True
        scored_CL[place, : len(ids)] = torch.tensor(scored)
    return ids_CL, given_CL, scored_CL


def _without_cache(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[RankedRow],
    *,
    pad_id: int,
    progress: Callable[[int], None] | None,
) -> list[list[Choice]]:
    """Every choice with its whole prompt, for architectures whose state is no plain KV cache."""
    alone = [
        TokenRow(np.array(ids, dtype=np.int32), np.array(scored, dtype=bool), 0, "", 0, frozenset())
        for row in rows
        for ids, scored in zip(row.ids, row.scored, strict=True)
    ]
    found = iter(row_losses(model, alone, pad_id=pad_id))
    scores = [[Choice(-loss.nll, loss.tokens) for loss in (next(found) for _ in row.ids)] for row in rows]
    if progress:
        progress(len(rows))
    return scores

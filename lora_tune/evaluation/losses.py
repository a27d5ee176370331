"""Held-out loss, row by row and exact: padding, batches and neighbours change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_tune.model.divided import shape_of
from lora_tune.model.generation import evaluating, in_halves, transformer
from lora_tune.model.kernels.loss_head import Head, find_head, input_of, token_losses

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lora_tune.data.chat_template import TokenRow

BATCH_TOKENS = 8_192  # padded tokens of one batch
_POSITIONS = 256  # of a row whose log-probabilities are computed at once: 1 MB each for 128k tokens in float32
_LOGIT_BYTES = 512 * 2**20  # most bytes of logits of one batch, unless a single row needs more


@dataclass(frozen=True, slots=True)
class RowLoss:
    """Summed negative log-likelihood (nats) of a row's answer tokens, and how many they are."""

    nll: float
    tokens: int


def row_losses(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[TokenRow],
    *,
    pad_id: int,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> list[RowLoss]:
    """The loss of every row, in the order of the rows, as if each were computed alone (1e-6 in float32).

    Rows of similar length share a batch of at most `batch_tokens` tokens and are padded on the right. The model runs
    in its own dtype, without autocast; logits are made at the positions that predict a labelled token only, a tile of
    them at a time where the head is a plain one (`find_head`),
    log-probabilities in float32, sums in float64. Mode and random state of the model stay as they are. A row whose
    mask is empty counts 0 tokens.
    """
    base = transformer(model)
    vocabulary = shape_of(base.get_output_embeddings().weight)[0]
    position_bytes = vocabulary * base.dtype.itemsize
    found: dict[int, RowLoss] = {}

    heads: list[Head | None] = []  # found with the first batch

    def measure(batch: list[int]) -> None:
        if not heads:
            heads.append(find_head(base, kernels="off"))
        losses = _batch_losses(base, [rows[place] for place in batch], pad_id, heads[0])
        found.update(zip(batch, losses, strict=True))
        if progress:
            progress(len(batch))

    with evaluating(model):
        for batch in _batches(rows, batch_tokens, most_positions=max(1, _LOGIT_BYTES // position_bytes)):
            in_halves(batch, measure)
    return [found[place] for place in range(len(rows))]


def mean_loss(losses: Sequence[RowLoss]) -> float:
    """Nats per answer token: the sum of all losses over the number of tokens. Raises ValueError without tokens."""
    tokens = sum(row.tokens for row in losses)
    if not tokens:
        raise ValueError("a loss over no answer tokens has no value")
    return math.fsum(row.nll for row in losses) / tokens


def _batches(rows: Sequence[TokenRow], batch_tokens: int, *, most_positions: int) -> Iterator[list[int]]:
    """Row numbers in batches, longest rows first, at least one row each.

    A batch makes logits at every position that any of its rows needs: rows x positions stay below `most_positions`.
    """
    batch: list[int] = []
    needed_T = np.zeros(0, dtype=bool)
    for place in sorted(range(len(rows)), key=lambda place: -len(rows[place].input_ids)):
        mask_T = np.asarray(rows[place].mask)
        joined_T = needed_T.copy() if batch else np.zeros(len(mask_T), dtype=bool)
        joined_T[: len(mask_T)] |= mask_T
        count = len(batch) + 1
        if batch and (count * len(joined_T) > batch_tokens or count * int(joined_T.sum()) > most_positions):
            yield batch
            batch, joined_T = [], mask_T
        batch.append(place)
        needed_T = joined_T
    if batch:
        yield batch


def _batch_losses(base: PreTrainedModel, rows: Sequence[TokenRow], pad_id: int, head: Head | None) -> list[RowLoss]:
    """Losses of rows that share one forward pass."""
    longest = max(len(row.input_ids) for row in rows)
    ids_BT = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    attention_BT = torch.zeros((len(rows), longest), dtype=torch.long)
    labelled_BT = torch.zeros((len(rows), longest), dtype=torch.bool)
    for place, row in enumerate(rows):
        length = len(row.input_ids)
        ids_BT[place, :length] = torch.from_numpy(row.input_ids.astype(np.int64))
        attention_BT[place, :length] = 1
        labelled_BT[place, :length] = torch.from_numpy(row.mask.astype(bool))
    labelled_BT[:, 0] = False  # nothing predicts the first token
    wanted = labelled_BT.any(dim=0).nonzero().squeeze(1)
    if not len(wanted):
        return [RowLoss(0.0, 0) for _ in rows]
    if head is not None:
        return _from_inputs(base, ids_BT, attention_BT, labelled_BT, head)
    device = base.device
    keep = (wanted - 1).to(device)
    output = base(
        input_ids=ids_BT.to(device), attention_mask=attention_BT.to(device), logits_to_keep=keep, use_cache=False
    )
    logits_BPV = output.logits
    if logits_BPV.shape[1] != len(wanted):  # an architecture that ignores logits_to_keep
        logits_BPV = logits_BPV[:, keep]
    losses = []
    for place in range(len(rows)):
        own_P = labelled_BT[place, wanted]
        places_P = own_P.nonzero().squeeze(1)
        nll = torch.zeros((), dtype=torch.float64, device=device)
        for piece_P in places_P.split(_POSITIONS):
            logits_PV = logits_BPV[place, piece_P.to(device)].float()
            targets_P = ids_BT[place, wanted[piece_P]].to(device)
            nll += torch.nn.functional.cross_entropy(logits_PV, targets_P, reduction="none").double().sum()
        losses.append(RowLoss(float(nll), len(places_P)))
    return losses


def _from_inputs(
    base: PreTrainedModel, ids_BT: torch.Tensor, attention_BT: torch.Tensor, labelled_BT: torch.Tensor, head: Head
) -> list[RowLoss]:
    """The losses of a batch from the inputs of its head, whose logits are made tile by tile."""
    with input_of(head.layer) as seen:
        base(input_ids=ids_BT.to(base.device), attention_mask=attention_BT.to(base.device), use_cache=False)
    row_N, place_N = labelled_BT.nonzero(as_tuple=True)
    x_NH = seen.pop()[row_N.to(base.device), (place_N - 1).to(base.device)]
    losses_N = token_losses(x_NH, head, ids_BT[row_N, place_N].to(base.device)).double().cpu()
    counts = labelled_BT.sum(dim=1).tolist()
    return [RowLoss(float(own.sum()), len(own)) for own in losses_N.split(counts)]

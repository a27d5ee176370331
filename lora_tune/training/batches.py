"""Batches: the order of the rows, and the shape in which documents go through the model.

The collator of TRL puts a micro-batch into one long row. Attention that is told where documents begin
(`model/attention.py`) takes it so: `FlatCollator`. With a mask it would cost the square of that row: `FoldedCollator`
folds the same documents into several short rows, with fewer masked-out products and the same loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler

from lora_tune.model import attention
from lora_tune.recipe import Train

IGNORED = -100  # label of a token that is not trained
_LARGEST_WASTE = 0.25  # share of padding above which the micro-batch stays one row


class EpochSampler(Sampler[int]):
    """Every row once in an epoch, in an order that depends on the seed and the number of the epoch alone."""

    def __init__(self, rows: int, *, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self.epoch = 0
        self._known: tuple[int, list[int]] = (-1, [])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose order the next iteration gives."""
        self.epoch = epoch

    def order(self, epoch: int) -> list[int]:
        """The row numbers of this epoch, each once."""
        if self._known[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed << 24) + epoch)
            self._known = (epoch, torch.randperm(self.rows, generator=generator).tolist())
        return self._known[1]

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))

    def __len__(self) -> int:
        return self.rows


def share_of_step(rows: Sequence[int], *, micro: int, rank: int, world: int) -> list[list[int]]:
    """The micro-batches of one process from the rows of a step: every `world`-th, each row in exactly one of them.

    All processes get equally many; where the last step of an epoch has too few rows, the last ones are empty.
    """
    parts = [list(rows[start : start + micro]) for start in range(0, len(rows), micro)]
    count = -(-len(parts) // world)
    return [parts[place] if (place := number * world + rank) < len(parts) else [] for number in range(count)]


class ShareSampler(Sampler[list[int]]):
    """The micro-batches of one process, step by step, out of an order that all processes have."""

    def __init__(self, order: EpochSampler, *, micro: int, accumulation: int, rank: int, world: int) -> None:
        self.order = order
        self.micro = micro
        self.batch = micro * accumulation * world
        self.rank = rank
        self.world = world

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0)."""
        self.order.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        rows = list(self.order)
        for start in range(0, len(rows), self.batch):
            step = rows[start : start + self.batch]
            yield from share_of_step(step, micro=self.micro, rank=self.rank, world=self.world)

    def __len__(self) -> int:
        whole, rest = divmod(self.order.rows, self.batch)
        accumulation = self.batch // (self.micro * self.world)
        return whole * accumulation + -(-rest // (self.micro * self.world))


def empty_batch(rows: Mapping[str, Any]) -> dict[str, Any]:
    """The first document of a row with nothing of it trained: what a process does while others have one more."""
    length = rows["seq_lengths"][0]
    ids = rows["input_ids"][:length]
    return {**rows, "input_ids": ids, "labels": [IGNORED] * length, "seq_lengths": [length]}


def fold(lengths: Sequence[int], *, hidden_size: int) -> tuple[list[tuple[int, int]], int, int]:
    """Put documents into rows of equal capacity so that linear layers and masked attention cost least together.

    Returns `(row, offset)` of every document, the number of rows and their capacity in tokens. First fit, longest
    document first; a row of capacity C costs about C * (6 * hidden_size + C) products in each layer.
    """
    longest, total = max(lengths), sum(lengths)
    best: tuple[list[tuple[int, int]], int, int] = (_first_fit(lengths, capacity=total), 1, total)
    least = total * (6 * hidden_size + total)
    for factor in (1.0, 1.25, 1.5, 2.0, 3.0, 4.0):
        capacity = min(total, int(longest * factor))
        places = _first_fit(lengths, capacity=capacity)
        rows = 1 + max(row for row, _ in places)
        cost = rows * capacity * (6 * hidden_size + capacity)
        if cost < least and rows * capacity <= total * (1 + _LARGEST_WASTE):
            best, least = (places, rows, capacity), cost
    return best


def _first_fit(lengths: Sequence[int], *, capacity: int) -> list[tuple[int, int]]:
    used: list[int] = []
    places = [(0, 0)] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda document: -lengths[document]):
        length = lengths[index]
        row = next((row for row, filled in enumerate(used) if filled + length <= capacity), len(used))
        if row == len(used):
            used.append(0)
        places[index] = (row, used[row])
        used[row] += length
    return places


def first_batches(
    rows: Iterable[Mapping[str, Any]], *, device: torch.device, count: int = 8
) -> list[dict[str, torch.Tensor]]:
    """The first `count` rows, each as `input_ids` and `position_ids` (1, T) with documents apart, as eva reads them."""
    batches = []
    for row in islice(rows, count):
        positions_T = torch.cat([torch.arange(length) for length in row["seq_lengths"]])
        ids_T = torch.tensor(row["input_ids"])
        batches.append({"input_ids": ids_T[None].to(device), "position_ids": positions_T[None].to(device)})
    return batches


def collator_for(model: Any, flat: Any, train: Train) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """The shape of batches that this model's attention computes fastest; `flat` is TRL's padding-free collator."""
    config = model.config.get_text_config()
    if attention.is_used(model):
        one_shape = train.compile == "layers" and train.packing  # rows that are nearly full anyway
        return FlatCollator(flat, flat.pad_token_id, train.max_length if one_shape else None)
    if config._attn_implementation in ("sdpa", "eager"):
        return FoldedCollator(flat, flat.pad_token_id, config.hidden_size)
    return flat  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class FlatCollator:
    """TRL's padding-free batch `(1, T)` with the bounds of its documents, for attention that reads them.

    With `row_tokens` a batch has that many for each row, and as many bounds as the next power of two, so that what was
    compiled for one batch fits the next: a document of padding, never trained, stands at the end.
    """

    flat: Callable[[list[dict[str, Any]]], dict[str, Any]]
    pad_id: int
    row_tokens: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `labels`, `position_ids` (1, T); `cu_seq_lens_q` and `_k` (documents + 1,); longest document."""
        flat = self.flat(rows)
        ids_BT, bounds_D = flat["input_ids"], flat["cu_seq_lens_q"]
        labels_BT, positions_BT, longest = flat["labels"], flat["position_ids"], int(flat["max_length_q"])
        if self.row_tokens is not None:
            longest = tokens = max(self.row_tokens * len(rows), ids_BT.shape[1])  # one number for all batches
            more = tokens - ids_BT.shape[1]
            ids_BT = nn.functional.pad(ids_BT, (0, more), value=self.pad_id)
            labels_BT = nn.functional.pad(labels_BT, (0, more), value=IGNORED)
            positions_BT = torch.cat([positions_BT, torch.arange(more)[None].to(positions_BT)], 1)
            count = 1 << len(bounds_D).bit_length()  # room for the padding's bound, at least
            bounds_D = nn.functional.pad(bounds_D, (0, count - len(bounds_D)), value=tokens)
        return {
            "input_ids": ids_BT,
            "labels": labels_BT,
            "position_ids": positions_BT,
            "cu_seq_lens_q": bounds_D,
            "cu_seq_lens_k": bounds_D,
            "max_length_q": longest,
            "max_length_k": longest,
        }


@dataclass(frozen=True, slots=True)
class FoldedCollator:
    """TRL's padding-free batch `(1, T)` folded into rows `(B, C)`; positions restart at every document.

    Padding stands at the end of a row, continues the positions of the last document and is never trained; a causal
    model cannot see it from the tokens before it.
    """

    flat: Callable[[list[dict[str, Any]]], dict[str, Any]]
    pad_id: int
    hidden_size: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of these rows: `input_ids`, `labels`, `position_ids`, each `(B, C)`."""
        flat = self.flat(rows)
        bounds_D = flat["cu_seq_lens_q"].long()
        lengths_D = bounds_D.diff()
        places, row_count, capacity = fold(lengths_D.tolist(), hidden_size=self.hidden_size)
        starts_D = torch.tensor([row * capacity + offset for row, offset in places])
        targets_T = torch.repeat_interleave(starts_D - bounds_D[:-1], lengths_D) + torch.arange(int(bounds_D[-1]))

        def spread(values: torch.Tensor, fill: int) -> torch.Tensor:
            folded = torch.full((row_count * capacity,), fill, dtype=values.dtype)
            folded[targets_T] = values[0]
            return folded.view(row_count, capacity)

        positions_BC = spread(flat["position_ids"], -1)
        steps_C = torch.arange(capacity)
        begins_BC = torch.where(positions_BC == 0, steps_C, 0).cummax(-1).values
        return {
            "input_ids": spread(flat["input_ids"], self.pad_id),
            "labels": spread(flat["labels"], IGNORED),
            "position_ids": torch.where(positions_BC < 0, steps_C - begins_BC, positions_BC),
        }

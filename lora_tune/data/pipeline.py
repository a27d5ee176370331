"""The pipeline: data sources to checked conversations, and conversations to the packed rows that are trained.

    read_conversations   files, hub      -> conversations, checked, split, hashed   (checking.py; no tokenizer)
    encode               conversations   -> token rows on disk, cached              (token_file.py)
                         token rows      -> pieces of at most max_length            (fit.py)
                         pieces          -> an epoch by weights, packed             (split.py, packing.py)
                         sequences       -> rows on disk, cached                    (packed_file.py)

In memory stay some 20 bytes a row; texts, tokens and what is known of each row are on disk and memory-mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_tune.data.chat_template import ChatTemplate, TokenRow
from lora_tune.data.checking import read_conversations
from lora_tune.data.conversation import Conversation
from lora_tune.data.fit import Documents, Fitting, Pieces
from lora_tune.data.kept_conversations import Conversations
from lora_tune.data.ledger import Ledger, Packing
from lora_tune.data.packed_file import packed_file
from lora_tune.data.packing import pack
from lora_tune.data.sources import SourceIdentity
from lora_tune.data.split import epoch_copies, mixing_weights
from lora_tune.data.store import StoredConversations
from lora_tune.data.token_file import TokenFile, encoder_fingerprint, token_file
from lora_tune.data.turn_drafts import LossOn
from lora_tune.errors import DataError, Problem
from lora_tune.recipe import DataSource, Limits, Mixing, Train

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Conversations", "Prepared", "encode", "read_conversations"]
NATURAL = Mixing()


@dataclass
class Prepared:
    """What is trained and what is held out.

    `train`: a packed sequence a row, with `input_ids`, `labels` (-100: not trained), `seq_lengths` of its documents and
    `rows`, [source, line] of each. `held_out_rows` are the token rows of `held_out`, of at most max_length tokens.
    `documents` are the token rows that were packed, in the order of the data and once each, whatever their weight.
    """

    train: Dataset
    documents: Documents
    held_out: tuple[Conversation, ...]
    held_out_rows: tuple[TokenRow, ...]
    ledger: Ledger
    identities: tuple[SourceIdentity, ...]

    def watched(self, tasks: Sequence[str]) -> tuple[tuple[Conversation, ...], tuple[TokenRow, ...]]:
        """What is evaluated during training: without the held-out `tasks`, which must not choose the weights; with
        them where nothing else is held out."""
        kept = tuple(row for row in self.held_out if row.task not in tasks)
        if not kept:
            return self.held_out, self.held_out_rows
        sources = {row.source for row in kept}  # a task is held out by whole sources
        return kept, tuple(row for row in self.held_out_rows if row.source in sources)


def encode(
    conversations: Conversations,
    chat: ChatTemplate,
    *,
    loss_on: LossOn,
    train: Train,
    limits: Limits,
    seed: int,
    mixing: Mixing = NATURAL,
) -> Prepared:
    """Token rows of all conversations, fitted, weighted and packed. Needs no model.

    Raises:
        DataError: rows that the template refuses (unless `on_bad_row: drop`), or a limit of the ledger is exceeded.
    """
    ledger = conversations.ledger
    fingerprint = encoder_fingerprint(chat)
    rows = token_file(conversations.train, chat, loss_on=loss_on, fingerprint=fingerprint)
    held_out_tokens = token_file(conversations.held_out, chat, loss_on=loss_on, fingerprint=fingerprint)
    _refuse(
        conversations.train, rows, conversations.data, held_out=conversations.held_out, held_out_rows=held_out_tokens
    )
    fitting = Fitting(conversations.train, rows, ledger, max_length=train.max_length)
    pieces = fitting.pieces(train.too_long)
    held_out, held_out_rows = _held_out(conversations.held_out, held_out_tokens, ledger, train)
    ledger.check(limits)
    weights = _weights(pieces, rows, conversations, mixing)
    epoch = _weighted(pieces, rows, conversations.train, weights, ledger=ledger, seed=seed)
    alone = np.array([not (train.packing and source.pack) for source in conversations.data])
    alone = alone[conversations.train.sources][rows.conversation[epoch.row]]
    sequences = pack(epoch.end - epoch.start, alone, max_length=train.max_length, seed=seed)
    ledger.packing = Packing(len(sequences), len(epoch), epoch.total_tokens, train.max_length)
    dataset = packed_file(sequences, epoch, rows, conversations.train)
    documents = Documents(pieces, rows, conversations.train)
    return Prepared(dataset, documents, held_out, held_out_rows, ledger, conversations.identities)


def _refuse(
    train: StoredConversations,
    rows: TokenFile,
    data: Sequence[DataSource],
    *,
    held_out: StoredConversations,
    held_out_rows: TokenFile,
) -> None:
    """Raises: DataError naming each row that the chat template refuses, where `on_bad_row` is not drop."""
    problems = []
    for conversations, tokens in ((train, rows), (held_out, held_out_rows)):
        for number, reason in tokens.errors.items():
            source = conversations.source(number)
            if data[min(source, len(data) - 1)].on_bad_row == "refuse":
                file, line = conversations.place(number)
                fix = "repair the row, or set on_bad_row: drop"
                problems.append(Problem(f"the chat template refuses the row: {reason}", fix, file=file, line=line))
    if problems:
        raise DataError(problems)


def _weights(pieces: Pieces, rows: TokenFile, conversations: Conversations, mixing: Mixing) -> list[float]:
    """How often a conversation of each source stands in an epoch: by the mixing, times the source's own weight."""
    kept = _kept(pieces, rows, conversations.train)
    counts = np.bincount(conversations.train.sources[kept], minlength=len(conversations.data))
    shares = mixing_weights(counts[: len(conversations.data)].tolist(), mixing)
    return [source.weight * share for source, share in zip(conversations.data, shares, strict=True)]


def _kept(pieces: Pieces, rows: TokenFile, conversations: StoredConversations) -> np.ndarray:
    """True (N,) for the conversations of which a piece is left."""
    found = np.zeros(len(conversations), dtype=bool)
    found[rows.conversation[pieces.row]] = True
    return found


def _weighted(
    pieces: Pieces,
    rows: TokenFile,
    conversations: StoredConversations,
    weights: Sequence[float],
    *,
    ledger: Ledger,
    seed: int,
) -> Pieces:
    """The pieces of one epoch: those of a conversation as often as the weight of its source says."""
    kept = _kept(pieces, rows, conversations)
    sources = conversations.sources
    copies = np.zeros(len(conversations), dtype=np.int32)
    copies[kept] = epoch_copies(sources[kept], weights, seed=seed)
    for number, account in enumerate(ledger.sources):
        account.epoch_rows = int(copies[sources == number].sum())
    times = copies[rows.conversation[pieces.row]]
    if (times == 1).all():
        return pieces
    return pieces.take(np.repeat(np.arange(len(pieces), dtype=np.int32), times))


def _held_out(
    conversations: StoredConversations, rows: TokenFile, ledger: Ledger, train: Train
) -> tuple[tuple[Conversation, ...], tuple[TokenRow, ...]]:
    """Conversations and token rows to evaluate on; those without a label are dropped and counted as such."""
    aside = Ledger([type(account)(name=account.name, format=account.format) for account in ledger.sources])
    pieces = Fitting(conversations, rows, aside, max_length=train.max_length).pieces(train.too_long)
    for account, counted in zip(ledger.sources, aside.sources, strict=True):
        account.held_out -= counted.dropped_rows
        for cause, count in counted.dropped.items():
            account.drop(f"{cause} (held out)", count.first, count.rows)
    kept = np.unique(rows.conversation[pieces.row]) if len(pieces) else ()
    return tuple(conversations[int(number)] for number in kept), tuple(Documents(pieces, rows, conversations))

"""What fits into max_length: whole token rows, cut ones, pieces; and what is lost, written into the ledger."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np

from lora_tune.data.chat_template import NOTES, TokenRow
from lora_tune.data.conversation import Conversation
from lora_tune.data.ledger import (
    CONTROL_TOKENS,
    LOST_END,
    NO_LABEL,
    PER_TURN,
    SPLIT,
    STRADDLES,
    TOO_LONG,
    TRUNCATED,
    Ledger,
    SourceLedger,
    place_of,
)
from lora_tune.data.store import StoredConversations
from lora_tune.data.token_file import TokenFile

TooLong = Literal["truncate", "drop", "split"]
_NOTED = {"straddles": STRADDLES, "control_tokens": CONTROL_TOKENS, "per_turn": PER_TURN}


@dataclass(frozen=True)
class Pieces:
    """Documents to train on: tokens `start` to `end` of token row `row`, each array (N,) int32: 12 bytes a document."""

    row: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    @property
    def total_tokens(self) -> int:
        """The tokens of all pieces."""
        return int(self.end.sum(dtype=np.int64) - self.start.sum(dtype=np.int64))

    def take(self, indices: np.ndarray) -> Pieces:
        """The pieces at `indices`, in that order."""
        return Pieces(self.row[indices], self.start[indices], self.end[indices])

    def tokens(self, rows: TokenFile, index: int) -> tuple[np.ndarray, np.ndarray]:
        """ids (T,) int32 and mask (T,) uint8 of a piece; its first token is never trained."""
        ids, mask = rows.tokens(int(self.row[index]))
        start, end = int(self.start[index]), int(self.end[index])
        if start:
            mask = mask[start:end].copy()
            mask[0] = 0
            return ids[start:end], mask
        return ids[:end], mask[:end]

    def gathered(self, rows: TokenFile, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids and mask as `tokens`, of the pieces at `indices` one behind the other."""
        start, end = self.start[indices], self.end[indices]
        ids, mask = rows.gathered(self.row[indices], start, end)
        mask[(np.cumsum(end - start) - (end - start))[start > 0]] = 0
        return ids, mask


class Documents(Sequence[TokenRow]):
    """Pieces as token rows with their places; each is read from disk when it is asked for."""

    def __init__(self, pieces: Pieces, rows: TokenFile, conversations: StoredConversations) -> None:
        self.pieces, self._rows, self._conversations = pieces, rows, conversations

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, (N,) int32."""
        return self.pieces.end - self.pieces.start

    def __len__(self) -> int:
        return len(self.pieces)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> Documents: ...
    def __getitem__(self, index: int | slice) -> TokenRow | Documents:
        if isinstance(index, slice):
            return Documents(self.pieces.take(np.arange(len(self))[index]), self._rows, self._conversations)
        row = int(self.pieces.row[index])
        ids, mask = self.pieces.tokens(self._rows, index)
        number = int(self._rows.conversation[row])
        file, line = self._conversations.place(number)
        notes = frozenset(name for bit, name in enumerate(NOTES) if self._rows.notes[row] >> bit & 1)
        task = template = ""
        if self._conversations.store.names_tasks:
            conversation = self._conversations[number]
            task, template = conversation.task, conversation.template
        return TokenRow(ids, mask.astype(bool), self._conversations.source(number), file, line, notes, task, template)

    def conversation(self, index: int) -> Conversation:
        """The conversation that a document, or a piece of it, was made of."""
        return self._conversations[int(self._rows.conversation[int(self.pieces.row[index])])]

    def of_row(self, number: int) -> Documents:
        """The documents of the `number`-th row of the data that has any (from 1). Raises: IndexError."""
        rows = np.unique(self._rows.conversation[self.pieces.row])
        if not 1 <= number <= len(rows):
            raise IndexError(len(rows))
        mine = np.flatnonzero(self._rows.conversation[self.pieces.row] == rows[number - 1])
        return Documents(self.pieces.take(mine), self._rows, self._conversations)


class Fitting:
    """Fits the token rows of some conversations, and keeps the account of them in the ledger's training side."""

    def __init__(self, conversations: StoredConversations, rows: TokenFile, ledger: Ledger, *, max_length: int) -> None:
        self._conversations, self._rows, self._ledger, self._max_length = conversations, rows, ledger, max_length
        self._found = array("i")  # row, start and end of each piece that is no whole row
        self._why_none: dict[int, str] = dict.fromkeys(rows.errors, "refused by the chat template")

    def pieces(self, too_long: TooLong) -> Pieces:
        """All pieces in the order of the token rows; text rows are always split."""
        rows, ledger = self._rows, self._ledger.sources
        fits = (rows.length <= self._max_length) & (rows.trained > 0)
        self._account_whole(fits)
        for row in np.flatnonzero(~fits).tolist():
            account = ledger[self._source(row)]
            split = too_long == "split" or account.format == "text"
            account.tokens_read += int(rows.length[row])
            account.longest = max(account.longest, int(rows.length[row]))
            if not rows.trained[row]:
                self._drop(row, account, NO_LABEL)
            elif split:
                self._split(row, account)
            elif too_long == "drop":
                self._drop(row, account, TOO_LONG)
            else:
                self._truncate(row, account)
        whole = np.flatnonzero(fits).astype(np.int32)
        found = Pieces(whole, np.zeros(len(whole), np.int32), rows.length[whole])
        if self._found:
            cut = np.frombuffer(self._found, dtype=np.intc).reshape(-1, 3)
            number = np.concatenate([found.row, cut[:, 0]])
            start = np.concatenate([found.start, cut[:, 1]])
            end = np.concatenate([found.end, cut[:, 2]])
            found = Pieces(number, start, end).take(np.lexsort((start, number)))
        self._account_conversations(found)
        return found

    def _source(self, row: int) -> int:
        return self._conversations.source(int(self._rows.conversation[row]))

    def _place(self, row: int) -> str:
        return place_of(*self._conversations.place(int(self._rows.conversation[row])))

    def _account_whole(self, fits: np.ndarray) -> None:
        rows = self._rows
        source_of_row = self._conversations.sources[rows.conversation]
        for number, account in enumerate(self._ledger.sources):
            mine = source_of_row == number
            whole = mine & fits
            tokens = int(rows.length[whole].sum())
            account.tokens_read += tokens
            account.tokens_kept += tokens
            account.tokens_trained += int(rows.trained[whole].sum())
            account.token_rows += int(whole.sum())
            account.longest = max(account.longest, int(rows.length[whole].max(initial=0)))
            for bit, name in enumerate(NOTES):
                if name in _NOTED:
                    noted = np.flatnonzero(mine & ((rows.notes >> bit & 1) == 1))
                    _, first = np.unique(rows.conversation[noted], return_index=True)
                    if len(first):
                        account.note(_NOTED[name], self._place(int(noted[0])), len(first))

    def _drop(self, row: int, account: SourceLedger, why: str) -> None:
        account.tokens_dropped += int(self._rows.length[row])
        self._why_none.setdefault(int(self._rows.conversation[row]), why)

    def _keep(self, row: int, start: int, end: int, account: SourceLedger) -> None:
        self._found.extend((row, start, end))
        account.token_rows += 1
        account.tokens_kept += end - start
        mask = self._rows.tokens(row)[1]
        account.tokens_trained += int(mask[start + (start > 0) : end].sum())

    def _truncate(self, row: int, account: SourceLedger) -> None:
        length, kept = int(self._rows.length[row]), self._max_length
        if not self._rows.tokens(row)[1][:kept].any():
            self._drop(row, account, NO_LABEL)
            return
        self._keep(row, 0, kept, account)
        account.tokens_lost += length - kept
        account.note(TRUNCATED, self._place(row))
        if self._rows.tokens(row)[1][kept:].any():
            account.note(LOST_END, self._place(row))

    def _split(self, row: int, account: SourceLedger) -> None:
        length, mask = int(self._rows.length[row]), self._rows.tokens(row)[1]
        for start in range(0, length, self._max_length):
            end = min(start + self._max_length, length)
            if mask[start + (start > 0) : end].any():
                self._keep(row, start, end, account)
            else:
                account.tokens_lost += end - start
                account.note("a piece without a label is dropped", self._place(row))
        account.note(SPLIT, self._place(row))

    def _account_conversations(self, found: Pieces) -> None:
        """Conversations without a piece are dropped; those with some turns left note the turns that are not."""
        kept = np.zeros(len(self._conversations), dtype=bool)
        kept[self._rows.conversation[found.row]] = True
        for number, why in self._why_none.items():
            account = self._ledger.sources[self._conversations.source(number)]
            place = place_of(*self._conversations.place(number))
            if kept[number]:
                account.note(f"a turn is dropped: {why}", place)
            else:
                account.drop(why, place)
        sources = self._conversations.sources
        for number, account in enumerate(self._ledger.sources):
            account.kept = int(np.count_nonzero(kept & (sources == number)))

"""The checking pass: from data sources to conversations that can be trained on.

Every row of every source is read once and checked (JSON, columns, roles, order of turns, answers) before any model or
tokenizer is loaded. Good rows go to a store on disk; all bad ones are named in one error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from lora_tune.data.detect import LOOKED_AT, Detected, chosen
from lora_tune.data.formats import FIELDS, FORMATS, RESERVED, check_columns
from lora_tune.data.ledger import CONTRADICTION, DUPLICATE, Ledger, SourceLedger, place_of
from lora_tune.data.messages import order_notes
from lora_tune.data.rows import WHOLE_FILE, BadRow, Record, did_you_mean
from lora_tune.data.sources import Source, SourceIdentity, open_source
from lora_tune.data.split import at_most, contradictions, hold_out_some, repeats
from lora_tune.data.store import ConversationStore, StoredConversations, content_of
from lora_tune.errors import DataError, Problem, RecipeError
from lora_tune.recipe import DataSource
from lora_tune.recipe_values import SHARE

_REMOTE_CHECK_EVERY = 10_000  # rows of a remote stream between two looks at the problems found
_WORTH_A_WARNING = frozenset(field for fields in FIELDS.values() for field in fields) - {"history", "input"}


@dataclass
class Conversations:
    """Checked conversations: `train` and `held_out` read a row from disk when it is asked for."""

    data: tuple[DataSource, ...]
    train: StoredConversations
    held_out: StoredConversations
    ledger: Ledger
    identities: tuple[SourceIdentity, ...]
    has_tools: bool


def read_conversations(data: Sequence[DataSource], *, hold_out: int | str, seed: int) -> Conversations:
    """Read and check every row of every source, and set rows apart for evaluation.

    `hold_out`: a number of rows, a share such as "2%", or a data file of its own.

    Raises:
        DataError: every bad row of all sources; equal content in train and held-out file.
        UsageError: a source that is missing or unusable.
        RecipeError: `columns` names a field that the format does not have.
    """
    _check_fields(data)
    sources = [open_source(source, key=f"data.{number}.source") for number, source in enumerate(data)]
    apart = _hold_out_file(hold_out, data)
    pass_ = _CheckingPass()
    for number, (source, wanted) in enumerate(zip(sources, data, strict=True)):
        pass_.read(source, wanted, number=number)
    if apart is not None:
        pass_.read(open_source(apart, key="eval.hold_out"), apart, number=len(data))
    if pass_.problems:
        raise DataError(pass_.problems)
    return _divided(pass_, tuple(data), hold_out, seed=seed)


def _check_fields(data: Sequence[DataSource]) -> None:
    problems = []
    for number, source in enumerate(data):
        known = (
            FIELDS[source.format]
            if source.format != "auto"
            else tuple({f for fields in FIELDS.values() for f in fields})
        )
        for field in source.columns or {}:
            if field not in known:
                fix = did_you_mean(field, known) or f"format {source.format} has {', '.join(sorted(known))}"
                key = f"data.{number}.columns.{field}"
                problems.append(Problem(f"no such field of format {source.format}", fix, key=key))
    if problems:
        raise RecipeError(problems)


def _hold_out_file(hold_out: int | str, data: Sequence[DataSource]) -> DataSource | None:
    if isinstance(hold_out, int) or SHARE.fullmatch(hold_out):
        return None
    like = data[0]
    return DataSource(source=hold_out, format=like.format, columns=like.columns, on_bad_row=like.on_bad_row)


class _CheckingPass:
    """Reads sources one after another into one store, and gathers what is wrong."""

    def __init__(self) -> None:
        self.store = ConversationStore()
        self.ledger = Ledger()
        self.problems: list[Problem] = []
        self.identities: list[SourceIdentity] = []
        self.has_tools = False

    def read(self, source: Source, wanted: DataSource, *, number: int) -> None:
        """Every record of a source: kept in the store, dropped and counted, or a problem."""
        account = SourceLedger(name=source.name)
        self.ledger.sources.append(account)
        records = source.records(numbered_columns=_numbered(wanted))
        looked_at, detected = self._detect(records, wanted, source.name)
        columns: dict[str, tuple[int, str, int]] = {}  # name: rows, first file and line
        hasher = hashlib.sha256()
        before = len(self.problems)
        for file, record in chain(looked_at, records):
            account.read += 1
            self._count_columns(columns, file, record)
            try:
                self._keep(record, detected, wanted, file=file, number=number, hasher=hasher if source.hub else None)
            except BadRow as bad:
                self._refuse_or_drop(bad, account, wanted, file=file, line=record.line)
            if source.hub and account.read % _REMOTE_CHECK_EVERY == 0 and len(self.problems) > before:
                break
        if detected is not None:
            account.format, account.why = detected.format, detected.why
            self._check_column_names(columns, detected, account)
        if not account.read:
            self.problems.append(Problem("no rows", "check that the right file is named", file=source.name))
        self.identities.append(
            SourceIdentity(
                source.name,
                account.format,
                source.content_hash() or hasher.hexdigest(),
                account.read,
                source.revision,
                account.why,
            )
        )

    def _detect(
        self, records: Iterator[tuple[str, Record]], wanted: DataSource, name: str
    ) -> tuple[list[tuple[str, Record]], Detected | None]:
        """The records looked at (to be read again), and the format; None where no row is readable or nothing fits."""
        looked_at: list[tuple[str, Record]] = []
        rows: list[dict[str, Any]] = []
        while len(rows) < LOOKED_AT and len(looked_at) < 50 * LOOKED_AT:
            found = next(records, None)
            if found is None:
                break
            looked_at.append(found)
            if found[1].row is not None:
                rows.append(found[1].row)
        if not rows:
            return looked_at, None
        try:
            return looked_at, chosen(wanted.format, wanted.columns, rows)
        except BadRow as bad:
            file, record = next(found for found in looked_at if found[1].row is not None)
            self.problems.append(bad.as_problem(file, record.line))
            return looked_at, None

    def _count_columns(self, columns: dict[str, tuple[int, str, int]], file: str, record: Record) -> None:
        for name in record.row or ():
            rows, *first = columns.get(name, (0, file, record.line))
            columns[name] = (rows + 1, *first)  # type: ignore[assignment]

    def _keep(
        self, record: Record, detected: Detected | None, wanted: DataSource, *, file: str, number: int, hasher: object
    ) -> None:
        """Convert a row and put it into the store. Raises: BadRow."""
        if record.bad is not None:
            raise record.bad
        if detected is None or record.row is None:
            return
        check_columns(record.row, detected.format, detected.fields)
        conversation = FORMATS[detected.format](record.row, detected.fields)
        self.has_tools = self.has_tools or bool(conversation.tools)
        account = self.ledger.sources[number]
        for note in order_notes(conversation.messages):
            account.note(note, place_of(file, record.line))
        account.kept += 1
        self.store.append(conversation, source=number, file=file, line=record.line)
        if hasher is not None:
            hasher.update(content_of(conversation))  # type: ignore[attr-defined]

    def _refuse_or_drop(self, bad: BadRow, account: SourceLedger, wanted: DataSource, *, file: str, line: int) -> None:
        if wanted.on_bad_row == "drop" and bad.cause != WHOLE_FILE:
            account.drop(bad.cause, place_of(file, line))
        else:
            self.problems.append(bad.as_problem(file, line))

    def _check_column_names(
        self, columns: dict[str, tuple[int, str, int]], detected: Detected, account: SourceLedger
    ) -> None:
        used = set(detected.fields.values())
        for name, (rows, file, line) in columns.items():
            if name in RESERVED and name not in used:
                reason = f"column `{name}` in {rows} rows: the name is reserved for tokens, which are made here"
                self.problems.append(Problem(reason, "remove or rename the column", file=file, line=line))
            elif name not in used:
                account.unused_columns.append(name)
                if name in _WORTH_A_WARNING:
                    account.note(f"column `{name}` is not used", place_of(file, line), rows)


def _numbered(wanted: DataSource) -> int:
    """How many numbered columns the recipe reads; 0 where it names columns, or none."""
    numbers = list((wanted.columns or {}).values())
    return max(map(int, numbers)) if numbers and all(name.isdecimal() for name in numbers) else 0


def _divided(pass_: _CheckingPass, data: tuple[DataSource, ...], hold_out: int | str, *, seed: int) -> Conversations:
    """Apply max_rows, count duplicates and hold rows out. Raises: DataError."""
    store, ledger = pass_.store, pass_.ledger
    from_file = len(ledger.sources) > len(data)
    caps = [source.max_rows for source in data] + ([None] if from_file else [])
    taken = at_most(store, caps, seed=seed)
    for number, account in enumerate(ledger.sources):
        kept = int(np.count_nonzero(store.sources[taken] == number))
        account.left_by_max_rows, account.kept = account.kept - kept, kept
    _count_repeats(store, taken, ledger)
    digests = store.digests[taken]
    apart = store.sources[taken] == len(data) if from_file else hold_out_some(digests, hold_out, seed=seed)
    if from_file:
        _refuse_leaks(store, taken[~apart], taken[apart])
    for number, account in enumerate(ledger.sources):
        account.held_out = int(np.count_nonzero(apart & (store.sources[taken] == number)))
        account.kept -= account.held_out
    if not from_file and hold_out not in (0, "0%") and not apart.any():
        reason = "no row can be held out: there is one row, or all rows are the same"
        ledger.notices.append(
            Problem(reason, "set eval.hold_out to 0 or to a file", key="eval.hold_out", severity="warning")
        )
    train = StoredConversations(store, taken[~apart])
    held_out = StoredConversations(store, taken[apart])
    return Conversations(data, train, held_out, ledger, tuple(pass_.identities), pass_.has_tools)


def _count_repeats(store: ConversationStore, taken: np.ndarray, ledger: Ledger) -> None:
    repeated = taken[repeats(store.digests[taken])]
    for what, rows in ((DUPLICATE, repeated), (CONTRADICTION, contradictions(store, taken))):
        for row in rows:
            ledger.sources[int(store.sources[row])].note(what, place_of(*store.place(int(row))))


def _refuse_leaks(store: ConversationStore, train: np.ndarray, held_out: np.ndarray) -> None:
    """Raises: DataError naming every held-out row whose content is trained as well."""
    places = {digest.tobytes(): int(row) for row, digest in zip(train, store.digests[train], strict=True)}
    problems = []
    for row in held_out:
        trained = places.get(store.digests[row].tobytes())
        if trained is not None:
            file, line = store.place(int(row))
            reason = f"this held-out row is in the training data as well ({':'.join(map(str, store.place(trained)))})"
            problems.append(Problem(reason, "remove it on one side", file=file, line=line))
    if problems:
        raise DataError(problems)

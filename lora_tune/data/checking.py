"""The checking pass: from data sources to conversations that can be trained on.

Every row of every source is read once and checked (JSON, columns, roles, order of turns, answers) before any model or
tokenizer is loaded. Good rows go to a store on disk; all bad ones are named in one error. Files that were read before
are not read again (kept_conversations.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import PurePath
from typing import Any

from lora_tune.data.detect import LOOKED_AT, Detected, chosen
from lora_tune.data.dividing import Apart, CheckedRows, divide
from lora_tune.data.formats import FIELDS, FORMATS, NAMED_ONLY, RESERVED, check_columns
from lora_tune.data.kept_conversations import Conversations, keep, kept, key_of
from lora_tune.data.ledger import Ledger, SourceLedger, place_of
from lora_tune.data.messages import order_notes
from lora_tune.data.prompted import Prompts, open_prompts, raw_row
from lora_tune.data.rendering import check_variables
from lora_tune.data.rows import WHOLE_FILE, BadRow, Record, did_you_mean
from lora_tune.data.sources import Source, SourceIdentity, open_source
from lora_tune.data.store import ConversationStore, content_of
from lora_tune.errors import DataError, Problem, RecipeError
from lora_tune.recipe import DataSource, Eval
from lora_tune.recipe_values import SHARE

_REMOTE_CHECK_EVERY = 10_000  # rows of a remote stream between two looks at the problems found
_GUESSED = frozenset(field for name, fields in FIELDS.items() for field in fields if name not in NAMED_ONLY)
_WORTH_A_WARNING = _GUESSED - {"history", "input"}


def read_conversations(data: Sequence[DataSource], *, hold_out: int | str | Eval, seed: int) -> Conversations:
    """Read and check every row of every source, render those with prompts, and set rows apart for evaluation.

    `hold_out`: a number of rows, a share such as "2%", a data file of its own; or the recipe's `eval` section, which
    may hold out whole tasks as well.

    Raises:
        DataError: every bad row of all sources; a row on both sides; a template that fails or does not end.
        UsageError: a source or prompt file that is missing or unusable.
        RecipeError: `columns` names a field that the format does not have; a prompt file or template that cannot be.
    """
    _check_fields(data)
    apart = Apart.of(hold_out)
    sources = [open_source(source, key=f"data.{number}.source") for number, source in enumerate(data)]
    from_file = _hold_out_file(apart.rows, data)
    prompts = open_prompts(data)
    if from_file is not None and 0 in prompts:
        prompts[len(data)] = prompts[0]
    held_out_file = [] if from_file is None else [open_source(from_file, key="eval.hold_out")]
    wanted = _Wanted(tuple(data), from_file, prompts, apart, seed)
    key = wanted.key([*sources, *held_out_file])
    found = kept(key, tuple(data)) if key is not None else None
    if found is None:
        found = _read(sources, held_out_file, wanted)
        if key is not None and key == wanted.key([*sources, *held_out_file]):  # no file has changed meanwhile
            keep(key, found)
    return found


@dataclass(frozen=True)
class _Wanted:
    """What the recipe asks for: its sources, the held-out file if there is one, and how rows are set apart."""

    data: tuple[DataSource, ...]
    from_file: DataSource | None
    prompts: dict[int, Prompts]
    apart: Apart
    seed: int

    def key(self, sources: Sequence[Source]) -> str | None:
        """Under which what is read from these sources is kept; None where it is not."""
        files = [(prompts.file, prompts.prefix) for _, prompts in sorted(self.prompts.items())]
        data = [*self.data, *([self.from_file] if self.from_file else [])]
        return key_of(sources, [files, self.apart, self.seed], data=data)


def _read(sources: Sequence[Source], held_out_file: Sequence[Source], wanted: _Wanted) -> Conversations:
    """Read, check and divide. Raises: as `read_conversations`."""
    data, from_file = wanted.data, wanted.from_file
    pass_ = _CheckingPass(wanted.prompts)
    for number, (source, asked) in enumerate(zip(sources, data, strict=True)):
        pass_.read(source, asked, number=number)
    if from_file is not None:
        pass_.read(held_out_file[0], from_file, number=len(data))
    if pass_.problems:
        raise DataError(pass_.problems)
    rows = CheckedRows(pass_.store, data, tuple(pass_.wanted), wanted.prompts, pass_.ledger, wanted.seed)
    train, held_out = divide(rows, wanted.apart)
    return Conversations(data, train, held_out, pass_.ledger, pass_.all_identities(), pass_.has_tools)


def _check_fields(data: Sequence[DataSource]) -> None:
    problems = []
    for number, source in enumerate(data):
        known = FIELDS[source.format] if source.format != "auto" else tuple(_GUESSED)
        for field in source.columns or {}:
            if field not in known and source.prompts is None:
                fix = did_you_mean(field, known) or f"format {source.format} has {', '.join(sorted(known))}"
                key = f"data.{number}.columns.{field}"
                problems.append(Problem(f"no such field of format {source.format}", fix, key=key))
    if problems:
        raise RecipeError(problems)


def _hold_out_file(hold_out: int | str, data: Sequence[DataSource]) -> DataSource | None:
    if isinstance(hold_out, int) or SHARE.fullmatch(hold_out):
        return None
    changes = {"source": hold_out, "max_rows": None, "weight": 1.0, "invert": "0%"}
    return data[0].model_copy(update=changes | {"config": None, "split": "train", "revision": None})


class _CheckingPass:
    """Reads sources one after another into one store, and gathers what is wrong."""

    def __init__(self, prompts: Mapping[int, Prompts]) -> None:
        self.prompts = prompts
        self.wanted: list[DataSource] = []
        self.store = ConversationStore()
        self.ledger = Ledger()
        self.problems: list[Problem] = []
        self.identities: list[SourceIdentity] = []
        self.has_tools = False

    def read(self, source: Source, wanted: DataSource, *, number: int) -> None:
        """Every record of a source: kept in the store, dropped and counted, or a problem."""
        account = SourceLedger(name=source.name)
        self.ledger.sources.append(account)
        self.wanted.append(wanted)
        records = source.records(
            numbered_columns=_numbered(wanted), sni_shots=wanted.shots if wanted.format == "sni" else None
        )
        looked_at, detected = self._detect(records, wanted, number=number)
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
        self, records: Iterator[tuple[str, Record]], wanted: DataSource, *, number: int
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
            if number in self.prompts:
                return looked_at, self._prompted(self.prompts[number], wanted, rows)
            return looked_at, chosen(wanted.format, wanted.columns, rows)
        except BadRow as bad:
            file, record = next(found for found in looked_at if found[1].row is not None)
            self.problems.append(bad.as_problem(file, record.line))
            return looked_at, None

    def _prompted(self, prompts: Prompts, wanted: DataSource, rows: Sequence[Mapping[str, Any]]) -> Detected | None:
        """The columns that the templates read; None, with problems, where the data has not all of them."""
        named = wanted.columns or {}
        columns = list(dict.fromkeys(name for row in rows for name in row))
        columns += [name for name, column in named.items() if column in columns]
        if problems := check_variables(prompts.file, prompts.columns, columns):
            self.problems.extend(problem for problem in problems if problem not in self.problems)
            return None
        count = len(prompts.file.prompts)
        why = f"{count} template{'s' * (count > 1)} of {prompts.file.name}, sha256 {prompts.file.sha256[:8]}"
        return Detected("prompts", {name: named.get(name, name) for name in sorted(prompts.needed)}, why)

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
        if number in self.prompts:
            conversation = raw_row(record.row, self.prompts[number], wanted.columns)
        else:
            check_columns(record.row, detected.format, detected.fields)
            conversation = FORMATS[detected.format](record.row, detected.fields)
            if wanted.task:
                template = conversation.template or PurePath(file.removesuffix(".gz")).stem
                conversation = replace(conversation, task=wanted.task, template=template)
        self.has_tools = self.has_tools or bool(conversation.tools)
        account = self.ledger.sources[number]
        for note in order_notes(conversation.messages):
            account.note(note, place_of(file, record.line))
        account.kept += 1
        self.store.append(conversation, source=number, file=file, line=record.line)
        if hasher is not None:
            hasher.update(content_of(conversation))  # type: ignore[attr-defined]

    def all_identities(self) -> tuple[SourceIdentity, ...]:
        """What the data was, then what the prompt files were."""
        files = {prompts.file.file: prompts.file for prompts in self.prompts.values()}
        named = (SourceIdentity(file.name, "prompts", file.sha256, len(file.prompts)) for file in files.values())
        return (*self.identities, *named)

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

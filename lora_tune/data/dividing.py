"""Which checked rows are trained and which are held out, rows and whole tasks; rows of prompts are rendered then.

Rows are divided before a template shows them, so that both sides never share one, and so that solved examples come
from the training side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lora_tune.data.leakage import refuse_leaks, refuse_shared_rows
from lora_tune.data.ledger import CONTRADICTION, DUPLICATE, Ledger, place_of
from lora_tune.data.prompted import PromptedRows, Prompts
from lora_tune.data.split import at_most, contradictions, hold_out_some, repeats
from lora_tune.data.store import ConversationStore, StoredConversations
from lora_tune.errors import DataError, Problem
from lora_tune.recipe import DataSource, Eval


@dataclass(frozen=True)
class Apart:
    """What is kept out of training: `rows`, a number, a share such as "2%" or a data file of its own; and whole
    `tasks`, of which at most `most` rows of a source are asked."""

    rows: int | str
    tasks: tuple[str, ...] = ()
    most: int | None = None

    @classmethod
    def of(cls, wanted: int | str | Eval) -> Apart:
        """From the recipe's section, or from rows alone."""
        if isinstance(wanted, Eval):
            return cls(wanted.hold_out, wanted.hold_out_tasks, wanted.max_rows)
        return cls(wanted)


@dataclass(frozen=True)
class CheckedRows:
    """Every good row of every source: `data` of the recipe; `wanted`, the same and the held-out file if there is one.

    Rows of the sources in `prompts` (by number) are raw, columns as JSON; the others are conversations.
    """

    store: ConversationStore
    data: tuple[DataSource, ...]
    wanted: tuple[DataSource, ...]
    prompts: Mapping[int, Prompts]
    ledger: Ledger
    seed: int


def divide(rows: CheckedRows, apart: Apart) -> tuple[StoredConversations, StoredConversations]:
    """What is trained and what is held out: max_rows applied, duplicates counted, prompts rendered.

    Raises:
        DataError: a row on both sides; a template that fails.
    """
    store, ledger = rows.store, rows.ledger
    from_file = len(rows.wanted) > len(rows.data)
    tasks = np.array([source.task in apart.tasks for source in rows.data] + [False] * from_file)
    caps = [_cap(source, apart) for source in rows.data] + [None] * from_file
    taken = at_most(store, caps, seed=rows.seed)
    sources = store.sources[taken]
    for number, account in enumerate(ledger.sources):
        kept = int(np.count_nonzero(sources == number))
        account.left_by_max_rows, account.kept = account.kept - kept, kept
    everything = len(taken) == len(store)
    digests = store.digests if everything else store.digests[taken]
    _count_repeats(store, taken, ledger, digests=digests)
    of_task = tasks[sources]
    held_out = of_task.copy()
    if from_file:
        held_out |= sources == len(rows.data)
        refuse_leaks(store, taken[~held_out], taken[held_out & ~of_task])
    else:
        held_out[~of_task] = hold_out_some(digests[~of_task] if of_task.any() else digests, apart.rows, seed=rows.seed)
        if apart.rows not in (0, "0%") and not held_out[~of_task].any():
            reason, fix = "no row can be held out: there is one row, or all rows are the same", "set eval.hold_out to 0"
            ledger.notices.append(Problem(reason, f"{fix} or to a file", key="eval.hold_out", severity="warning"))
    refuse_shared_rows(store, taken[~held_out], taken[of_task], names=[account.name for account in ledger.sources])
    for number, account in enumerate(ledger.sources):
        account.held_out = int(np.count_nonzero(held_out & (sources == number)))
        account.kept -= account.held_out
    trained, asked = _rendered(rows, taken[~held_out], taken[held_out], tasks=tasks)
    return StoredConversations(store, trained), StoredConversations(store, asked)


def _cap(source: DataSource, apart: Apart) -> int | None:
    """The most rows of a source that are taken: its own max_rows; of a held-out task also those asked."""
    most = apart.most if source.task in apart.tasks else None
    return min((cap for cap in (source.max_rows, most) if cap is not None), default=None)


def _count_repeats(store: ConversationStore, taken: np.ndarray, ledger: Ledger, *, digests: np.ndarray) -> None:
    """Note which of the `taken` rows, whose content hashes are `digests`, repeat or contradict an earlier one."""
    repeated = repeats(digests)
    for what, found in ((DUPLICATE, taken[repeated]), (CONTRADICTION, contradictions(store, taken, repeated))):
        for row in found.tolist():
            ledger.sources[store.source(row)].note(what, place_of(*store.place(row)))


def _rendered(
    rows: CheckedRows, train: np.ndarray, held_out: np.ndarray, *, tasks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The indices of both sides, in the order of the sources, with the rows of prompts rendered. Raises: DataError."""
    store = rows.store
    sources = store.sources  # before anything is appended
    trained, asked = [], []
    pools: dict[int, dict[int, list[tuple[int, bytes]]]] = {}
    problems: list[Problem] = []
    for number, account in enumerate(rows.ledger.sources):
        mine, apart = (side[sources[side] == number] for side in (train, held_out))
        if number in rows.prompts:
            made = PromptedRows(store, rows.prompts[number], rows.wanted[number], account, number, rows.seed)
            mine = np.array(made.train(mine.tolist()), dtype=np.int64)
            pools[number] = made.pools
            examples = pools[0 if number == len(rows.data) else number]  # of a held-out file: those of the first source
            new = made.every(apart.tolist()) if tasks[number] else made.held_out(apart.tolist(), examples)
            apart = np.array(new, dtype=np.int64)
            problems += made.problems
            if account.skipped and not len(mine) + len(apart):
                reason = f"no template applies to any row of {account.name}: input or target stays empty"
                fix = "check its columns; where labels are text (CSV), write answer_choices[label | int]"
                problems.append(Problem(reason, fix, file=rows.prompts[number].file.file))
        trained.append(mine)
        asked.append(apart)
    if problems:
        raise DataError(problems)
    return np.concatenate(trained), np.concatenate(asked)

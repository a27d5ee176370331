"""The rows to evaluate on, outside of a training: the held-out rows of a recipe, or all rows of a file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_tune.data.chat_template import ChatTemplate, TokenRow
from lora_tune.data.checking import read_conversations
from lora_tune.data.conversation import Conversation
from lora_tune.data.fit import Documents, Fitting
from lora_tune.data.kept_conversations import Conversations
from lora_tune.data.ledger import Ledger, SourceLedger
from lora_tune.data.overlap import overlap
from lora_tune.data.recorded import Finder, Recorded
from lora_tune.data.sources import SourceIdentity
from lora_tune.data.store import StoredConversations
from lora_tune.data.token_file import encoder_fingerprint, token_file
from lora_tune.errors import DataError, Problem
from lora_tune.recipe import DataSource, Recipe
from lora_tune.recipe_values import SHARE


def rows_of(recipe: Recipe) -> tuple[StoredConversations, tuple[SourceIdentity, ...]]:
    """The conversations that a recipe holds out, and what was read for them; paths are where the data lies.

    Where they are a file, no task is held out and no solved example is shown, that file alone is read. Raises:
    DataError without a held-out row, and as `read_conversations`.
    """
    hold_out = recipe.eval.hold_out
    alone = not recipe.eval.hold_out_tasks and not recipe.data[0].shots  # examples come from the training rows
    if isinstance(hold_out, str) and not SHARE.fullmatch(hold_out) and alone:
        like = {"source": hold_out, "max_rows": None, "weight": 1.0, "invert": "0%", "config": None, "revision": None}
        source = recipe.data[0].model_copy(update=like)
        return _whole(read_conversations([source], hold_out=0, seed=recipe.seed))
    found = read_conversations(recipe.data, hold_out=recipe.eval, seed=recipe.seed)
    if not len(found.held_out):
        raise DataError(Problem("the recipe holds no row out", "give rows to evaluate on with --data", "eval.hold_out"))
    return found.held_out, found.identities


def rows_in(sources: Sequence[DataSource], *, seed: int) -> tuple[StoredConversations, tuple[SourceIdentity, ...]]:
    """All conversations of these sources. Raises: as `read_conversations`."""
    return _whole(read_conversations(sources, hold_out=0, seed=seed))


def shared_with_training(
    evaluated: StoredConversations, recipe: Recipe, recorded: Sequence[Recorded], *, finder: Finder
) -> list[Problem]:
    """Warnings about passages that evaluated rows share with the rows of a training's files, where these are at hand.

    A note where one is not: it lies elsewhere or on the hub, or became rows through prompt templates.
    """
    data = []
    for entry, one in zip(recipe.data, recorded, strict=False):
        path = None if one.revision or entry.prompts else finder.find(one)
        if path is None:
            reason = f"the training rows of {one.name} are not at hand: shared passages were not looked for"
            return [Problem(reason, "call it where the data lies", severity="note")]
        data.append(entry.model_copy(update={"source": str(path)}))
    train = read_conversations(data, hold_out=0, seed=recipe.seed).train
    return overlap(train, evaluated).warnings()


def _whole(found: Conversations) -> tuple[StoredConversations, tuple[SourceIdentity, ...]]:
    return found.train, found.identities


def encoded(
    conversations: StoredConversations, chat: ChatTemplate, recipe: Recipe
) -> tuple[tuple[Conversation, ...], tuple[TokenRow, ...]]:
    """Conversations with their token rows, of at most `train.max_length` tokens, as a run evaluates them.

    Raises: DataError naming every row that the template refuses, unless its source is set to drop such rows.
    """
    rows = token_file(conversations, chat, loss_on=recipe.loss_on, fingerprint=encoder_fingerprint(chat))
    problems = []
    for number, reason in rows.errors.items():
        source = min(int(conversations.sources[number]), len(recipe.data) - 1)
        if recipe.data[source].on_bad_row == "refuse":
            file, line = conversations.place(number)
            fix = "repair the row, or set on_bad_row: drop"
            problems.append(Problem(f"the chat template refuses the row: {reason}", fix, file=file, line=line))
    if problems:
        raise DataError(problems)
    count = int(conversations.sources.max()) + 1 if len(conversations) else 0
    account = Ledger([SourceLedger(name=str(number)) for number in range(count)])
    pieces = Fitting(conversations, rows, account, max_length=recipe.train.max_length).pieces(recipe.train.too_long)
    kept = np.unique(rows.conversation[pieces.row]) if len(pieces) else ()
    documents = Documents(pieces, rows, conversations)
    return tuple(conversations[int(number)] for number in kept), tuple(documents)

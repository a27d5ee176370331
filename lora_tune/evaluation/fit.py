"""Do the metrics fit the data? Asked before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_tune.data.conversation import Conversation
from lora_tune.errors import DataError, Problem
from lora_tune.evaluation.metrics import METRICS
from lora_tune.evaluation.questions import choose, questions_of

if TYPE_CHECKING:
    from lora_tune.data.chat_template import TokenRow
    from lora_tune.recipe import Eval

HeldOut = tuple[Sequence[Conversation], "Sequence[TokenRow]"]
"""Held-out conversations, and their token rows in the same order."""


def fitting(held_out: HeldOut, metrics: Sequence[str], *, evaluation: Eval, seed: int) -> tuple[str, ...]:
    """Those of the metrics that fit at least one of the rows, each once."""
    questions = questions_of(held_out[0], evaluation, seed=seed)
    rows = loss_rows(held_out, evaluation=evaluation, seed=seed)
    names = dict.fromkeys(metrics)
    return tuple(n for n in names if (rows if METRICS[n].reads == "tokens" else any(map(METRICS[n].fits, questions))))


def check_fit(held_out: HeldOut, *, metrics: Sequence[str], evaluation: Eval, seed: int) -> None:
    """A metric over no rows is an error, never a zero. Raises: DataError naming every metric that fits no row."""
    count = len(choose(held_out[0], evaluation.max_rows, seed=seed, tasks=evaluation.hold_out_tasks))
    fit = fitting(held_out, metrics, evaluation=evaluation, seed=seed)
    problems = []
    for name in metrics:
        if name not in fit:
            reason = f"{name} does not fit the data: of {count} held-out rows none has {METRICS[name].needs}"
            fix = "take the metric away, or hold out rows that have one (eval.hold_out)"
            problems.append(Problem(reason, fix, key="eval.metrics"))
    if problems:
        raise DataError(problems)


def loss_rows(held_out: HeldOut, *, evaluation: Eval, seed: int) -> list[tuple[int, TokenRow]]:
    """The token rows over which the held-out loss is taken, each with the number of its conversation.

    Of the chosen conversations, those with a token to predict.
    """
    chosen = set(choose(held_out[0], evaluation.max_rows, seed=seed, tasks=evaluation.hold_out_tasks))
    owned = zip(owners(held_out), held_out[1], strict=True)
    return [(owner, row) for owner, row in owned if owner in chosen and row.mask[1:].any()]


def owners(held_out: HeldOut) -> list[int]:
    """The number of the conversation that each token row comes from.

    Both stand in the same order. Where one place of a file became several conversations (a row under several
    templates), its token rows belong to them one after another.
    """
    conversations, rows = held_out
    at: dict[tuple[int, str, int], list[int]] = {}
    for number, conversation in enumerate(conversations):
        at.setdefault((conversation.source, conversation.file, conversation.line), []).append(number)
    counts: dict[tuple[int, str, int], int] = {}
    for row in rows:
        counts[row.source, row.file, row.line] = counts.get((row.source, row.file, row.line), 0) + 1
    seen: dict[tuple[int, str, int], int] = {}
    found = []
    for row in rows:
        key = (row.source, row.file, row.line)
        numbers = at[key]
        share = max(1, counts[key] // len(numbers))
        place = seen.get(key, 0)
        found.append(numbers[min(place // share, len(numbers) - 1)])
        seen[key] = place + 1
    return found

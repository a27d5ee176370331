"""Which held-out rows a report shows side by side, and where their answers differ from the reference."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lora_tune.data.ledger import place_of
from lora_tune.evaluation.scores import Comparison, RowScore

SHOWN = 20
_OF_TOKENS = ("loss", "perplexity")
_WORST, _BEST = 7, 7  # the rest is drawn
_CHARACTERS = 1_500  # of a text that is shown
_WORDS = 400  # beyond which differences are not marked: the comparison takes the square of it
_ALIKE = 0.25  # share of words in common below which single words are not told apart
Kind = Literal["same", "other", "missing"]


@dataclass(frozen=True, slots=True)
class Run:
    """A piece of an answer: in the reference as well, not in it (`other`), or only in the reference (`missing`)."""

    text: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Shown:
    """One row with its texts, the answers in runs, why it is shown (`title`, in the order of `order`), and
    (metric, base, adapter) of its scores."""

    order: int
    title: str
    place: str
    prompt: str
    reference: str
    base: tuple[Run, ...]
    adapter: tuple[Run, ...]
    scores: tuple[tuple[str, float, float], ...]


def side_by_side(comparison: Comparison, *, seed: int) -> tuple[Shown, ...]:
    """At most 20 answered rows: those with the lowest and highest score of the adapter, and some drawn by the seed.

    Ranked by the metric of answers that tells most rows apart; among equals, the row that lost or won most against the
    base comes first.
    Without scored rows, the samples of the evaluation.
    """
    rows = [row for row in comparison.rows if row.base or row.adapter]
    metric = _ranking(comparison, rows)
    if not rows or metric is None:
        return tuple(
            _shown(
                (0, "Samples"), "", sample.prompt, sample.reference, answers=(sample.base, sample.adapter), scores={}
            )
            for sample in comparison.samples[:SHOWN]
        )
    upward = 1.0 if comparison.scores[metric].direction == "higher" else -1.0

    def merit(place: int) -> tuple[float, float]:
        base, adapter = rows[place].metrics[metric]
        return upward * adapter, upward * (adapter - base)

    ranked = sorted((place for place in range(len(rows)) if metric in rows[place].metrics), key=merit)
    worst = ranked[:_WORST]
    best = [place for place in reversed(ranked) if place not in worst][:_BEST]
    rest = [place for place in range(len(rows)) if place not in worst and place not in best]
    drawn = np.random.default_rng(seed).permutation(rest)[: SHOWN - len(worst) - len(best)].tolist()
    groups = (
        (f"Where the adapter did worst by {metric}", worst),
        (f"Where it did best by {metric}", best),
        ("Drawn by the seed", sorted(drawn)),
    )
    return tuple(
        _of_row((order, title), rows[place]) for order, (title, places) in enumerate(groups) for place in places
    )


def marked(answer: str, reference: str) -> tuple[Run, ...]:
    """The answer in runs; words of the reference that it lacks stand where they would be."""
    ours, theirs = _pieces(answer), _pieces(reference)
    if not ours or max(len(ours), len(theirs)) > _WORDS:
        return (Run(answer, "same"),) if answer else ()
    our_words, their_words = ([piece.strip() for piece in pieces] for pieces in (ours, theirs))
    matcher = difflib.SequenceMatcher(None, our_words, their_words, autojunk=False)
    if matcher.ratio() < _ALIKE:
        return (Run(answer, "other"),)
    runs = []
    for what, start, end, their_start, their_end in matcher.get_opcodes():
        if what == "equal":
            runs.append(Run("".join(ours[start:end]), "same"))
            continue
        if end > start:
            runs.append(Run("".join(ours[start:end]), "other"))
        if their_end > their_start:
            runs.append(Run("".join(theirs[their_start:their_end]), "missing"))
    return tuple(runs)


def _ranking(comparison: Comparison, rows: Sequence[RowScore]) -> str | None:
    """The metric by which rows are ranked: of those that read answers the one with most different scores, else loss."""
    known = {name: {row.metrics[name] for row in rows if name in row.metrics} for name in comparison.scores}
    names = [name for name in known if known[name]]
    return max(names, key=lambda name: (len(known[name]) > 1, name not in _OF_TOKENS, len(known[name])), default=None)


def _of_row(group: tuple[int, str], row: RowScore) -> Shown:
    place = place_of(row.source, row.line) + "".join(f", {part}" for part in (row.task, row.template) if part)
    return _shown(group, place, row.prompt, row.reference, answers=(row.base, row.adapter), scores=row.metrics)


def _shown(
    group: tuple[int, str],
    place: str,
    prompt: str,
    reference: str,
    *,
    answers: tuple[str, str],
    scores: Mapping[str, tuple[float, float]],
) -> Shown:
    prompt, reference = prompt.strip(), _excerpt(reference.strip())
    base, adapter = (_excerpt(answer.strip()) for answer in answers)
    return Shown(
        order=group[0],
        title=group[1],
        place=place,
        prompt=prompt if len(prompt) <= _CHARACTERS else f"… {prompt[-_CHARACTERS:]}",
        reference=reference,
        base=marked(base, reference),
        adapter=marked(adapter, reference),
        scores=tuple((name, before, after) for name, (before, after) in scores.items()),
    )


def _excerpt(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} … ({len(text) - _CHARACTERS:,} more characters)"


def _pieces(text: str) -> list[str]:
    """Words and signs with the white space before them, which together are the text."""
    return re.findall(r"\s*(?:\w+|[^\w\s])|\s+", text)

"""What the evaluation found, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_tune.terminal import printable

if TYPE_CHECKING:
    from lora_tune.evaluation.scores import Sample, Score

_ARROWS = {"lower": "↓", "higher": "↑"}
_COLUMNS = ("metric", "base", "adapter", "difference", "95 % interval", "p", "rows")
_NOTE = "↑ higher is better, ↓ lower is better; paired bootstrap interval of adapter - base; p: of a paired test"
_FEW = 30  # rows below which a percentile interval is too narrow to be relied on


def scores_table(scores: Mapping[str, Score], *, title: str = "base against adapter") -> Table:
    """The scores as a table; a difference whose interval excludes 0 is green where better, red where worse."""
    table = Table(
        title=title,
        title_justify="left",
        caption=_note(scores),
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "metric" else "right", no_wrap=True)
    for name, score in scores.items():
        metric, base, adapter, difference, interval, p_value, rows = _cells(name, score)
        style = {"better": "green", "worse": "red", "same": ""}[verdict(score)]
        table.add_row(metric, base, adapter, Text(difference, style), Text(interval, style), p_value, rows)
    return table


def samples_table(samples: Sequence[Sample]) -> RenderableType:
    """Held-out rows answered by base and adapter, side by side below the prompt and the reference."""
    parts: list[RenderableType] = []
    for number, sample in enumerate(samples, 1):
        table = Table(title=f"sample {number} of {len(samples)}", title_justify="left", show_header=False, expand=True)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in (("prompt", sample.prompt), ("reference", sample.reference)):
            table.add_row(name, Text(printable(text)))
        table.add_row("base", Text(printable(sample.base) or "(nothing)", "dim"))
        table.add_row("adapter", Text(printable(sample.adapter) or "(nothing)", "green"))
        parts.append(table)
    return Group(*parts)


def verdict(score: Score) -> str:
    """ "better", "worse" or "same": whether the interval of the difference lies wholly on one side of 0."""
    if score.low <= 0 <= score.high:
        return "same"
    rose = score.low > 0
    return "better" if rose == (score.direction == "higher") else "worse"


def _note(scores: Mapping[str, Score]) -> str:
    few = any(score.rows < _FEW for score in scores.values())
    return f"{_NOTE}; of fewer than {_FEW} rows it is a hint at best" if few else _NOTE


def _cells(name: str, score: Score) -> tuple[str, ...]:
    difference = f"{score.difference:+{_digits(score)}}"
    interval = f"{score.low:+{_digits(score)}} … {score.high:+{_digits(score)}}"
    p_value = "<0.001" if score.p_value < 0.001 else f"{score.p_value:.3f}"
    sides = f"{score.base:{_digits(score)}}", f"{score.adapter:{_digits(score)}}"
    return f"{name} {_ARROWS[score.direction]}", *sides, difference, interval, p_value, str(score.rows)


def _digits(score: Score) -> str:
    """Four digits behind the point, fewer for large numbers."""
    largest = max(abs(score.base), abs(score.adapter), abs(score.low), abs(score.high))
    return ".4f" if largest < 10 else ".2f" if largest < 1000 else ".0f"

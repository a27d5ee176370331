"""Scores of a task over its prompt templates: median and spread, as T0 reports them.

Source: Sanh et al. 2022 (arXiv 2110.08207), section 6: the median over the prompts of a data set, and the interquartile
range as a measure of how robust a model is to their wording.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from lora_tune.evaluation.scores import Comparison, Direction, Score
from lora_tune.terminal import printable


@dataclass(frozen=True, slots=True)
class Spread:
    """One metric of one task over its templates, for both sides: median, and the quartiles (25 %, 75 %) around it.

    `better` and `worse` count the templates whose interval of adapter - base excludes 0 on that side.
    """

    templates: int
    base: float
    adapter: float
    base_quartiles: tuple[float, float]
    adapter_quartiles: tuple[float, float]
    better: int
    worse: int
    direction: Direction

    def as_json(self) -> dict[str, Any]:
        """The fields, as `--json` prints them."""
        return asdict(self)


def spread(scores: Mapping[str, Score]) -> Spread:
    """The spread of one metric over templates ({template: score}). Raises: ValueError where there is none."""
    found = list(scores.values())
    if not found:
        raise ValueError("a spread over no template")
    sides = [np.quantile([getattr(score, side) for score in found], [0.25, 0.5, 0.75]) for side in ("base", "adapter")]
    rose = sum(score.low > 0 for score in found)
    fell = sum(score.high < 0 for score in found)
    direction = found[0].direction
    return Spread(
        templates=len(found),
        base=float(sides[0][1]),
        adapter=float(sides[1][1]),
        base_quartiles=(float(sides[0][0]), float(sides[0][2])),
        adapter_quartiles=(float(sides[1][0]), float(sides[1][2])),
        better=rose if direction == "higher" else fell,
        worse=fell if direction == "higher" else rose,
        direction=direction,
    )


def spreads(comparison: Comparison) -> dict[str, dict[str, Spread]]:
    """{task: {metric: spread}} of every task that was asked by more than one template."""
    found: dict[str, dict[str, Spread]] = {}
    for task, templates in comparison.templates.items():
        metrics = dict.fromkeys(name for scores in templates.values() for name in scores)
        by_metric = {name: {t: scores[name] for t, scores in templates.items() if name in scores} for name in metrics}
        several = {name: spread(scores) for name, scores in by_metric.items() if len(scores) > 1}
        if several:
            found[task] = several
    return found


def tasks_as_json(comparison: Comparison | None) -> dict[str, Any]:
    """Scores of each task, with `templates` ({template: {metric: score}}) and `spread` where it has several."""
    if comparison is None:
        return {}
    over = spreads(comparison)
    return {
        task: {
            **{name: score.as_json() for name, score in scores.items()},
            "templates": {
                template: {name: score.as_json() for name, score in found.items()}
                for template, found in comparison.templates.get(task, {}).items()
            },
            "spread": {name: one.as_json() for name, one in over.get(task, {}).items()},
        }
        for task, scores in comparison.tasks.items()
    }


def templates_table(comparison: Comparison) -> RenderableType:
    """A table for each task: base and adapter by template, then their median and quartiles; fits into 80 columns."""
    over = spreads(comparison)
    tables = []
    for task, templates in comparison.templates.items():
        table = Table(title=printable(f"{task}, by template"), title_justify="left")
        table.add_column("template", overflow="fold")
        table.add_column("metric", overflow="fold")
        for column in ("base", "adapter", "95 % interval", "rows"):
            table.add_column(column, justify="right", no_wrap=True)
        for name in dict.fromkeys(name for scores in templates.values() for name in scores):
            for template, scores in templates.items():
                if name in scores:
                    table.add_row(printable(template), name, *_cells(scores[name]))
            if one := over.get(task, {}).get(name):
                _summary(table, name, one)
            table.add_section()
        tables.append(table)
    return Group(*tables)


def _cells(score: Score) -> tuple[str, ...]:
    return f"{score.base:.4f}", f"{score.adapter:.4f}", f"{score.low:+.4f} … {score.high:+.4f}", str(score.rows)


def _summary(table: Table, name: str, one: Spread) -> None:
    """Median and quartiles as three rows."""
    moved = f"{one.better} better, {one.worse} worse"
    table.add_row(f"median of {one.templates}", name, f"{one.base:.4f}", f"{one.adapter:.4f}", moved, style="bold")
    for label, place in (("lower quartile", 0), ("upper quartile", 1)):
        table.add_row(label, name, f"{one.base_quartiles[place]:.4f}", f"{one.adapter_quartiles[place]:.4f}")

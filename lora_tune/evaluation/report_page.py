"""`report.html`: what a run did and what it brought, one file that asks nothing of any host, for phone and desktop.

The page is rendered from `report_page.jinja` with every text escaped: rows, answers and names of files are not trusted.
It holds no script; its Content-Security-Policy allows none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from lora_tune.adapter.folder import DataRecord, TrainingRecord, write_file
from lora_tune.adapter.write import without_secrets
from lora_tune.evaluation.hard_rows import HardRows
from lora_tune.evaluation.metrics import METRICS
from lora_tune.evaluation.pictures import (
    Cloud,
    Picture,
    Strip,
    clouds_picture,
    curve,
    differences_picture,
    finite,
    histogram,
    scores_picture,
    strips_of,
)
from lora_tune.evaluation.report_tables import (
    cost_table,
    data_table,
    duration,
    ledger_table,
    notes_of,
    overlap_table,
    scores_table,
    short,
    table,
    tasks_table,
    templates_table,
    training_table,
    verdict_of,
)
from lora_tune.evaluation.scores import Comparison, Score
from lora_tune.evaluation.side_by_side import side_by_side
from lora_tune.evaluation.spread import spreads
from lora_tune.terminal import number_text, printable

REPORT = "report.html"
_MOST_STRIPS = 40  # rows of one picture
_MOST_TASK_PICTURES = 3
_HEADLINES = 3
_LABEL_LETTERS = 60
_RECIPE_LETTERS = 40_000


@dataclass(frozen=True)
class ReportFacts:
    """What the page tells of a run.

    `base` and `held` are words (`builtin:quickstart`; `nf4, computing in bfloat16`); `steps` are the lines of
    `metrics.jsonl`, `ledger` is `Ledger.as_json()`, `recipe` the stored recipe as YAML, `commands` what makes the
    numbers of a section again: {section: command}. `energy_wh` is given only where it was measured.
    """

    name: str
    tool: str
    base: str
    held: str
    training: TrainingRecord
    data: Sequence[DataRecord]
    ledger: Mapping[str, Any]
    comparison: Comparison
    steps: Sequence[Mapping[str, Any]]
    recipe: str
    libraries: Mapping[str, str]
    seed: int
    hard: HardRows | None = None
    commands: Mapping[str, str] = field(default_factory=dict)
    energy_wh: float | None = None


@dataclass(frozen=True, slots=True)
class Headline:
    """One number that stands large: what it is, the value, a few words below."""

    label: str
    value: str
    about: str
    style: str = ""


def write_report(folder: Path, facts: ReportFacts) -> Path:
    """Write `report.html` into a folder. Raises: UsageError where the disk refuses."""
    return write_file(folder, REPORT, report_page(facts).encode())


def report_page(facts: ReportFacts) -> str:
    """The whole page as HTML."""
    comparison, training = facts.comparison, facts.training
    overlap = facts.ledger.get("overlap")
    return _template().render(
        facts=facts,
        name=short(facts.name, _LABEL_LETTERS),
        recipe=short(facts.recipe, _RECIPE_LETTERS),
        headlines=_headlines(facts),
        score_pictures=_score_pictures(comparison.scores),
        scores=scores_table(comparison.scores) if comparison.scores else None,
        few=any(score.rows < 30 for score in comparison.scores.values()),
        stopped=comparison.stopped,
        longest=comparison.max_new_tokens,
        task_pictures=_task_pictures(comparison.tasks),
        tasks=tasks_table(comparison.tasks) if comparison.tasks else None,
        templates=templates_table(comparison),
        template_pictures=_template_pictures(comparison),
        samples=side_by_side(comparison, seed=facts.seed),
        held_out_curve=any("eval" in row for row in facts.steps),
        curves=[picture for picture in _curves(facts.steps) if picture],
        ledger=ledger_table(facts.ledger),
        notes=notes_of(facts.ledger),
        overlap=overlap,
        overlap_rows=overlap_table(overlap) if overlap and overlap.get("worst") else None,
        hard=facts.hard if facts.hard and facts.hard.rows else None,
        hard_picture=_hard_picture(facts.hard),
        cost=cost_table(training, energy_wh=facts.energy_wh),
        training=training_table(training, seed=facts.seed, held=facts.held),
        data=data_table(facts.data) if facts.data else None,
        libraries=table(("library", "version"), list(facts.libraries.items())),
    )


@cache
def _template() -> jinja2.Template:
    """The compiled page; every value but our own pictures is cleaned and escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    environment.filters["number"] = number_text
    environment.filters["duration"] = duration
    environment.filters["short"] = short
    text = resources.files("lora_tune.evaluation").joinpath("report_page.jinja").read_text(encoding="utf-8")
    return environment.from_string(text)


def _shown(value: object) -> object:
    """A value of the template: a text is cleaned, but not what is markup already, our own pictures."""
    return _clean(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _clean(text: str) -> str:
    """The text without secrets of the environment, control characters and halves of surrogate pairs."""
    return printable(without_secrets(text).encode("utf-8", "replace").decode())


def _headlines(facts: ReportFacts) -> list[Headline]:
    """The numbers that a reader looks for first."""
    found = []
    for name, score in list(facts.comparison.scores.items())[:_HEADLINES]:
        verdict = verdict_of(score)
        style = "" if verdict == "same" else verdict
        about = f"{score.difference:+.4g} [{score.low:+.4g}, {score.high:+.4g}], {score.rows:,} rows"
        found.append(
            Headline(short(name, _LABEL_LETTERS), f"{_short(score.base)} → {_short(score.adapter)}", about, style)
        )
    training = facts.training
    if training.seconds is not None:
        about = f"{training.steps:,} steps on {short(training.device or 'an unknown device', _LABEL_LETTERS)}"
        found.append(Headline("training", duration(training.seconds), about))
    if training.peak_gib is not None:
        tokens = "" if training.tokens is None else f"{training.tokens:,} tokens"
        found.append(Headline("peak memory", f"{training.peak_gib:.2f} GiB", tokens))
    return found


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _score_pictures(scores: Mapping[str, Score]) -> list[Picture]:
    """Metrics of one range share a picture; one without bounds has its own."""
    groups: dict[tuple[float, float] | str, dict[str, Score]] = {}
    for name, score in ((_clean(name), score) for name, score in scores.items()):
        bounds = (METRICS[name].low, METRICS[name].high) if name in METRICS else (0.0, math.inf)
        key: tuple[float, float] | str = bounds if all(map(math.isfinite, bounds)) else name
        groups.setdefault(key, {})[name] = score
    pictures = []
    for number, (key, group) in enumerate(groups.items()):
        strips = finite(strips_of(group, {name: verdict_of(score) for name, score in group.items()}))
        if not strips:
            continue
        bounds_of = key if isinstance(key, tuple) else None
        title = key if isinstance(key, str) else "base and adapter" if len(group) > 1 else next(iter(group))
        pictures.append(scores_picture(title, strips, name=f"score{number}", bounds=bounds_of))
    return pictures


def _task_pictures(tasks: Mapping[str, Mapping[str, Score]]) -> list[Picture]:
    """Differences by task, a picture for each of the first metrics; tasks with the largest differences where many."""
    metrics = list(dict.fromkeys(name for scores in tasks.values() for name in scores))
    pictures = []
    for number, metric in enumerate(metrics[:_MOST_TASK_PICTURES]):
        found = {task: scores[metric] for task, scores in tasks.items() if metric in scores}
        largest = sorted(found, key=lambda task, of=found: -abs(of[task].difference))[:_MOST_STRIPS]  # type: ignore[misc]
        strips = finite(
            Strip(_clean(task), score.difference, score.low, score.high, verdict_of(score))
            for task, score in sorted(found.items(), key=lambda item: -item[1].difference)
            if task in largest
        )
        if not strips:
            continue
        of = f" (the {_MOST_STRIPS} largest of {len(found)})" if len(found) > _MOST_STRIPS else ""
        pictures.append(differences_picture(f"{_clean(metric)}: adapter − base{of}", strips, name=f"task{number}"))
    return pictures


def _template_pictures(comparison: Comparison) -> list[Picture]:
    """The scores of every template of the tasks that have several, a picture for each of the first metrics."""
    metrics = list(dict.fromkeys(name for found in spreads(comparison).values() for name in found))
    pictures = []
    for number, metric in enumerate(metrics[:_MOST_TASK_PICTURES]):
        clouds = []
        for task, templates in comparison.templates.items():
            found = [scores[metric] for scores in templates.values() if metric in scores]
            if len(found) > 1 and all(math.isfinite(one.base + one.adapter) for one in found):
                clouds.append(Cloud(_clean(task), [one.base for one in found], [one.adapter for one in found]))
        if clouds:
            pictures.append(clouds_picture(_clean(metric), clouds[:_MOST_STRIPS], name=f"template{number}"))
    return pictures


def _curves(steps: Sequence[Mapping[str, Any]]) -> list[Picture | None]:
    """The numbers of `metrics.jsonl` over the steps."""
    trained = [row for row in steps if "loss" in row]
    held_out = [(row["step"], row["eval"].get("loss")) for row in steps if isinstance(row.get("eval"), Mapping)]
    speed = [
        (row["step"], row["tokens"] / row["step_s"])
        for row in trained
        if _is_number(row.get("tokens")) and _is_number(row.get("step_s")) and row["step_s"] > 0
    ]

    def over_steps(key: str) -> list[tuple[float, float]]:
        return [(row["step"], row[key]) for row in trained if _is_number(row.get(key))]

    losses = [(step, loss) for step, loss in held_out if _is_number(loss)]
    title = "loss and held-out loss (nats per token)" if losses else "loss (nats per token)"
    draw: list[Callable[[], Picture | None]] = [
        lambda: curve(title, over_steps("loss"), name="loss", smooth="smoothed", held_out=losses),
        lambda: curve("learning rate", over_steps("learning_rate"), name="rate", scale="from zero"),
        lambda: curve("gradient norm", over_steps("grad_norm"), name="norm", smooth="smoothed", scale="from zero"),
        lambda: curve("tokens a second", speed, name="speed", smooth="smoothed", scale="from zero"),
        lambda: curve("memory (GiB)", over_steps("gib"), name="memory", scale="from zero"),
    ]
    return [one() for one in draw]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _hard_picture(hard: HardRows | None) -> Picture | None:
    if hard is None or not hard.rows:
        return None
    return histogram("losses of training rows", hard.losses, name="hard", marked=hard.rows[-1].adapter)

"""What the report shows in words and numbers: scores by metric, task and template, the ledger, cost, versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_tune.adapter.card import replan_words
from lora_tune.adapter.folder import DataRecord, TrainingRecord
from lora_tune.evaluation.pictures import Verdict
from lora_tune.evaluation.scores import Comparison, Score
from lora_tune.evaluation.spread import spreads
from lora_tune.terminal import number_text

MOST_LINES = 200  # of a table
MOST_LETTERS = 300  # of a cell or a note
_ARROWS = {"higher": "↑", "lower": "↓"}
_WORDS = {"better": "better", "worse": "worse", "same": "undecided"}


@dataclass(frozen=True, slots=True)
class Cell:
    """A text with a style: "", or the verdict on a difference."""

    text: str
    style: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A header and lines of as many cells; the first column is text, the others are numbers. `left_out`: how many
    lines are not shown."""

    header: tuple[str, ...]
    lines: tuple[tuple[Cell, ...], ...]
    left_out: int = 0


def table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> Table:
    """A table of the first MOST_LINES lines; values are written for people, None as a dash."""
    shown = tuple(
        tuple(value if isinstance(value, Cell) else Cell(short(number_text(value))) for value in line)
        for line in lines[:MOST_LINES]
    )
    return Table(tuple(header), shown, len(lines) - len(shown))


def verdict_of(score: Score) -> Verdict:
    """ "better", "worse" or "same": whether the interval of the difference lies wholly on one side of 0."""
    if score.low <= 0 <= score.high:
        return "same"
    return "better" if (score.low > 0) == (score.direction == "higher") else "worse"


def scores_table(scores: Mapping[str, Score]) -> Table:
    """Base against adapter by metric."""
    header = ("metric", "base", "adapter", "difference", "95 % interval", "p", "rows", "verdict")
    return table(header, [(f"{name} {_ARROWS[score.direction]}", *_numbers(score)) for name, score in scores.items()])


def tasks_table(tasks: Mapping[str, Mapping[str, Score]]) -> Table:
    """Base against adapter by task and metric."""
    header = ("task", "metric", "base", "adapter", "difference", "95 % interval", "p", "rows", "verdict")
    lines = [
        (task, f"{name} {_ARROWS[score.direction]}", *_numbers(score))
        for task, scores in tasks.items()
        for name, score in scores.items()
    ]
    return table(header, lines)


def templates_table(comparison: Comparison) -> Table | None:
    """Median and quartiles of base and adapter over the templates of a task; None where none has two templates."""
    lines = [
        (
            task,
            f"{name} {_ARROWS[one.direction]}",
            one.templates,
            *_spread(one.base, one.base_quartiles),
            *_spread(one.adapter, one.adapter_quartiles),
            f"{one.better} better, {one.worse} worse",
        )
        for task, found in spreads(comparison).items()
        for name, one in found.items()
    ]
    header = ("task", "metric", "templates", "base, median", "base, quartiles", "adapter, median", "adapter, quartiles")
    return table((*header, "templates that moved"), lines) if lines else None


def ledger_table(ledger: Mapping[str, Any]) -> Table:
    """The account of rows and tokens, a line for each source and one for the total of several."""
    lines = []
    for source in ledger.get("sources", ()):
        rows, tokens = source.get("rows", {}), source.get("tokens", {})
        dropped = sum(count.get("rows", 0) for count in rows.get("dropped", {}).values())
        lines.append(
            (
                source.get("name", "–"),
                source.get("format", "–"),
                *(rows.get(name, 0) for name in ("read", "kept", "held_out", "left_by_max_rows")),
                dropped,
                *(tokens.get(name, 0) for name in ("read", "trained", "lost")),
            )
        )
    total = ledger.get("total", {})
    if len(lines) != 1 and total:
        names = ("read", "kept", "held_out", "left_by_max_rows", "dropped_rows")
        tokens_of = ("tokens_read", "tokens_trained", "tokens_lost")
        lines.append(("total", "–", *(total.get(name) for name in (*names, *tokens_of))))
    header = ("source", "format", "rows read", "trained on", "held out", "left by max_rows", "dropped")
    return table((*header, "tokens read", "with a loss", "cut off"), lines)


def notes_of(ledger: Mapping[str, Any]) -> list[str]:
    """What happened to rows, with its count and first place, and the warnings of the ledger."""
    notes = [str(warning) for warning in ledger.get("warnings", ())]
    for source in ledger.get("sources", ()):
        for what, count in {**source.get("rows", {}).get("dropped", {}), **source.get("notes", {})}.items():
            first = count.get("first")
            text = f"{source.get('name', '')}: {what} in {count.get('rows', 0):,} rows"
            if not any(what in note for note in notes):
                notes.append(f"{text}, first at {first}" if first else text)
    return [short(note) for note in notes[:MOST_LINES]]


def short(text: str, most: int = MOST_LETTERS) -> str:
    """At most `most` letters of a text."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def cost_table(training: TrainingRecord, *, energy_wh: float | None) -> Table:
    """What the training cost; energy only where it was measured."""
    seconds, tokens = training.seconds, training.tokens
    speed = tokens / seconds if tokens and seconds else None
    memory = None if training.peak_gib is None else f"{training.peak_gib:.2f} GiB"
    facts = [
        ("time of training", None if seconds is None else duration(seconds)),
        ("optimizer steps", training.steps),
        ("epochs", training.epochs),
        ("tokens through the model", tokens),
        ("tokens with a loss", training.trained_tokens),
        ("tokens a second", None if speed is None else f"{speed:,.0f}"),
        ("peak memory", memory),
        ("device", training.device),
        ("energy", None if energy_wh is None else f"{energy_wh:,.1f} Wh"),
    ]
    return table(("what", "measured"), [fact for fact in facts if fact[1] is not None])


def training_table(training: TrainingRecord, *, seed: int, held: str) -> Table:
    """How it was trained, every value as it was resolved."""
    batch = f"{training.batch_size} sequences ({training.micro_batch_size} × {training.accumulation})"
    facts = [
        ("method", training.method),
        ("base held in", held),
        ("trainable parameters", training.trainable_parameters),
        ("batch", batch),
        *(replan_words(replan) for replan in training.replans),
        ("time budget", training.budget),
        ("longest sequence", f"{training.max_length:,} tokens"),
        ("learning rate", f"{training.learning_rate:g}, {training.schedule}"),
        ("optimizer", training.optimizer),
        ("final training loss", training.final_loss),
        ("seed", str(seed)),
    ]
    return table(("setting", "value"), [fact for fact in facts if fact[1] is not None])


def data_table(data: Sequence[DataRecord]) -> Table:
    """What rows were read from, by content."""
    lines = [(item.name, item.format, item.rows, item.revision or "–", f"{item.sha256[:16]}…") for item in data]
    return table(("source", "format", "rows", "revision", "sha256 of the content"), lines)


def overlap_table(overlap: Mapping[str, Any]) -> Table:
    """The held-out rows that share most with training rows, from the ledger's account."""
    lines = [
        (row["place"], row["trained"], f"{row['share']:.1%}", row["words"])
        for row in overlap.get("worst", ())
    ]  # fmt: skip
    return table(("held-out row", "training row", "of its passages", "longest piece"), lines)


def duration(seconds: float) -> str:
    """Seconds for people: `75.2 s`, `12 min 5 s`, `3 h 20 min`."""
    if seconds < 120:
        return f"{seconds:,.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def _numbers(score: Score) -> tuple[Cell, ...]:
    verdict = verdict_of(score)
    style = "" if verdict == "same" else verdict
    p_value = "< 0.001" if score.p_value < 0.001 else f"{score.p_value:.3f}"
    return (
        Cell(f"{score.base:.4f}"),
        Cell(f"{score.adapter:.4f}"),
        Cell(f"{score.difference:+.4f}", style),
        Cell(f"{score.low:+.4f} … {score.high:+.4f}", style),
        Cell(p_value),
        Cell(f"{score.rows:,}"),
        Cell(_WORDS[verdict], style),
    )


def _spread(median: float, quartiles: tuple[float, float]) -> tuple[Cell, Cell]:
    return Cell(f"{median:.4f}"), Cell(f"{quartiles[0]:.4f} … {quartiles[1]:.4f}")

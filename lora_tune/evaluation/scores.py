"""What an evaluation finds: scores of base and adapter, by metric, by task and by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_tune.adapter.card import Sample

__all__ = ["Comparison", "Direction", "RowScore", "Sample", "Score"]
Direction = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Score:
    """One metric over the same rows for both sides.

    `low` and `high` are the ends of the 95 % paired bootstrap interval of adapter - base; `p_value` is that of a paired
    test of "no difference" (two-sided); `direction` says which way is better.
    """

    base: float
    adapter: float
    low: float
    high: float
    p_value: float
    rows: int
    direction: Direction

    @property
    def difference(self) -> float:
        """adapter - base."""
        return self.adapter - self.base

    def as_json(self) -> dict[str, Any]:
        """The fields and the difference, as `--json` prints them."""
        return {
            "base": self.base,
            "adapter": self.adapter,
            "difference": self.difference,
            "low": self.low,
            "high": self.high,
            "p_value": self.p_value,
            "direction": self.direction,
            "rows": self.rows,
        }


@dataclass(frozen=True, slots=True)
class RowScore:
    """One held-out row: where it stands, what was asked and answered, and (base, adapter) of each metric.

    `source` is the file or data set as the user wrote it and `line` counts from 1. `task` and `template` are empty
    where the data has none; `base` and `adapter`, the answers, where no answer was asked for. For `loss` the pair holds
    nats per token of this row.
    """

    source: str
    line: int
    task: str
    template: str
    prompt: str
    reference: str
    base: str
    adapter: str
    metrics: Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Scores by metric, samples, scores by task ({task: {metric: score}}) and by template within a task
    ({task: {template: {metric: score}}}), and every row.

    `max_new_tokens` is where answers were cut, `stopped` the share of answers that ended by themselves, by side
    ("base", "adapter"); None and empty where no answer was asked for.
    """

    scores: dict[str, Score]
    samples: tuple[Sample, ...]
    max_new_tokens: int | None = None
    stopped: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, dict[str, Score]] = field(default_factory=dict)
    rows: tuple[RowScore, ...] = ()
    templates: dict[str, dict[str, dict[str, Score]]] = field(default_factory=dict)

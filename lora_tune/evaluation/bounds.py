"""`--at-least`: what an adapter must reach, and in words whether it did."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from lora_tune.errors import Problem, UsageError
from lora_tune.evaluation.scores import Score

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_BOUND = re.compile(rf"(?:(?P<task>[^=]+):)?(?P<metric>[^:=]+)=(?P<base>base)?(?P<value>{_NUMBER})?")
_FIX = "write metric=value (the adapter's score), metric=base+value (its difference), or task:metric=…"


@dataclass(frozen=True, slots=True)
class Bound:
    """A score that the adapter must reach: a value of its own, or the base's plus a value (`over` is "base").

    Where lower is better it must not be exceeded.
    """

    metric: str
    value: float
    over: Literal["", "base"] = ""
    task: str = ""
    text: str = ""

    def broken_by(self, scores: Mapping[str, Score], tasks: Mapping[str, Mapping[str, Score]]) -> Problem | None:
        """What is wrong where the adapter does not reach it. Raises: UsageError where this was not measured."""
        found = tasks.get(self.task, {}) if self.task else scores
        if self.metric not in found:
            known = [*found] if found else [*tasks]
            near = get_close_matches(self.metric if found else self.task, known, n=1, cutoff=0.4)
            what = f"{self.task}:{self.metric}" if self.task else self.metric
            fix = f"did you mean {near[0]}?" if near else f"measured were {', '.join(known) or 'none'}"
            raise UsageError(Problem(f"{what} was not measured", fix, key="--at-least"))
        score = found[self.metric]
        bound = self.value + (score.base if self.over else 0.0)
        right = score.adapter >= bound if score.direction == "higher" else score.adapter <= bound
        if right and not math.isnan(score.adapter):
            return None
        word = "at least" if score.direction == "higher" else "at most"
        meant = f"the base's {score.base:.4g} {self.value:+g} = {bound:.4g}" if self.over else f"{bound:.4g}"
        what = f"{self.task}: {self.metric}" if self.task else self.metric
        of = "the adapter's score, measured against the base's," if self.over else "the adapter's score"
        reason = f"{what}: {of} must be {word} {meant}, got {score.adapter:.4g}"
        return Problem(reason, f"asked for by --at-least {self.text}")


def read_bounds(texts: Sequence[str]) -> list[Bound]:
    """The bounds of the command line. Raises: UsageError."""
    bounds = []
    for text in texts:
        match = _BOUND.fullmatch(text.strip())
        if match is None or (match["base"] is None and match["value"] is None):
            raise UsageError(Problem(f"no bound, got {text!r}", _FIX, key="--at-least"))
        if match["base"] and match["value"] and match["value"][0] not in "+-":
            raise UsageError(Problem(f"no bound, got {text!r}", _FIX, key="--at-least"))
        value = float(match["value"] or 0.0)
        over: Literal["", "base"] = "base" if match["base"] else ""
        bounds.append(Bound(match["metric"].strip(), value, over, match["task"] or "", text.strip()))
    return bounds

"""Evaluations during training: when, what of it is kept, and when to stop; the training does not notice them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from lora_tune.errors import UsageError
from lora_tune.interrupts import Stop
from lora_tune.model.divided import whole
from lora_tune.training.state import trainable_tensors, undisturbed
from lora_tune.training.team import here


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What to measure during training.

    `measure` gets the model in evaluation mode and returns numbers by name; `loss`, lower is better, is among them
    where `keep` is "best" or `stop_after` is set. It runs every `every` optimizer steps. `keep`: "best" puts the
    weights with the lowest loss back at the end. `stop_after`: end the training when this many evaluations in a row
    bring no lower loss. `answer` returns (prompt, answer) pairs that are shown and recorded after each evaluation.
    """

    every: int
    measure: Callable[[PreTrainedModel], Mapping[str, float]]
    keep: Literal["last", "best"] = "last"
    stop_after: int | None = None
    answer: Callable[[PreTrainedModel], Sequence[tuple[str, str]]] | None = None


@dataclass(slots=True)
class Standing:
    """Where the evaluations stand: the best loss so far, its step, how many came since, and whether the evaluation of
    this step was cut short and is still to be made."""

    best_loss: float | None = None
    best_step: int | None = None
    since_best: int = 0
    stopped: bool = False
    pending: bool = False


@dataclass(slots=True)
class Evaluations:
    """The evaluations of one training: measures, remembers the best weights, says when to stop."""

    plan: Evaluation
    standing: Standing = field(default_factory=Standing)
    best_tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def due(self, step: int, *, last_step: int) -> bool:
        """Whether to evaluate after this step; the last one counts where the best weights are kept."""
        return step % self.plan.every == 0 or (self.plan.keep == "best" and step == last_step)

    @contextmanager
    def whole_or_pending(self) -> Iterator[None]:
        """Inside, an evaluation that a signal cuts short leaves everything as it was, and is pending."""
        before, best = replace(self.standing, pending=True), self.best_tensors
        try:
            yield
        except Stop:
            self.standing, self.best_tensors = before, best
            raise
        self.standing.pending = False

    def run(self, model: PreTrainedModel, *, step: int) -> tuple[dict[str, float], list[tuple[str, str]]]:
        """Measure the model, update the standing, and return the numbers and the sample answers.

        Raises:
            UsageError: the best weights or an early stop are asked for and `measure` gives no `loss`.
        """
        with undisturbed(model):
            scores = {name: float(value) for name, value in self.plan.measure(model).items()}
            answers = list(self.plan.answer(model)) if self.plan.answer else []
        scores, answers = here().share((scores, answers))
        if self.plan.keep == "best" or self.plan.stop_after:
            if "loss" not in scores:
                raise UsageError(f"the best weights are chosen by `loss`, got {sorted(scores)}", "measure it")
            self._compare(model, scores["loss"], step=step)
        return scores, answers

    def _compare(self, model: PreTrainedModel, loss: float, *, step: int) -> None:
        now = self.standing
        if math.isfinite(loss) and (now.best_loss is None or loss < now.best_loss):
            now.best_loss, now.best_step, now.since_best = loss, step, 0
            if self.plan.keep == "best":
                self.best_tensors = {name: whole(t).cpu().clone() for name, t in trainable_tensors(model).items()}
        else:
            now.since_best += 1
        now.stopped = self.plan.stop_after is not None and now.since_best >= self.plan.stop_after

    def as_json(self) -> dict[str, Any]:
        """The standing, as it is stored in a checkpoint."""
        return asdict(self.standing)

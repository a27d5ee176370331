"""What the engine has done since its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lora_tune.serving.backend import Counters, Statistics


@dataclass
class Totals:
    """Counts since the start."""

    steps: int = 0
    step_rows: int = 0
    step_s: float = 0.0
    prefill_tokens: int = 0
    models: dict[str, Counters] = field(default_factory=dict)

    def count(self, model: str, *, requests: int = 0, prompt: int = 0, completion: int = 0, ended: str = "") -> None:
        """Add to what a model has done."""
        old = self.models.get(model, Counters())
        self.models[model] = replace(
            old,
            requests=old.requests + requests,
            prompt_tokens=old.prompt_tokens + prompt,
            completion_tokens=old.completion_tokens + completion,
            cancelled=old.cancelled + (ended == "cancelled"),
            failed=old.failed + (ended == "failed"),
        )

    def with_jobs(self, *, running: Sequence[str], waiting: Sequence[str], queue: int) -> Statistics:
        """These counts and what is going on; `running` and `waiting` name the model of each request."""
        models = {
            name: replace(self.models.get(name, Counters()), running=running.count(name), waiting=waiting.count(name))
            for name in {*self.models, *running, *waiting}
        }
        now = len(running), len(waiting), queue
        return Statistics(*now, self.steps, self.step_rows, self.step_s, self.prefill_tokens, models)

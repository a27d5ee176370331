"""The learning rate of `train.learning_rate: auto`: the wider the base, the smaller the rate (cold).

Adam moves every weight by about the rate, whatever the gradient, and a product over h inputs adds h such moves up: the
best rate falls as 1/h (Yang et al., arXiv 2203.03466, table 3). Through the rate of 2e-4 that 7B bases are trained with
(QLoRA, arXiv 2305.14314, table 9) this gives 1e-4 at the width of a 65B, which is what the same table has, and 2.6e-3
for the embedded base, whose best was found to be 3e-3 (recipes/quickstart.yaml).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_tune.errors import Problem, RecipeError
from lora_tune.model.shape import read_shape
from lora_tune.recipe import Train

RATE, WIDTH = 2e-4, 4096


def learning_rate(train: Train, config: Mapping[str, Any]) -> float:
    """The peak learning rate for a base of this `config.json`, with three digits where it is at auto.

    Raises: UsageError where the config has no hidden size.
    """
    if train.learning_rate != "auto":
        return train.learning_rate
    return float(f"{RATE * WIDTH / read_shape(config).hidden:.3g}")


def rate_of(train: Train) -> float:
    """The peak learning rate, once it was decided. Raises RecipeError where it is still at auto."""
    if train.learning_rate == "auto":
        problem = Problem("must be a number by now, got 'auto'", "see the base first", key="train.learning_rate")
        raise RecipeError(problem)
    return train.learning_rate

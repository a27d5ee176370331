"""The recipe of a rehearsal: the same method, formats, metrics and quantization over a small base, in few steps."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_tune.model.shrink import HEAD
from lora_tune.recipe import DataSource, Recipe

TRAINED_STEPS, SAVE_EVERY, BATCH = 6, 2, 2
RATE = 1e-2  # learning rate: six steps must change the answers enough for the test vectors to see the adapter
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.|$)")


def small_source(source: DataSource, path: Path) -> DataSource:
    """The source with its rows in a file, or a folder, of this machine."""
    changes: dict[str, Any] = {
        "source": str(path),
        "config": None,
        "split": "train",
        "revision": None,
        "max_rows": None,
    }
    if source.format == "sni":  # written as task files; rows of the hub have no examples
        of_files = Path(source.source).exists() or glob.has_magic(source.source)
        changes |= {"columns": None, "shots": source.shots if of_files else 0}
    return source.model_copy(update=changes)


def small_recipe(
    recipe: Recipe, *, base: Path, data: Sequence[DataSource], hold_out: str | int, longest: int
) -> Recipe:
    """The recipe over the small base and the sample: few steps, limits off (they held for all rows), no trackers."""
    train, lora, evaluation = recipe.train, recipe.lora, recipe.eval
    batch = min(BATCH, train.batch_size)
    layers = train.gradient_checkpointing  # the small base keeps two of them at least
    changes: dict[str, dict[str, Any]] = {
        "base": {"name": str(base), "revision": None},
        "lora": {
            "start_from": None,  # its shapes are those of the real base
            "rank": min(lora.rank, HEAD),
            "rank_pattern": {name: min(rank, HEAD) for name, rank in lora.rank_pattern.items() if _stays(name)},
            "alpha_pattern": {name: alpha for name, alpha in lora.alpha_pattern.items() if _stays(name)},
        },
        "train": {
            "epochs": 1.0, "max_steps": TRAINED_STEPS, "budget": None, "save_every": SAVE_EVERY, "learning_rate": RATE,
            "batch_size": batch, "micro_batch_size": 1, "max_length": longest,
            "gradient_checkpointing": layers if isinstance(layers, str) else min(layers, 2),
            "warmup": min(train.warmup, 1) if isinstance(train.warmup, int) else train.warmup,
        },
        "eval": {
            "hold_out": hold_out, "hold_out_tasks": (), "every": evaluation.every and SAVE_EVERY,
            "stop_after": evaluation.stop_after and TRAINED_STEPS, "samples": min(evaluation.samples, 1),
        },
        "limits": {"dropped_rows": "100%", "lost_tokens": "100%", "lost_end_tokens": "100%", "duplicates": None},
    }  # fmt: skip
    tasks = {source.task for source in data}
    changes["eval"]["hold_out_tasks"] = tuple(task for task in evaluation.hold_out_tasks if task in tasks)
    content = recipe.model_dump() | {"data": [source.model_dump() for source in data], "output": "calm", "track": ()}
    for section, values in changes.items():
        content[section] = content[section] | values
    return Recipe.model_validate(content)


def _stays(name: str) -> bool:
    """Whether a name does not speak of a layer that the small base does not have."""
    numbered = _LAYER.search(name)
    return numbered is None or int(numbered[1]) < 2

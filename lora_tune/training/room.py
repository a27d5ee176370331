"""Room on the disk for a whole run: asked for before the base is loaded, and kept for the adapter at the end."""

from __future__ import annotations

from pathlib import Path

from lora_tune.adapter.claim import RESERVE, remove_older_run
from lora_tune.adapter.folder import CHECKPOINTS, MANIFEST
from lora_tune.disk import disk_text, free_bytes, give_back, make_reserve, size_text, tree_bytes
from lora_tune.errors import Problem, ResourceError
from lora_tune.model.memory import trainable_parameters
from lora_tune.model.shape import read_shape
from lora_tune.model.source import BaseSource
from lora_tune.recipe import Recipe
from lora_tune.training.start import Start

_WEIGHT = 4  # bytes of a trained weight, in a checkpoint and in the adapter
_STATE = {"adamw_8bit": 2.1, "paged_adamw_8bit": 2.1, "lion_8bit": 1.1, "adafactor": 1.0, "sgd": 0.0}  # else 8
_TWICE = ("pissa", "olora")  # saved with twice the rank
_SMALL_FILES = 1 << 20  # card, ledger, report, vectors, metrics, pictures
_SMALL_STATE = 64 << 10  # random numbers, schedule, JSON


def checkpoint_bytes(recipe: Recipe, parameters: int) -> int:
    """About how large a checkpoint is: the adapter, the optimizer's state, and the best weights where they are kept."""
    each = _WEIGHT + _STATE.get(recipe.train.optimizer, 8.0) + (_WEIGHT if recipe.eval.keep_best else 0)
    return int(parameters * each) + _SMALL_STATE


def adapter_bytes(recipe: Recipe, source: BaseSource, parameters: int) -> int:
    """About how large the finished folder is: the adapter, the base's tokenizer and the small files."""
    weights = parameters * _WEIGHT * (2 if recipe.lora.method in _TWICE else 1)
    names = ("tokenizer*", "vocab*", "merges*", "added_tokens*", "special_tokens*")
    tokenizer = sum(path.stat().st_size for name in names for path in source.folder.glob(name) if path.is_file())
    return weights + tokenizer + _SMALL_FILES


def take_room(folder: Path, recipe: Recipe, source: BaseSource, *, start: Start) -> None:
    """Check that all checkpoints and the adapter will fit, clear away the older run of an `overwrite`, and set the
    adapter's room aside in a file that `free_room` gives back.

    Raises:
        ResourceError: the disk has too little room; nothing was removed.
    """
    parameters = trainable_parameters(read_shape(source.config), recipe.lora)
    each, final = checkpoint_bytes(recipe, parameters), adapter_bytes(recipe, source, parameters)
    if start.found is not None:
        each = max(each, tree_bytes(start.found.folder))
    kept = recipe.train.keep_checkpoints + 1  # the newest is whole before the oldest goes
    needed = kept * each + final
    there = tree_bytes(folder if start.mode == "overwrite" else folder / CHECKPOINTS)
    free = free_bytes(folder)
    if needed - there > free:
        parts = f"{kept} checkpoints of {size_text(each)} and the adapter of {size_text(final)}"
        reason = f"needs {size_text(needed - there)} for {parts}, but {size_text(free)} are free"
        fix = "make room, lower train.keep_checkpoints, or choose another output"
        raise ResourceError(Problem(reason, fix, str(folder), key="output"))
    if start.mode == "overwrite":
        remove_older_run(folder)
    try:
        (folder / MANIFEST).unlink(missing_ok=True)  # a finished run that goes on counts as unfinished
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        make_reserve(folder / CHECKPOINTS / RESERVE, final)
    except OSError as error:
        reason = f"no room for the adapter can be set aside: {disk_text(error, folder, needed=final)}"
        raise ResourceError(Problem(reason, "make room, or choose another output", key="output")) from None


def free_room(folder: Path) -> None:
    """Give the room that was set aside to what is written now."""
    give_back(folder / CHECKPOINTS / RESERVE)

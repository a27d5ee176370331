"""What a run is, so that only the same run is resumed; and which changes to it `--allow-change` may permit.

The identity is compared field by field. A field that decides which numbers the training computes cannot change; one
that only says how long it goes on, what is saved or what is measured may, when it is asked for by name.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tune import __version__
from lora_tune.adapter.folder import WEIGHTS
from lora_tune.adapter.write import library_versions
from lora_tune.errors import Problem, UsageError
from lora_tune.model.source import BaseSource, base_fingerprint
from lora_tune.recipe import Recipe
from lora_tune.recipe_values import SHARE

if TYPE_CHECKING:
    from datasets import Dataset

    from lora_tune.data.chat_template import ChatTemplate
    from lora_tune.data.pipeline import Prepared

# not part of the identity: where things lie (their content is), what is only told to others, and on how many cards
_FREE: Any = {
    "output": True,
    "track": True,
    "hardware": True,
    "base": {"name", "chat_template", "embeddings"},
    "lora": {"start_from"},
}
_PLACES = ("source", "prompts")  # of a data source
FINGERPRINT = "base.fingerprint"

# What may change when `--allow-change` names it: what then happens, in words.
SAFE: dict[str, str] = {
    "train.max_steps": "the learning rate goes on as in a run that had the new number from its start",
    "train.epochs": "the learning rate goes on as in a run that had the new number from its start",
    "train.save_every": "other steps are saved",
    "train.keep_checkpoints": "more or fewer checkpoints stay",
    "train.max_skipped_steps": "more or fewer steps may be left out",
    "train.micro_batch_size": "the same step in other parts: losses differ by rounding",
    "train.gradient_checkpointing": "the same numbers from less or more memory",
    "train.offload": "the same numbers from less or more memory of the GPU",
    "train.budget": "another limit for time",
    "eval.every": "other steps are evaluated",
    "eval.metrics": "other scores at the end",
    "eval.samples": "more or fewer answers are shown",
    "eval.stop_after": "training stops earlier or later",
    "limits": "the limits were kept when the run started",
    "versions": "other library versions: losses may differ by rounding, or more",
}
# Why nothing else may: the first entry that a key starts with.
_REFUSED: tuple[tuple[str, str], ...] = (
    ("base", "the adapter belongs to the base that it was trained on"),
    ("lora", "the tensors of the checkpoint are of another adapter"),
    ("train.optimizer", "the state in the checkpoint is of another optimizer"),
    ("train.max_length", "the rows would be others, in another order"),
    ("train.too_long", "the rows would be others, in another order"),
    ("train.packing", "the rows would be others, in another order"),
    ("train.batch_size", "the steps would be others"),
    ("train", "the steps so far were taken with the old value"),
    ("eval.hold_out", "the rows would be others, in another order"),
    ("eval", "losses before and after could not be compared"),
    ("seed", "the order of the rows comes from it"),
    ("", "the rows would be others, in another order"),
)


def run_identity(recipe: Recipe, source: BaseSource, prepared: Prepared, chat: ChatTemplate) -> dict[str, Any]:
    """What a continued run shares with the one it continues: recipe, base, template and data by content, versions.

    `recipe` is the recipe as it was written, with `auto` where it says so. The fingerprint of a hub base is None while
    its weights are not on this machine.
    """
    stored = recipe.model_dump(mode="json", exclude=_FREE)
    for entry in stored["data"]:
        for name in _PLACES:
            entry.pop(name, None)
    if isinstance(recipe.eval.hold_out, str) and not SHARE.fullmatch(recipe.eval.hold_out):
        stored["eval"]["hold_out"] = "a file"
    stored["data"] = {str(number): entry for number, entry in enumerate(stored["data"])}
    contents = {f"{number}.{entry.name}": entry.sha256 for number, entry in enumerate(prepared.identities)}
    return {
        **stored,
        "base": {**stored["base"], "name": source.name, "fingerprint": _fingerprint(source)},
        "template": chat.sha256,
        "content": contents,
        "start_from": _adapter_hash(recipe.lora.start_from),
        "rows": rows_hash(prepared.train),
        "versions": {"lora_tune": __version__, "python": platform.python_version(), **library_versions()},
    }


def rows_hash(rows: Dataset) -> str:
    """sha256 over the training rows in their order: tokens, labels and lengths of documents, whatever made them."""
    digest = hashlib.sha256()
    names = [name for name in ("input_ids", "labels", "seq_lengths") if name in rows.column_names]
    for batch in rows.with_format("arrow").select_columns(names).iter(batch_size=1024):
        for name in names:
            for chunk in batch.column(name).chunks:
                digest.update(chunk.value_lengths().to_numpy(zero_copy_only=False).tobytes())
                digest.update(chunk.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The fields in which two identities differ, by name; what only follows from another change is left out."""
    before, now = _flat(saved), _flat(current)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if FINGERPRINT in changed and None in (before.get(FINGERPRINT), now.get(FINGERPRINT)):
        changed.remove(FINGERPRINT)  # the weights were not on this machine yet
    if len(changed) > 1 and "rows" in changed:
        changed.remove("rows")  # they follow from something else that changed
    return changed


def check_identity(saved: Mapping[str, Any], current: Mapping[str, Any], *, allowed: Collection[str] = ()) -> None:
    """Refuse to resume a run whose recipe, data, base or versions have changed, but for what `allowed` names.

    Raises:
        UsageError: one problem for every field that differs, with the old and the new value and what can be done.
    """
    before, now = _flat(saved), _flat(current)
    changed = [key for key in differences(saved, current) if not is_allowed(key, allowed)]
    problems = [_problem(key, before.get(key), now.get(key)) for key in changed]
    if problems:
        raise UsageError(problems)


def check_allowed(keys: Iterable[str]) -> None:
    """Refuse what `--allow-change` must not name, before anything is read.

    Raises: UsageError with the reason for each.
    """
    problems = []
    for key in keys:
        if not _safe(key):
            near = get_close_matches(key, SAFE, n=1, cutoff=0.8)
            fix = f"did you mean {near[0]}?" if near else f"what may change: {', '.join(SAFE)}"
            problems.append(Problem(f"--allow-change {key}: cannot change in a run: {_why_not(key)}", fix))
    if problems:
        raise UsageError(problems)


def is_allowed(key: str, allowed: Collection[str]) -> bool:
    """Whether one of the keys in `allowed`, such as `train.max_steps` or `versions`, permits a change of this field."""
    return _safe(key) and any(key == name or key.startswith(f"{name}.") for name in allowed)


def _safe(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in SAFE)


def _why_not(key: str) -> str:
    return next(reason for start, reason in _REFUSED if not start or key == start or key.startswith(f"{start}."))


def _problem(key: str, before: Any, now: Any) -> Problem:
    fix = (
        f"restore it, or add --allow-change {key}" if _safe(key) else f"restore it, or start a new run: {_why_not(key)}"
    )
    return Problem(f"was {before!r} when the run started, got {now!r}", fix, key=key)


def _fingerprint(source: BaseSource) -> str | None:
    try:
        return base_fingerprint(source)
    except UsageError:  # a hub base before its weights were loaded
        return None


def _adapter_hash(folder: str | None) -> str | None:
    if folder is None:
        return None
    path = Path(folder) / WEIGHTS
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat

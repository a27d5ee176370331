"""An adapter's tensors by the parameters of its base that they change, for folding it in."""

from __future__ import annotations

import re

from lora_tune.adapter.expected_keys import PREFIX
from lora_tune.adapter.lora_config import read_settings
from lora_tune.errors import CheckFailed, Problem
from lora_tune.model.fold import Folds, Layout, Update
from lora_tune.model.methods import SavedAdapter

_A = re.compile(re.escape(PREFIX) + r"(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<kind>A\.weight|embedding_A)")
_PART = re.compile(r"\.lora_(?:[AB]\.weight|embedding_[AB]|magnitude_vector)$")


def folds_of(saved: SavedAdapter) -> Folds:
    """The updates and replacements of a checked adapter.

    Raises: CheckFailed for trained token embeddings, which have rows that the base does not have.
    """
    settings = read_settings(saved.config)
    if settings.trained_tokens:
        raise CheckFailed(Problem("not supported: trained token embeddings", "merge it with the whole base in memory"))
    updates: dict[str, Update] = {}
    for key, a in saved.tensors.items():
        match = _A.fullmatch(key)
        if match is None:
            continue
        module, stem = match["module"], key.removesuffix(match["kind"])
        is_embedding = match["kind"] == "embedding_A"
        layout: Layout = "embedding" if is_embedding else "transposed" if settings.transposed else "linear"
        updates[f"{module}.weight"] = Update(
            a_RI=a,
            b_OR=saved.tensors[stem + ("embedding_B" if is_embedding else "B.weight")],
            scale=settings.scale_of(module),
            layout=layout,
            magnitude_O=saved.tensors.get(f"{PREFIX}{module}.lora_magnitude_vector"),
        )
    others = {key.removeprefix(PREFIX): tensor for key, tensor in saved.tensors.items() if not _PART.search(key)}
    return Folds(updates, others)

"""An adapter as llama.cpp's GGUF adapter.

llama.cpp takes alpha over the rank of each tensor for its scale. So the canonical form is written, in which that is 1
and the true scale of every module stands in its B. The rows of B change places where those of the base's weight do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_tune.adapter.canonical import canonical
from lora_tune.adapter.expected_keys import PREFIX
from lora_tune.adapter.load import read_adapter
from lora_tune.errors import CheckFailed, Problem
from lora_tune.model.export_gguf import gguf_names
from lora_tune.model.gguf_architecture import Rearrange, Shape, row_order, shape_of
from lora_tune.model.gguf_file import Kind, Tensor, Value, f32, write_gguf
from lora_tune.model.methods import SavedAdapter
from lora_tune.model.source import BaseSource
from lora_tune.model.streaming import sketch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lora_tune.adapter.export_job import Dtype

_KINDS: dict[str, Kind] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_PART = re.compile(re.escape(PREFIX) + r"(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<part>A\.weight|B\.weight|embedding_[AB])")


def write_gguf_adapter(folder: Path, output: Path, *, source: BaseSource, dtype: Dtype = "float32") -> dict[str, Any]:
    """Write the adapter of a folder as a GGUF adapter for llama.cpp over its base, `source`; returns what was measured.

    Raises: CheckFailed where the folder fails a check, has parts that are no B·A, or its base is of a kind that
    llama.cpp computes otherwise; UsageError where the package gguf is not installed.
    """
    form = canonical(read_adapter(folder), dtype=dtype)
    model = sketch(source)
    shape, shared = shape_of(model.config), frozenset(_tied(model))
    tensors = _tensors(form.adapter, shape, kind=_KINDS[dtype], shared=shared)
    metadata: dict[str, Value] = {
        "general.type": "adapter",
        "general.name": folder.resolve().name,
        "adapter.type": "lora",
        "adapter.lora.alpha": f32(form.rank),
    }
    size = write_gguf(output, shape.architecture.name, metadata, tensors)
    return {
        "architecture": shape.architecture.name,
        "rank": form.rank,
        "dtype": dtype,
        "bytes": size,
        "largest_relative_error": form.error,
    }


def _tied(model: PreTrainedModel) -> Iterator[str]:
    """The parameters that are one tensor with another one: embeddings and head of many bases."""
    for name, other in model.all_tied_weights_keys.items():
        yield from (name, other)


def _tensors(saved: SavedAdapter, shape: Shape, *, kind: Kind, shared: frozenset[str]) -> list[Tensor]:
    """Every A and B of a canonical adapter under llama.cpp's names."""
    found = [
        (match["module"], match["part"], tensor)
        for key, tensor in saved.tensors.items()
        if (match := _PART.fullmatch(key))
    ]
    names = gguf_names(shape, sorted({f"{module}.weight" for module, _, _ in found}))
    tensors = []
    for module, part, tensor in sorted(found, key=lambda one: one[:2]):
        parameter = f"{module}.weight"
        name = names[parameter]
        if parameter in shared:
            reason = f"not supported in a GGUF adapter: {module}, which the base shares with another layer"
            raise CheckFailed(Problem(reason, "merge it: lora-tune merge"))
        is_b = part in ("B.weight", "embedding_B")
        rows = row_order(shape, parameter) if is_b else None
        values = tensor.T if part == "embedding_A" else tensor
        letter = "lora_b" if is_b else "lora_a"
        tensors.append(Tensor(f"{name}.{letter}", tuple(values.shape), kind, _reader(values, rows)))
    return tensors


def _reader(values: torch.Tensor, rows: Rearrange | None) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        found: np.ndarray = values.float().contiguous().numpy()
        return found if rows is None else rows(found)

    return read

"""A folded base as a transformers folder, written shard by shard: at most one shard is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lora_tune.errors import CheckFailed, Problem
from lora_tune.model.source import BaseSource
from lora_tune.model.streaming import Change
from lora_tune.model.weights import TensorInfo, tensor_infos

SHARD_BYTES = 1 << 30


def write_folded(
    source: BaseSource, folder: Path, names: Mapping[str, str], *, change: Change, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write every tensor of the base's files, changed, in its stored dtype, under its stored name; returns the bytes.

    `names` says which tensor of the files each parameter of the model is. Where one file is enough it is
    `model.safetensors`, else there is an index.

    Raises: CheckFailed where a weight is not finite in the dtype of the base.
    """
    infos = tensor_infos(source.folder)
    parameter_of = {stored: name for name, stored in reversed(list(names.items()))}  # of a tied pair the embedding
    shards = list(_shards(infos, shard_bytes))
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for stored in shard:
            with safe_open(infos[stored].file, framework="pt") as file:
                weight = file.get_tensor(stored)
            changed = change(parameter_of.get(stored, stored), weight).to(weight.dtype)
            if weight.is_floating_point() and not bool(torch.isfinite(changed).all()):
                reason = f"{stored} is not finite in {str(weight.dtype).removeprefix('torch.')} after the merge"
                raise CheckFailed(Problem(reason, "verify the adapter, or serve it unmerged"))
            tensors[stored] = changed.contiguous()
            placed[stored] = file_name
        save_file(tensors, folder / file_name, {"format": "pt"})
    total = sum(info.end - info.start for info in infos.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return total


def _shards(infos: Mapping[str, TensorInfo], most: int) -> Iterator[list[str]]:
    """Names of tensors in groups of at most `most` bytes, in the order of the files; a larger tensor stands alone."""
    group: list[str] = []
    held = 0
    for name, info in sorted(infos.items(), key=lambda item: (item[1].file.name, item[1].start)):
        size = info.end - info.start
        if group and held + size > most:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group

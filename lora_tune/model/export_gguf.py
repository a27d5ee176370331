"""A base, or a merged model, as one GGUF file: read, rearranged and written tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import safe_open

from lora_tune.errors import CheckFailed, Problem, UsageError
from lora_tune.model.base import compute_dtype
from lora_tune.model.gguf_architecture import (
    Rearrange,
    Shape,
    metadata_of,
    rearranged,
    rope_factors,
    shape_of,
)
from lora_tune.model.gguf_file import FILE_TYPES, Kind, Tensor, Value, stored_kind, tensor_names, u32, write_gguf
from lora_tune.model.gguf_tokenizer import GgufTokenizer, gguf_tokenizer
from lora_tune.model.source import BaseSource
from lora_tune.model.streaming import Change, as_held, quantized_names, sketch, stored_names
from lora_tune.model.weights import TensorInfo, tensor_infos
from lora_tune.recipe import Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_tune.data.chat_template import ChatTemplate

GgufDtype = Literal["stored", "float32", "float16", "bfloat16", "q8_0"]
_KINDS: dict[str, Kind] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_STORED: dict[str, Kind] = {"F32": "F32", "F16": "F16", "BF16": "BF16"}


@dataclass(frozen=True, slots=True)
class GgufBase:
    """A file that was written: its bytes, architecture in llama.cpp's words, number format, and its tokenizer."""

    bytes: int
    architecture: str
    kind: Kind
    tokenizer: GgufTokenizer

    def facts(self) -> dict[str, Any]:
        """What `--json` says of it."""
        cut = self.tokenizer.metadata["tokenizer.ggml.pre"]
        return {"architecture": self.architecture, "dtype": self.kind, "bytes": self.bytes, "pre_tokenizer": cut}


def write_gguf_base(
    source: BaseSource,
    output: Path,
    *,
    chat: ChatTemplate,
    dtype: GgufDtype = "stored",
    held: Base | None = None,
    name: str = "",
) -> GgufBase:
    """Write a base as a GGUF file of `dtype`; at most one of its tensors is in memory.

    `chat` gives tokenizer, template and stop tokens (of the base, or of the adapter that will run on it); `held`
    says how training held it: weights that it had in 4 or 8 bit are written as what those stand for. `name` is what the
    file calls itself, by default as the base.

    Raises:
        CheckFailed: llama.cpp would compute something else (architecture, rotation, tokenizer), named in one line.
        UsageError: the package gguf is not installed, the base cannot be built.
    """
    model = sketch(source)
    names = stored_names(model, source)
    if names is None:
        reason = f"not supported in a GGUF file: the weights of {source.name!r} are stored in another arrangement"
        raise CheckFailed(Problem(reason, "merge it: lora-tune merge, and export the merged model"))
    shape = shape_of(model.config)
    tokenizer = gguf_tokenizer(chat, rows=int(model.get_input_embeddings().weight.shape[0]))
    infos = tensor_infos(source.folder)
    if not infos:
        raise UsageError(f"base {source.name!r}: its weights are not here", "load it once, or give its folder")
    kind = _kind(dtype, infos, names)
    tensors = _tensors(shape, names, infos, kind=kind, change=_change(model, held))
    metadata: dict[str, Value] = {
        "general.type": "model",
        "general.name": name or source.name.rpartition("/")[2].removeprefix("builtin:"),
        "general.file_type": u32(FILE_TYPES[kind]),
        "general.quantization_version": u32(2),
        **metadata_of(shape),
        **tokenizer.metadata,
    }
    size = write_gguf(output, shape.architecture.name, metadata, tensors)
    return GgufBase(size, shape.architecture.name, kind, tokenizer)


def gguf_names(shape: Shape, parameters: list[str]) -> dict[str, str]:
    """{parameter: its name in the file}. Raises: CheckFailed for one that llama.cpp has no place for."""
    found = tensor_names(shape.architecture.name, shape.layers, parameters)
    missing = [name for name, known in found.items() if known is None]
    if missing:
        reason = f"not supported in a GGUF file: {missing[0]} of a base of type {shape.config.model_type!r}"
        raise CheckFailed(Problem(reason, "serve it with another engine, such as vLLM"))
    return {name: known for name, known in found.items() if known is not None}


def _kind(dtype: GgufDtype, infos: Mapping[str, TensorInfo], names: Mapping[str, str]) -> Kind:
    """How matrices are stored: as asked for, or as most of the base's own numbers are."""
    if dtype != "stored":
        return _KINDS[dtype]
    sizes: dict[str, int] = {}
    for stored in set(names.values()):
        info = infos[stored]
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.end - info.start
    return _STORED.get(max(sizes, key=lambda name: sizes[name]), "F32")


def _tensors(
    shape: Shape,
    names: Mapping[str, str],
    infos: Mapping[str, TensorInfo],
    *,
    kind: Kind,
    change: Change | None,
) -> list[Tensor]:
    """Every tensor of the file in its order; a head that is tied to the embedding is not written again."""
    tied = [name for name, stored in names.items() if _first(names, stored) != name]
    kept = [name for name in names if name not in tied]
    tensors = []
    factors = rope_factors(shape)
    if factors is not None:
        values = factors
        tensors.append(Tensor("rope_freqs.weight", values.shape, "F32", lambda: values))
    for parameter, name in gguf_names(shape, kept).items():
        info = infos[names[parameter]]
        read = _reader(info, names[parameter], parameter, change=change, rearrange=rearranged(shape, parameter))
        tensors.append(Tensor(name, tuple(info.shape), stored_kind(info.shape, kind), read))
    return tensors


def _first(names: Mapping[str, str], stored: str) -> str:
    return next(name for name, one in names.items() if one == stored)


def _change(model: PreTrainedModel, held: Base | None) -> Change | None:
    """4 or 8 bit and back, for a base that training held so."""
    if held is None or held.quantize == "none":
        return None
    return as_held(held, quantized_names(model), dtype=compute_dtype(held))


def _reader(
    info: TensorInfo, stored: str, parameter: str, *, change: Change | None, rearrange: Rearrange | None
) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        with safe_open(info.file, framework="pt") as file:
            weight: torch.Tensor = file.get_tensor(stored)
        if change is not None:
            weight = change(parameter, weight)
        values: np.ndarray = weight.float().numpy()
        return values if rearrange is None else rearrange(values)

    return read

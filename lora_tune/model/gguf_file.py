"""The GGUF format: metadata and tensors of llama.cpp's files, written one tensor at a time; the one user of `gguf`.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lora_tune.errors import CheckFailed, Problem, UsageError

Kind = Literal["F32", "F16", "BF16", "Q8_0"]
"""How the numbers of a tensor are stored. Q8_0 rounds blocks of 32 to 8 bit, and needs rows that they divide."""
FILE_TYPES: dict[Kind, int] = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
"""`general.file_type` of a file most of whose tensors are of this kind."""
_MISSING = "GGUF files are written through the package gguf, which is not installed"
_INSTALL = "pip install 'lora_tune[gguf]'"


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to write: its name in the file, its shape (rows first), how it is stored, and where it comes from.

    `read` gives it as float32 when its turn comes, so that one tensor at a time is in memory.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    read: Callable[[], np.ndarray]


@dataclass(frozen=True, slots=True)
class Typed:
    """A value of the metadata whose type the format prescribes."""

    value: int | float
    kind: Literal["uint32", "float32"]


Value = str | bool | Typed | Sequence[Any]


def u32(value: int) -> Typed:
    """A whole number of the metadata."""
    return Typed(int(value), "uint32")


def f32(value: float) -> Typed:
    """A number of the metadata."""
    return Typed(float(value), "float32")


def write_gguf(path: Path, architecture: str, metadata: Mapping[str, Value], tensors: Iterable[Tensor]) -> int:
    """Write one GGUF file; returns its bytes. At most one tensor is in memory.

    Raises:
        UsageError: the package gguf is not installed.
        CheckFailed: a tensor is not finite in the kind that it is stored as, or has another shape than was said.
    """
    gguf = _gguf()
    planned = list(tensors)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for tensor in planned:
        shape, dtype = _stored(gguf, tensor)
        size = int(np.prod(shape)) * dtype.itemsize
        raw = None if tensor.kind in ("F32", "F16") else gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, shape, dtype, size, raw)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in planned:
            writer.write_tensor_data(_encoded(gguf, tensor))
    finally:
        writer.close()
    return path.stat().st_size


def stored_kind(shape: Sequence[int], wanted: Kind) -> Kind:
    """How a tensor of this shape is stored where `wanted` is asked for.

    Vectors stay float32, which llama.cpp's operations on them need; rows that blocks do not divide stay float16.
    """
    if len(shape) < 2:
        return "F32"
    return "F16" if wanted == "Q8_0" and shape[-1] % 32 else wanted


def tensor_names(architecture: str, layers: int, parameters: Iterable[str]) -> dict[str, str | None]:
    """{parameter of a transformers model: its name in a GGUF file, None where llama.cpp knows none}.

    Raises: UsageError where the package gguf is not installed, or does not know the architecture.
    """
    gguf = _gguf()
    found = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if found is None:
        raise UsageError(f"the installed gguf does not know the architecture {architecture!r}", "install a newer one")
    table = gguf.get_tensor_name_map(found, layers)
    return {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in parameters}


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise UsageError(Problem(_MISSING, _INSTALL)) from None
    return gguf


def _add(writer: Any, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, Typed):
        (writer.add_uint32 if value.kind == "uint32" else writer.add_float32)(key, value.value)
    else:
        writer.add_array(key, list(value))


def _stored(gguf: Any, tensor: Tensor) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of the bytes that a tensor becomes."""
    if tensor.kind in ("F32", "F16"):
        return tensor.shape, np.dtype(np.float32 if tensor.kind == "F32" else np.float16)
    kind = gguf.GGMLQuantizationType[tensor.kind]
    return tuple(gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)), np.dtype(np.uint8)


def _encoded(gguf: Any, tensor: Tensor) -> np.ndarray:
    values = np.ascontiguousarray(tensor.read(), dtype=np.float32)
    if values.shape != tensor.shape:
        reason = f"{tensor.name} must have the shape {list(tensor.shape)}, got {list(values.shape)}"
        raise CheckFailed(Problem(reason, "verify base and adapter"))
    if tensor.kind == "F16":
        with np.errstate(over="ignore"):
            values = values.astype(np.float16)
    if not bool(np.isfinite(values).all()):
        raise CheckFailed(Problem(f"{tensor.name} is not finite as {tensor.kind}", "export it with --dtype float32"))
    if tensor.kind in ("F32", "F16"):
        return values
    encoded: np.ndarray = gguf.quants.quantize(values, gguf.GGMLQuantizationType[tensor.kind])
    return encoded

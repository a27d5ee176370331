"""The header and the values of a safetensors file from anywhere, checked before anything is allocated. No torch.

Format: https://github.com/huggingface/safetensors — 8 bytes little-endian header length, a JSON header
`{name: {dtype, shape, data_offsets}}`, then the tensors without gaps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.adapter.regular_file import parse_json, regular_file
from lora_tune.errors import CheckFailed, Problem

HEADER_BYTES = 8 << 20  # 60,000 tensors; an adapter on every expert of the largest open models has about 40,000
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_LAYOUT = {"F64": ("<u8", 52), "F32": ("<u4", 23), "F16": ("<u2", 10), "BF16": ("<u2", 7)}  # bits of the mantissa
_BIAS = {"F64": 1023, "F32": 127, "F16": 15, "BF16": 127}
_CHUNK = 1 << 22  # numbers that are looked at in one go
_MOST_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the header; `start` and `stop` count bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, in the order in which they are stored.

    Raises: CheckFailed where the file is none: a header that is too large or damaged, dtypes other than float,
    tensors that overlap, leave gaps or end outside the file.
    """
    size = regular_file(path)
    with path.open("rb") as stream:
        first = stream.read(8)
        if first == b"version " and size < 1024:
            raise CheckFailed(Problem("is a Git LFS pointer, not the file itself", "run git lfs pull", str(path)))
        length = int.from_bytes(first, "little")
        if size < 10 or not 2 <= length <= size - 8:
            raise _damaged(path, f"the header's length must be between 2 and the file's {size} bytes, got {length}")
        if length > HEADER_BYTES:
            raise _damaged(path, f"the header is read up to {HEADER_BYTES} bytes, got {length}")
        text = stream.read(length)
    header = parse_json(text, where=str(path))
    if not isinstance(header, dict):
        raise _damaged(path, f"the header must be an object, got {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "the header's __metadata__ must hold text only")
    entries = {name: _entry(path, name, value, data_start=8 + length) for name, value in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    position = 8 + length
    for name, entry in ordered.items():
        if entry.start != position:
            fault = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise _damaged(path, f"{name[:120]} {fault}")
        position = entry.stop
    if position != size:
        fault = f"{position - size} bytes are missing" if position > size else f"{size - position} bytes too many"
        raise _damaged(path, f"{fault} after the last tensor")
    return ordered


def worst_value(path: Path, entry: TensorEntry) -> float:
    """The largest absolute value of a tensor, rounded down to a power of two; `inf` where one is not finite.

    Looks at the bits alone (without its sign, a float orders like an integer): no conversion, at most 64 MiB in memory.
    """
    import numpy

    kind, mantissa = _LAYOUT[entry.dtype]
    item = ITEM_BYTES[entry.dtype]
    largest = 0
    with path.open("rb") as stream:
        stream.seek(entry.start)
        left = (entry.stop - entry.start) // item
        while left > 0:
            bits = numpy.frombuffer(stream.read(min(left, _CHUNK) * item), dtype=kind)
            if not bits.size:
                return math.inf
            left -= bits.size
            largest = max(largest, int((bits & bits.dtype.type((1 << (8 * item - 1)) - 1)).max()))
    exponent = largest >> mantissa
    if exponent == (1 << (8 * item - 1 - mantissa)) - 1:
        return math.inf
    return 2.0 ** (exponent - _BIAS[entry.dtype]) if exponent else 0.0


def parameters(header: Mapping[str, TensorEntry]) -> int:
    """How many numbers the tensors hold together."""
    return sum(math.prod(entry.shape) for entry in header.values())


def _entry(path: Path, name: str, value: Any, *, data_start: int) -> TensorEntry:
    shown = name[:120]
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{shown} must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in ITEM_BYTES:
        raise _damaged(path, f"{shown} must be F32, F16, BF16 or F64, got {str(dtype)[:20]}")
    if not _counts(shape) or len(shape) > _MOST_DIMENSIONS:
        raise _damaged(path, f"{shown} has no valid shape, got {str(shape)[:60]}")
    if not _counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"{shown} has no valid data_offsets, got {str(offsets)[:60]}")
    start, stop = offsets
    if stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise _damaged(path, f"{shown} of shape {shape} and {dtype} does not fill its {stop - start} bytes")
    return TensorEntry(dtype, tuple(shape), data_start + start, data_start + stop)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _damaged(path: Path, reason: str) -> CheckFailed:
    return CheckFailed(Problem(f"is no sound safetensors file: {reason}", "copy the file again", str(path)))

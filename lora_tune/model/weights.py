"""The safetensors files of a base, read from their headers alone: names, shapes, fingerprint (cold: no torch).

Format: 8 bytes little-endian length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data
(https://huggingface.co/docs/safetensors, section Format).
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.errors import UsageError

HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library itself
_EDGE = 4096  # bytes of data at either end of a tensor that enter the fingerprint
_LFS = b"version https://git-lfs"
_DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor stands: `start` and `end` are byte offsets in `file`."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is the short text that Git LFS leaves in place of the real file."""
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file.

    Raises:
        UsageError: the file is a Git LFS pointer, truncated, or not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == _LFS[:8]:
            raise UsageError(f"{path}: this is a Git LFS pointer, not the weights", "run `git lfs pull` in that folder")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(HEADER_LIMIT, max(size - 8, 0)):
            raise _damaged(path, f"a header of {length} bytes in a file of {size} bytes")
        text = file.read(length)
    try:
        entries: Any = json.loads(text)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise _damaged(path, "a header that is not a JSON object")
    entries.pop("__metadata__", None)
    infos = {name: _info(path, name, entry, 8 + length) for name, entry in entries.items()}
    for name, info in infos.items():
        if info.end > size:
            raise _damaged(path, f"tensor {name!r} ending at byte {info.end} of {size}")
    return infos


def _info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        shape = tuple(entry["shape"])
        start, end = entry["data_offsets"]
        dtype = entry["dtype"]
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"no shape, dtype or offsets for tensor {name!r}") from None
    counts = (*shape, start, end)
    if any(not isinstance(count, int) or isinstance(count, bool) or count < 0 for count in counts) or end < start:
        raise _damaged(path, f"shape {list(shape)} and offsets {start}, {end} for tensor {name!r}")
    elements = 1
    for count in shape:
        elements *= count
    if dtype in _DTYPE_BYTES and elements * _DTYPE_BYTES[dtype] != end - start:
        raise _damaged(path, f"{end - start} bytes for {dtype} {list(shape)} in tensor {name!r}")
    return TensorInfo(str(dtype), shape, path, data_start + start, data_start + end)


def _damaged(path: Path, what: str) -> UsageError:
    return UsageError(f"{path}: this is not a whole safetensors file, got {what}", "copy or download it again")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a base: those of its index, else `model.safetensors`; empty where there are none.

    Raises:
        UsageError: the index is damaged or names a file that is missing or outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UsageError(f"{index}: this is not an index of weight files", "copy or download it again") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                raise UsageError(f"{index}: it names weights that are not there, got {name!r}", "download them again")
        return [folder / name for name in names]
    return [path for path in (folder / "model.safetensors",) if path.is_file()]


def tensor_infos(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a base, over all of its shards; empty where no weights are there."""
    infos: dict[str, TensorInfo] = {}
    for path in weight_files(folder):
        infos.update(read_header(path))
    return infos


def fingerprint(folder: Path) -> str:
    """SHA-256 over the tensors in the order of their names: name, dtype, shape, first and last 4 KiB of data.

    It does not depend on how the tensors are spread over files, and reads a 7B base in well under a second.

    Raises:
        UsageError: there are no safetensors weights, or they are damaged.
    """
    infos = tensor_infos(folder)
    if not infos:
        raise UsageError(f"{folder}: no safetensors weights there", "convert the base to safetensors first")
    digest = hashlib.sha256()
    files = {info.file: info.file.open("rb") for info in infos.values()}
    try:
        for name, info in sorted(infos.items()):
            digest.update(json.dumps([name, info.dtype, info.shape]).encode())
            file, edge = files[info.file], min(_EDGE, info.end - info.start)
            for position in (info.start, info.end - edge):
                file.seek(position)
                digest.update(file.read(edge))
    finally:
        for file in files.values():
            file.close()
    return digest.hexdigest()

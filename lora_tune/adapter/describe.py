"""What an adapter does to its base, in numbers: the size of each module's update. No torch.

The Frobenius norm of scale · B·A follows from two small matrices: ‖BA‖² = trace(BᵀB · AAᵀ), rank × rank each, so that
the update itself (out, in) is never made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tune.adapter.expected_keys import PREFIX
from lora_tune.adapter.lora_config import LoraSettings
from lora_tune.adapter.tensor_file import ITEM_BYTES, TensorEntry

if TYPE_CHECKING:
    import numpy

_PAIR = re.compile(re.escape(PREFIX) + r"(?P<module>[A-Za-z0-9_.]+)\.lora_(?:A\.weight|embedding_A)")
INERT = 1e-6
"""An update whose root mean square per weight is below this changes nothing that a 16-bit base could hold."""


@dataclass(frozen=True, slots=True)
class Update:
    """The update of one module: rank, the factor on B·A, and the Frobenius norm of the product."""

    module: str
    rank: int
    scale: float
    norm: float
    weights: int
    """Weights of the base's matrix."""

    @property
    def layer(self) -> int | None:
        """The decoder layer that the module belongs to; None for embeddings and head."""
        number = re.search(r"\.(\d+)\.", f".{self.module}.")
        return int(number[1]) if number else None

    @property
    def rms(self) -> float:
        """Root mean square of the update per weight."""
        return self.norm / max(self.weights, 1) ** 0.5


def updates(path: Path, header: Mapping[str, TensorEntry], settings: LoraSettings) -> list[Update]:
    """The update of every module of a checked `adapter_model.safetensors`, in the order of the file."""
    return list(_updates(path, header, settings))


def _updates(path: Path, header: Mapping[str, TensorEntry], settings: LoraSettings) -> Iterator[Update]:
    for key, first in header.items():
        match = _PAIR.fullmatch(key)
        if match is None:
            continue
        other = key.replace(".lora_A.", ".lora_B.").replace(".lora_embedding_A", ".lora_embedding_B")
        module, a_RI, b_OR = match["module"], read_matrix(path, first), read_matrix(path, header[other])
        scale = settings.scale_of(module)
        square = float(((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum())
        norm = scale * max(square, 0.0) ** 0.5
        yield Update(module, a_RI.shape[0], scale, norm, weights=b_OR.shape[0] * a_RI.shape[1])


def read_matrix(path: Path, entry: TensorEntry) -> numpy.ndarray:
    """A tensor of a checked file as float64 in its own shape, such as (rank, in), whatever it is stored in."""
    import numpy

    with path.open("rb") as stream:
        stream.seek(entry.start)
        data = stream.read(entry.stop - entry.start)
    if entry.dtype == "BF16":  # the upper half of a float32
        values = (numpy.frombuffer(data, dtype="<u2").astype("<u4") << 16).view("<f4")
    else:
        values = numpy.frombuffer(data, dtype=f"<f{ITEM_BYTES[entry.dtype]}")
    return values.reshape(entry.shape).astype(numpy.float64)


def by_layer(found: list[Update]) -> list[tuple[str, int, float, float]]:
    """One line a layer: (its name, modules, norm of all its updates, their root mean square per weight)."""
    groups: dict[int | None, list[Update]] = {}
    for update in found:
        groups.setdefault(update.layer, []).append(update)
    lines = []
    for layer, members in sorted(groups.items(), key=lambda item: (item[0] is None, item[0] or 0)):
        norm = sum(update.norm**2 for update in members) ** 0.5
        weights = sum(update.weights for update in members)
        name = ", ".join(sorted({update.module for update in members})) if layer is None else f"layer {layer}"
        lines.append((name, len(members), norm, norm / max(weights, 1) ** 0.5))
    return lines


def is_inert(found: list[Update]) -> bool:
    """Whether no module's update is large enough to change what the base says."""
    return all(update.rms < INERT for update in found)

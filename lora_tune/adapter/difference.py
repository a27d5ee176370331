"""How two adapters differ: recipe, data, template, scores, and the distance between what they add to the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tune.adapter.checks import Subject
from lora_tune.adapter.describe import read_matrix
from lora_tune.adapter.expected_keys import PREFIX
from lora_tune.adapter.folder import WEIGHTS
from lora_tune.adapter.regular_file import read_capped
from lora_tune.errors import RecipeError
from lora_tune.yaml_tree import parse

if TYPE_CHECKING:
    import numpy

_RECIPE = "recipe.yaml"
_RECIPE_BYTES = 1 << 20
_FIELDS = ("base", "chat", "seed", "libraries", "training", "scores", "data")
_VOLATILE = ("training.seconds", "training.peak_gib")  # differ between two runs of the same recipe


@dataclass(frozen=True, slots=True)
class Distance:
    """Two updates of the same base, over all modules: their norms, ‖ΔA − ΔB‖ and the cosine between them."""

    norm_a: float
    norm_b: float
    distance: float
    cosine: float
    shared: int
    """Modules that both change."""
    only_a: int
    only_b: int
    other_shapes: int
    """Shared modules whose updates have different shapes, and so no distance: the adapters are not of one base."""


def changed(a: Subject, b: Subject) -> list[tuple[str, Any, Any]]:
    """(field, of A, of B) for every fact of recipe, manifest and configuration that is not the same."""
    left, right = _facts(a), _facts(b)
    return [(key, left.get(key), right.get(key)) for key in {**left, **right} if left.get(key) != right.get(key)]


def distance(a: Subject, b: Subject) -> Distance:
    """How far apart the updates of two checked folders are, without making any update as a whole.

    ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ): matrices of rank × rank only. A module that one of them lacks is zero there.
    """
    left, right = _pairs(a), _pairs(b)
    shared = sorted(left.keys() & right.keys())
    square_a = sum(_product(a, key, a, key) for key in left)
    square_b = sum(_product(b, key, b, key) for key in right)
    inner = sum(_product(a, key, b, key) for key in shared)
    norm_a, norm_b = square_a**0.5, square_b**0.5
    apart = max(square_a + square_b - 2 * inner, 0.0) ** 0.5
    cosine = inner / (norm_a * norm_b) if norm_a and norm_b else 0.0
    only_a, only_b = len(left) - len(shared), len(right) - len(shared)
    unlike = sum(_shape(a, left[key]) != _shape(b, right[key]) for key in shared)
    return Distance(norm_a, norm_b, apart, cosine, len(shared), only_a, only_b, unlike)


def _facts(subject: Subject) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    path = subject.folder / _RECIPE
    if path.exists():
        try:
            tree, _ = parse(read_capped(path, max_bytes=_RECIPE_BYTES).decode("utf-8", "replace"), origin=str(path))
        except RecipeError:
            tree = None
        facts |= _flat(tree.plain() if tree else {}, "recipe.")
    if subject.manifest is not None:
        facts |= _flat({key: subject.manifest.model_dump(mode="json")[key] for key in _FIELDS}, "")
    facts |= _flat(subject.content, "adapter_config.")
    return {key: value for key, value in facts.items() if key not in _VOLATILE and not key.startswith("recipe.output")}


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    """{path with dots: scalar}; lists of scalars stay as they are."""
    if isinstance(value, Mapping):
        return {key: leaf for name, item in value.items() for key, leaf in _flat(item, f"{prefix}{name}.").items()}
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return {k: leaf for number, item in enumerate(value) for k, leaf in _flat(item, f"{prefix}{number}.").items()}
    return {prefix.rstrip("."): value}


def _pairs(subject: Subject) -> dict[str, tuple[str, str]]:
    """{module: (key of A, key of B)}."""
    found = {}
    for key in subject.header:
        for a_end, b_end in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
            if key.endswith(a_end):
                found[key.removeprefix(PREFIX).removesuffix(a_end)] = (key, key.removesuffix(a_end) + b_end)
    return found


def _product(one: Subject, key_one: str, two: Subject, key_two: str) -> float:
    """The inner product of the updates of one module in two folders, scales included."""
    a_1, b_1 = _matrices(one, key_one)
    a_2, b_2 = _matrices(two, key_two)
    if a_1.shape[1] != a_2.shape[1] or b_1.shape[0] != b_2.shape[0]:
        return 0.0  # not of one base: counted in `other_shapes`
    return float(((b_1.T @ b_2) * (a_1 @ a_2.T)).sum())


def _shape(subject: Subject, pair: tuple[str, str]) -> tuple[int, int]:
    """The shape of a module's update: (out, in), or (rows, width) for embeddings."""
    a_key, b_key = pair
    return subject.header[b_key].shape[0], subject.header[a_key].shape[1]


def _matrices(subject: Subject, module: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    key_a, key_b = _pairs(subject)[module]
    path: Path = subject.folder / WEIGHTS
    scale = subject.known_settings().scale_of(module)
    return read_matrix(path, subject.header[key_a]), scale * read_matrix(path, subject.header[key_b])

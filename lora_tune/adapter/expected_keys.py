"""Which tensors, of which shapes, an adapter must have: implied by its configuration and the base's tensors. No torch.

PEFT's names in `adapter_model.safetensors`, all under `base_model.model.`: for a linear layer `….lora_A.weight`
(rank, in), `….lora_B.weight` (out, rank), with DoRA `….lora_magnitude_vector` (out,); for an embedding
`….lora_embedding_A` (rank, rows), `….lora_embedding_B` (width, rank); for a module trained in full its own parameters;
for trained tokens `….token_adapter.trainable_tokens_delta` (tokens, width).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_tune.adapter.lora_config import LoraSettings, names_module

PREFIX = "base_model.model."
Shapes = Mapping[str, tuple[int, ...]]
"""{parameter of the base: shape}, such as `model.layers.0.self_attn.q_proj.weight`: (out, in)."""
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
_NOT_LINEAR = (*_EMBEDDINGS, "wpe", "embed_positions", "position_embeddings", "token_type_embeddings")
_OUTPUTS = ("lm_head", "embed_out", "output", "score")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_LAYER = re.compile(r"\.(\d+)\.")


def module_shapes(tensors: Shapes, *, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The parameters by the names that they have in the loaded model.

    `tensors` are those of the files; `config` is the base's `config.json`. A tied head gets the shape of the
    embeddings, and a missing `model.` or `transformer.` in front of old checkpoints' names is put there.
    """
    shapes = {name: tuple(shape) for name, shape in tensors.items()}
    if not any(name.startswith(("model.", "transformer.", "gpt_neox.", "language_model.")) for name in shapes):
        body = "transformer." if "n_embd" in config or any(name.startswith("h.") for name in shapes) else "model."
        shapes = {name if name.startswith(_OUTPUTS) else body + name: shape for name, shape in shapes.items()}
    if "lm_head.weight" not in shapes:
        tied = next(
            (shape for name, shape in shapes.items() if _last(name.removesuffix(".weight")) in _EMBEDDINGS), None
        )
        if tied and config.get("tie_word_embeddings", True):
            shapes["lm_head.weight"] = tied
    return shapes


def expected_keys(settings: LoraSettings, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """{key of adapter_model.safetensors: shape} for every tensor that must be there."""
    expected: dict[str, tuple[int, ...]] = {}
    saved = tuple(name for name in _modules(shapes) if _is_saved(settings, name))
    for module, shape in _modules(shapes).items():
        if module not in saved and is_target(settings, module):
            expected |= _update_keys(settings, module, shape)
    for name, shape in shapes.items():
        if any(name.startswith(module + ".") for module in saved):
            expected[PREFIX + name] = shape
    for name, count in settings.trained_tokens.items():
        for module, shape in _modules(shapes).items():
            if names_module(name, module) if name else _last(module) in _EMBEDDINGS:
                expected[f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"] = (count, shape[1])
    return expected


def unmatched_names(settings: LoraSettings, shapes: Shapes) -> list[tuple[str, str]]:
    """(field, name) of target modules and modules to save that name nothing in the base."""
    modules = {name.rpartition(".")[0] for name in shapes}
    modules |= {parent for module in modules for parent in _parents(module)}
    targets = () if isinstance(settings.targets, str) else settings.targets
    named = [("target_modules", name) for name in targets] + [
        ("modules_to_save", name) for name in settings.modules_to_save
    ]
    return [(field, name) for field, name in named if not any(names_module(name, module) for module in modules)]


def optional_modules(expected: Shapes) -> frozenset[str]:
    """Keys of experts: transformers holds them as one fused tensor in memory, where no adapter sits on a single one."""
    return frozenset(key for key in expected if _EXPERT.search(key))


def expert_keys(header: Iterable[str]) -> list[str]:
    """Tensors of an adapter that sit on single experts (Mixtral, DeepSeek, Qwen-MoE), which nothing here can load."""
    return sorted(key for key in header if _EXPERT.search(key))


def is_target(settings: LoraSettings, module: str) -> bool:
    """Whether PEFT puts an update on the module with this full name."""
    if any(names_module(name, module) for name in settings.excluded):
        return False
    if settings.targets == "all-linear":
        named = _last(module) not in (*_NOT_LINEAR, *_OUTPUTS)
    else:
        named = any(names_module(name, module) for name in settings.targets)
    if not named or settings.layers is None:
        return named
    if settings.layers_pattern:
        found = next(
            (m for p in settings.layers_pattern if (m := re.search(rf"\.{re.escape(p)}\.(\d+)\.", "." + module))), None
        )
    else:
        found = _LAYER.search(module)
    return found is not None and int(found[1]) in settings.layers


def _update_keys(settings: LoraSettings, module: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    rank, key = settings.rank_of(module), PREFIX + module
    if _last(module) in _EMBEDDINGS:
        keys = {f"{key}.lora_embedding_A": (rank, shape[0]), f"{key}.lora_embedding_B": (shape[1], rank)}
        width = shape[1]
    else:
        width, features = (shape[1], shape[0]) if settings.transposed else (shape[0], shape[1])
        keys = {f"{key}.lora_A.weight": (rank, features), f"{key}.lora_B.weight": (width, rank)}
    return keys | ({f"{key}.lora_magnitude_vector": (width,)} if settings.dora else {})


def _modules(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """{module: shape of its matrix} for modules with a two-dimensional `weight`."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }


def _is_saved(settings: LoraSettings, module: str) -> bool:
    return any(names_module(name, part) for name in settings.modules_to_save for part in (module, *_parents(module)))


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _last(module: str) -> str:
    return module.rpartition(".")[2]

"""What llama.cpp computes of which base: the architectures whose files it reads as the model was trained, and how.

Each line was executed in real llama.cpp against transformers on a random base of that architecture
(`tests/test_llama_cpp.py`). Everything else is refused by name: a file that loads and computes something else is worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_tune.errors import CheckFailed, Problem
from lora_tune.model.gguf_file import Value, f32, u32

Rearrange = Callable[[np.ndarray], np.ndarray]
_MERGE_AWAY = "serve it with another engine, such as vLLM"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One kind of base: llama.cpp's name, and where its file differs from the weights in transformers' names.

    `interleaved`: queries and keys are rotated in pairs of neighbours, not of halves, so their rows are rearranged.
    `norms_from_one`: transformers stores what a norm's weight differs from 1.
    """

    name: str
    activation: tuple[str, ...] = ("silu",)
    interleaved: bool = False
    norms_from_one: bool = False
    window: str = "shortens"
    """A sliding window: `shortens` the context that is declared (llama.cpp has none here), or is `written`."""


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "phi3": Architecture("phi3"),
    "gemma": Architecture("gemma", activation=("gelu_pytorch_tanh", "gelu"), norms_from_one=True),
    "gemma2": Architecture("gemma2", activation=("gelu_pytorch_tanh",), norms_from_one=True, window="written"),
    "gemma3_text": Architecture("gemma3", activation=("gelu_pytorch_tanh",), norms_from_one=True, window="written"),
}
"""{model_type of config.json: what llama.cpp makes of it}."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a base's configuration that a file and its rearrangements need."""

    architecture: Architecture
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    config: Any


def shape_of(config: Any) -> Shape:
    """The shape of a base by its transformers configuration.

    Raises: CheckFailed naming what llama.cpp would compute otherwise.
    """
    kind = str(config.model_type)
    architecture = ARCHITECTURES.get(kind)
    if architecture is None:
        raise _refused(f"a base of type {kind!r} (llama.cpp's file is proven for {', '.join(ARCHITECTURES)})")
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
    if activation not in architecture.activation:
        raise _refused(f"the activation {activation!r} in a base of type {kind!r}")
    if getattr(config, "mlp_bias", False):
        raise _refused("biases in the MLP")
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    key_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    if architecture.window == "written" and float(config.query_pre_attn_scalar) != head_dim:
        raise _refused(f"query_pre_attn_scalar {config.query_pre_attn_scalar} with heads of {head_dim}")
    _check_windows(config)
    if float(_rope(config).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", 1.0) or 1.0) != 1.0:
        raise _refused("heads that are rotated in part")
    return Shape(architecture, int(config.num_hidden_layers), heads, key_heads, head_dim, config)


def metadata_of(shape: Shape) -> dict[str, Value]:
    """The keys of the architecture, `llama.block_count` and so on. Raises: CheckFailed for a rotation it cannot say."""
    config, name = shape.config, shape.architecture.name
    rope = _rope(config)
    context = int(config.max_position_embeddings)
    window = _window(config)
    if window and shape.architecture.window == "shortens":
        context = min(context, window)
    keys: dict[str, Value] = {
        "context_length": u32(context),
        "embedding_length": u32(config.hidden_size),
        "block_count": u32(shape.layers),
        "feed_forward_length": u32(config.intermediate_size),
        "attention.head_count": u32(shape.heads),
        "attention.head_count_kv": u32(shape.key_heads),
        "attention.key_length": u32(shape.head_dim),
        "attention.value_length": u32(shape.head_dim),
        "attention.layer_norm_rms_epsilon": f32(config.rms_norm_eps),
        "rope.dimension_count": u32(shape.head_dim),
        "rope.freq_base": f32(float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)),
        "vocab_size": u32(config.vocab_size),
    }
    if rope.get("rope_type", "default") == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": f32(rope["factor"])}
    if shape.architecture.window == "written":
        keys["attention.sliding_window"] = u32(window or context)
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        keys |= {cap: f32(getattr(config, cap)) for cap in caps if getattr(config, cap, None)}
    if name == "phi3":
        keys["rope.scaling.original_context_length"] = u32(context)
    return {f"{name}.{key}": value for key, value in keys.items()}


def rope_factors(shape: Shape) -> np.ndarray | None:
    """What each rotation's frequency is divided by (head_dim / 2,), for Llama 3's long context; None without.

    Source: the formula of transformers' `modeling_rope_utils` (`llama3`), written out per frequency.

    Raises: CheckFailed for a scaling that llama.cpp does not compute like transformers.
    """
    rope = _rope(shape.config)
    kind = rope.get("rope_type", "default")
    if kind in ("default", "linear"):
        return None
    if kind != "llama3" or shape.architecture.name != "llama":
        raise _refused(f"the rotary scaling {kind!r} in a base of type {shape.config.model_type!r}")
    theta, factor = float(rope["rope_theta"]), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    trained = float(rope["original_max_position_embeddings"])
    waves = 2 * np.pi * theta ** (np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim)
    smooth = (trained / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(waves < trained / high, 1.0, np.where(waves > trained / low, factor, between))
    return factors.astype(np.float32)


def rearranged(shape: Shape, parameter: str) -> Rearrange | None:
    """What is done to a parameter (by its name in transformers) on the way into the file; None where nothing is."""
    if shape.architecture.norms_from_one and parameter.endswith("norm.weight"):
        return lambda values: values + np.float32(1.0)
    return row_order(shape, parameter)


def row_order(shape: Shape, parameter: str) -> Rearrange | None:
    """How the rows of a parameter change their places, None where they keep them: of an adapter's B it is the same."""
    if not shape.architecture.interleaved:
        return None
    heads = {"q_proj": shape.heads, "k_proj": shape.key_heads}.get(parameter.rpartition(".")[0].rpartition(".")[2])
    if heads is None:
        return None
    count = heads

    def interleave(values: np.ndarray) -> np.ndarray:
        """Rows (heads, 2, head_dim / 2) become (heads, head_dim / 2, 2)."""
        halves = values.reshape(count, 2, -1, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)

    return interleave


def _rope(config: Any) -> Mapping[str, Any]:
    """The rotation's numbers; of a base with two kinds of layers those of full attention."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return dict(found.get("full_attention", found))


def _check_windows(config: Any) -> None:
    """llama.cpp has it built in which layers of Gemma see a window, and at which base they rotate."""
    periods = {"gemma2": 2, "gemma3_text": 6}
    period = periods.get(str(config.model_type))
    if period is None:
        return
    kinds = [
        "full_attention" if (layer + 1) % period == 0 else "sliding_attention"
        for layer in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != kinds:
        raise _refused(f"windows in other layers than all but every {period}th")
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if local is not None and (local.get("rope_type") != "default" or float(local["rope_theta"]) != 10000.0):
        raise _refused("a rotation of the window's layers at another base than 10,000")
    if period == 6 and _rope(config).get("rope_type", "default") != "default":
        raise _refused(f"the rotary scaling {_rope(config)['rope_type']!r} in a base of type {config.model_type!r}")


def _window(config: Any) -> int | None:
    window = getattr(config, "sliding_window", None)
    return int(window) if window and getattr(config, "use_sliding_window", True) else None


def _refused(what: str) -> CheckFailed:
    return CheckFailed(Problem(f"not supported in a GGUF file: {what}", _MERGE_AWAY))

"""The shape of a base model, read from its `config.json` without loading anything.

Sizes are counted as transformers 5 builds the model: experts of a mixture are two 3-D tensors, not linear layers, so
that bitsandbytes does not quantize them and `all-linear` does not reach them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_tune.errors import Problem, UsageError

_NAMES = {  # ours: the names it has in config.json
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "vocabulary": ("vocab_size",),
    "intermediate": ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "ffn_config.ffn_hidden_size"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "positions": ("max_position_embeddings", "n_positions"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
}
_LARGEST = 10**8  # no size in a config.json is larger than this
_MOST_LAYERS, _MOST_PARAMETERS = 10_000, 1e14
_TIED_BY_DEFAULT = ("gemma", "gpt2", "falcon", "cohere", "opt", "gpt_bigcode", "bloom")
_FUSED = {  # model types with other layers than q, k, v, o, gate, up, down
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc", "c_proj"),
    "gpt_bigcode": ("c_attn", "c_proj", "c_fc", "c_proj"),
    "falcon": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
}
_LLAMA_LIKE = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "gemma2", "gemma3",
    "gemma3_text", "gpt_oss", "olmo", "olmo2", "granite", "smollm3", "cohere", "cohere2", "stablelm", "phi",
    "deepseek_v3", "glm4", "glm4_moe", "glm4_moe_lite", "exaone4", "qwen3_vl_text", "starcoder2",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Linear:
    """`count` linear layers of one name: weight (outputs, inputs)."""

    name: str
    inputs: int
    outputs: int
    count: int

    @property
    def parameters(self) -> int:
        """Weights of all of them, without biases."""
        return self.inputs * self.outputs * self.count


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a causal language model. `query` and `key_value` are heads times head size.

    `linears` are its linear layers but for the head, `expert_parameters` those of the routed experts,
    `active_intermediate` the feed-forward width that one token passes, `other_parameters` norms, biases and
    positions. `known` says whether the architecture is in our table; others are counted as a Llama of these sizes.
    Of a mixture, `routed` is the number of experts that a token passes and `shared_intermediate` the width of those
    that every token does. `sliding_window` is set where any layer has one.
    """

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    query: int
    key_value: int
    vocabulary: int
    positions: int
    tied: bool
    linears: tuple[Linear, ...]
    expert_parameters: int
    active_intermediate: int
    other_parameters: int
    known: bool
    routed: int = 0
    shared_intermediate: int = 0
    sliding_window: int | None = None

    @property
    def embedding_parameters(self) -> int:
        """Token embeddings and output head; one matrix where they are tied."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers."""
        return sum(linear.parameters for linear in self.linears)

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return self.linear_parameters + self.expert_parameters + self.embedding_parameters + self.other_parameters

    @property
    def largest_linear(self) -> int:
        """Weights of the largest single linear layer."""
        return max(linear.inputs * linear.outputs for linear in self.linears)


def read_shape(config: Mapping[str, Any]) -> Shape:
    """The shape that a `config.json` describes; the text part of a model that also reads pictures.

    Raises UsageError where a size is missing or impossible.
    """
    nested = next((config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), Mapping)), None)
    text = {**nested, "tie_word_embeddings": config.get("tie_word_embeddings")} if nested else dict(config)
    model_type = str(text.get("model_type") or config.get("model_type") or "unknown")
    hidden, layers, heads, vocabulary = (_size(text, name) for name in ("hidden", "layers", "heads", "vocabulary"))
    intermediate = _size(text, "intermediate", 4 * hidden)
    single = bool(text.get("multi_query")) and not text.get("new_decoder_architecture")
    kv_heads = 1 if single else _size(text, "kv_heads", heads)
    head = _count(text, "head_dim", 0) or max(1, hidden // heads)
    experts = _size(text, "experts", 0)
    attention, query, key_value = _attention(text, model_type, hidden=hidden, heads=heads, kv_heads=kv_heads, head=head)
    dense, sparse = _layers_by_kind(text, layers) if experts else (layers, 0)
    expert_size = _count(text, "moe_intermediate_size", intermediate)
    shared = _count(text, "n_shared_experts", 0) * expert_size or _count(text, "shared_expert_intermediate_size", 0)
    active = min(experts, _count(text, "num_experts_per_tok", _count(text, "experts_per_token", 1)))
    linears = [Linear(name, inputs, outputs, layers) for name, inputs, outputs in attention]
    linears += _mlp(model_type, hidden, intermediate, dense)
    if sparse:
        linears += _mlp(model_type, hidden, shared, sparse) if shared else []
    tied = text.get("tie_word_embeddings")
    shape = Shape(
        model_type=model_type,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        query=query,
        key_value=key_value,
        vocabulary=vocabulary,
        positions=_size(text, "positions", 0),
        tied=model_type.startswith(_TIED_BY_DEFAULT) if tied is None else bool(tied),
        linears=tuple(linears),
        expert_parameters=sparse * experts * (3 * hidden * expert_size + hidden),
        active_intermediate=active * expert_size + shared if sparse else intermediate,
        other_parameters=_other(text, model_type, layers=layers, hidden=hidden, query=query, key_value=key_value),
        known=model_type in _LLAMA_LIKE or model_type in _FUSED,
        routed=active if sparse else 0,
        shared_intermediate=shared if sparse else 0,
        sliding_window=_window(text),
    )
    return _check_possible(shape)


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether the architecture stands in our table; others are counted as a Llama of their sizes."""
    nested = [config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), Mapping)]
    names = [part.get("model_type") for part in (*nested, config)]
    model_type = next((name for name in names if name), "unknown")
    return model_type in _LLAMA_LIKE or model_type in _FUSED


def _check_possible(shape: Shape) -> Shape:
    """The shape, unless no model can have it."""
    problem = None
    if shape.layers > _MOST_LAYERS:
        problem = f"no model has {shape.layers} layers"
    elif shape.parameters > _MOST_PARAMETERS:
        problem = f"no model has {shape.parameters:.1e} parameters"
    elif shape.key_value > shape.query or shape.query % shape.key_value:
        problem = f"{shape.key_value} units of keys cannot be shared by {shape.query} units of queries"
    if problem:
        raise UsageError(Problem(f"config.json of the base: {problem}", "check the sizes in it", key="base.name"))
    return shape


def _window(text: Mapping[str, Any]) -> int | None:
    """Tokens that layers with a sliding window see; None where no layer has one."""
    window = text.get("sliding_window")
    used = text.get("use_sliding_window", True) is not False
    return window if isinstance(window, int) and not isinstance(window, bool) and window > 0 and used else None


def _attention(
    text: Mapping[str, Any], model_type: str, *, hidden: int, heads: int, kv_heads: int, head: int
) -> tuple[list[tuple[str, int, int]], int, int]:
    """The linear layers of one attention block, and the widths of its queries and of its keys."""
    if "kv_lora_rank" in text:  # multi-head latent attention (DeepSeek)
        plain, rotary, value = (_count(text, key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        latent, query_latent = _count(text, "kv_lora_rank"), _count(text, "q_lora_rank", 0)
        query = heads * (plain + rotary)
        queries = [("q_proj", hidden, query)]
        if query_latent:
            queries = [("q_a_proj", hidden, query_latent), ("q_b_proj", query_latent, query)]
        keys = [("kv_a_proj_with_mqa", hidden, latent + rotary), ("kv_b_proj", latent, heads * (plain + value))]
        return [*queries, *keys, ("o_proj", heads * value, hidden)], query, query
    query, key_value = heads * head, kv_heads * head
    if model_type in _FUSED:
        joined, out, _, _ = _FUSED[model_type]
        return [(joined, hidden, query + 2 * key_value), (out, query, hidden)], query, key_value
    separate = [("q_proj", hidden, query), ("k_proj", hidden, key_value), ("v_proj", hidden, key_value)]
    return [*separate, ("o_proj", query, hidden)], query, key_value


def _mlp(model_type: str, hidden: int, intermediate: int, count: int) -> list[Linear]:
    """The linear layers of `count` feed-forward blocks."""
    if count < 1:
        return []
    if model_type in _FUSED:
        _, _, up, down = _FUSED[model_type]
        width = 2 * intermediate if model_type == "phi3" else intermediate
        return [Linear(up, hidden, width, count), Linear(down, intermediate, hidden, count)]
    if model_type in ("phi", "starcoder2"):
        first, second = ("fc1", "fc2") if model_type == "phi" else ("c_fc", "c_proj")
        return [Linear(first, hidden, intermediate, count), Linear(second, intermediate, hidden, count)]
    gated = [Linear(name, hidden, intermediate, count) for name in ("gate_proj", "up_proj")]
    return [*gated, Linear("down_proj", intermediate, hidden, count)]


def _layers_by_kind(text: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """How many layers of a mixture are dense, and how many have experts."""
    dense = _count(text, "first_k_dense_replace", 0)
    if isinstance(text.get("mlp_only_layers"), list):
        dense += len(text["mlp_only_layers"])
    sparse = max(0, layers - dense) // _count(text, "decoder_sparse_step", 1)
    return layers - sparse, sparse


def _other(text: Mapping[str, Any], model_type: str, *, layers: int, hidden: int, query: int, key_value: int) -> int:
    """Norms, biases and positions: below 1 % of any model, the main families exactly."""
    norms = 4 if model_type in ("gemma2", "gemma3", "gemma3_text") else 2
    block = norms * hidden
    if model_type.startswith("qwen3"):
        block += 2 * _count(text, "head_dim", 128)
    if model_type.startswith("qwen2"):
        block += query + 2 * key_value
    if text.get("attention_bias"):
        block += query + 2 * key_value + hidden
    if model_type == "gpt2":  # biases of norms and of every layer, and learned positions
        return layers * (13 * hidden) + 2 * hidden + _size(text, "positions", 0) * hidden
    return layers * block + hidden


def _size(text: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A size under any of the names that it has in config.json."""
    for key in _NAMES[name]:
        if text.get(key) is not None:
            return _count(text, key)
    if default is None:
        expected = " or ".join(_NAMES[name])
        raise UsageError(Problem(f"config.json of the base has no {expected}", _FIX, key="base.name"))
    return default


def _count(text: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of config.json; 0 and absent numbers only where there is a default."""
    value = text.get(key)
    if value is None and default is not None:
        return default
    least = 1 if default is None else 0
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST:
        reason = f"config.json of the base: {key} must be a whole number from {least} to {_LARGEST}, got {value!r}"
        raise UsageError(Problem(reason, _FIX, key="base.name"))
    return value


_FIX = "take a causal language model in the format of transformers"

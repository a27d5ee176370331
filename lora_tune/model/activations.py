"""What a forward pass keeps for the backward pass, layer by layer.

Counted by saved-tensor hooks on transformers 5.23 with peft 0.21.2, over small models of every family whose sizes
vary: the counts are linear in the sizes, with whole factors (`python benchmarks/saved_activations.py` repeats it). A
Llama of 16 bit keeps 16h + 8I + 4kv bytes a token, with `train.kernels: auto` 12h + 4I + 4kv. nf4, fp4 and int8 bases
keep what unquantized ones do: only the adapter's A reads a layer's input again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lora_tune.model.shape import Linear, Shape
from lora_tune.recipe import Lora

_QUERIES = ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "q_a_proj", "kv_a_proj_with_mqa")
_LATENTS = ("q_a_proj", "kv_a_proj_with_mqa")  # of multi-head latent attention: kept by a norm, and as an input
_LATENT_FACTOR = 1.65  # small models of this kind keep 1.4 to 2.1 times what the factors give; not resolved by size
_UP = ("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "dense_h_to_4h")
_ANCHORED = ("pissa", "olora")  # hold twice the rank
_MLP = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
_PLAIN = ("lora", "rslora", "loftq", "eva")  # trained as A and B alone: what can be fused
Kernels = Literal["off", "auto", "norms"]
"""`train.kernels` as a base allows it; norms: of one in 8 bit norms and rotations are fused, its adapters are not."""


@dataclass(frozen=True, slots=True)
class _Set:
    """Bytes per token that one layer keeps with adapters on all linear layers: factors of sizes, (16 bit, 32 bit).

    Eager attention keeps `scores` bytes for every head and key. `masked`: attention has a mask even for a single
    document. `qkv`: joined where queries, keys and values are slices of one projection.
    `norm` is what a norm keeps per hidden size; None: its input as it is (autocast on a GPU makes float32 of it, which
    is not counted).

    What `train.kernels: auto` saves of that: the float32 copy that an RMSNorm makes of 16 bit, `rms` of them over the
    hidden size and `head_norms` over queries and keys; of a gated MLP (`gated`) the activated gate and the product; of
    a rotation that leaves heads in another order in memory (`turned`) the copy of what attention puts out.
    """

    hidden: tuple[int, int] = (12, 16)
    intermediate: tuple[int, int] = (8, 16)
    query: tuple[int, int] = (4, 8)
    key_value: tuple[int, int] = (4, 8)
    scores: tuple[int, int] = (0, 0)
    masked: Literal["always", "where needed"] = "where needed"
    qkv: Literal["apart", "joined"] = "apart"
    norm: int | None = 4  # bytes per token and hidden size that a norm keeps; None: its input as it is
    rms: int = 2
    head_norms: Literal["yes", "no"] = "no"
    gated: Literal["yes", "no"] = "yes"
    turned: Literal["yes", "no"] = "no"


_LLAMA = _Set()
_EIGHT_NORMED = _Set(query=(8, 12), key_value=(8, 12), head_norms="yes")
_GEMMA3 = _Set(hidden=(20, 24), query=(8, 12), key_value=(8, 12), rms=4, head_norms="yes")
_COHERE = _Set(hidden=(10, 12), norm=8, rms=0)
_GPT2 = _Set(hidden=(8, 16), intermediate=(10, 20), query=(8, 16), key_value=(0, 0), norm=None, rms=0, gated="no")
_SETS = {
    "qwen3": _EIGHT_NORMED, "exaone4": _EIGHT_NORMED, "olmo2": _EIGHT_NORMED, "qwen3_vl_text": _EIGHT_NORMED,
    "qwen3_vl": _EIGHT_NORMED, "gemma3_text": _GEMMA3, "gemma3": _GEMMA3,
    "gemma2": _Set(hidden=(20, 24), query=(8, 16), key_value=(0, 0), scores=(8, 8), rms=4),
    "glm4": _Set(hidden=(20, 24), query=(6, 12), rms=4),
    "phi3": _Set(hidden=(14, 20), query=(6, 12), key_value=(6, 12), qkv="joined", turned="yes"),
    "cohere": _COHERE, "cohere2": _COHERE,
    "stablelm": _Set(hidden=(10, 20), norm=None, rms=0),
    "phi": _Set(hidden=(6, 12), intermediate=(10, 20), norm=None, rms=0, gated="no"),
    "starcoder2": _Set(hidden=(8, 16), intermediate=(4, 8), norm=None, rms=0, gated="no"),
    "gpt_neox": _Set(hidden=(8, 16), intermediate=(4, 8), query=(12, 24), key_value=(0, 0), norm=None, rms=0,
                     gated="no", turned="yes"),
    "falcon": _Set(hidden=(6, 12), intermediate=(4, 8), query=(8, 16), key_value=(0, 0), masked="always",
                   norm=None, rms=0, gated="no"),
    "gpt2": _GPT2, "gpt_bigcode": _GPT2, "qwen3_moe": _EIGHT_NORMED, "glm4_moe": _EIGHT_NORMED,
    "gpt_oss": _Set(query=(8, 16), key_value=(0, 0), scores=(2, 4)),
}  # fmt: skip
_FOLLOWED = ("gemma2", "gemma3", "gemma3_text", "glm4", "olmo2", "exaone4")
_EXPERT = {"gpt_oss": (12, 24)}  # bytes for each unit of an expert's width; 6 and 12 elsewhere


def saved_bytes_per_layer(
    shape: Shape,
    *,
    tokens: int,
    element: int,
    lora: Lora,
    row_length: int | None = None,
    dropout_mask: int | None = None,
    kernels: Kernels = "auto",
) -> int:
    """Bytes that one decoder layer without checkpointing keeps for the backward pass of `tokens` tokens.

    `element` is the bytes of an activation. With `row_length` (tokens per row) attention has a mask: keys and values
    are repeated for grouped queries, and SDPA keeps the mask in the compute dtype. `dropout_mask`: bytes of one element
    of a dropout mask (a CPU keeps it in the dtype of the activation, which is the default; a GPU in 1 byte).
    """
    wide = 0 if element == 2 else 1
    found = _SETS.get(shape.model_type, _LLAMA)
    masked = row_length is not None or found.masked == "always"
    keys = row_length or tokens
    per_token = _hidden(shape, found, wide) * shape.hidden + _feed_forward(shape, found, wide)
    per_token -= _fused(shape, found, element=element, lora=lora, kernels=kernels)
    query, key_value = found.query[wide], found.key_value[wide]
    if masked and shape.key_value != shape.query and key_value:  # keys and values are repeated for every query head
        joined = found.qkv == "joined"
        query, key_value = (4 * element, 0) if joined else (query + 2 * element, key_value - 2 * element)
    per_token += query * shape.query + key_value * shape.key_value
    if found.scores[wide]:
        per_token += found.scores[wide] * shape.heads * keys
    elif masked:
        per_token += element * keys
    per_token += 4 * shape.heads + 8 + (20 + 40 * shape.routed if shape.routed else 0)
    per_token += (6, 8)[wide] * sum(linear.outputs for linear in shape.linears if linear.name in _LATENTS)
    per_token += _adapters(shape, element, lora, element if dropout_mask is None else dropout_mask)
    return round(tokens * per_token * (_LATENT_FACTOR if has_latents(shape) else 1))


def has_latents(shape: Shape) -> bool:
    """Whether attention is multi-head latent attention (DeepSeek), whose kept bytes are known roughly."""
    return any(linear.name in _LATENTS for linear in shape.linears)


def _hidden(shape: Shape, found: _Set, wide: int) -> int:
    """Factor of the hidden size; a layer of experts keeps the routed inputs and outputs, and has no adapter there."""
    if not shape.routed:
        return found.hidden[wide]
    gate = (4, 8)[wide] if shape.model_type == "qwen2_moe" else 0  # of the shared expert
    return (10, 12)[wide] + (2, 4)[wide] * shape.routed + gate


def _feed_forward(shape: Shape, found: _Set, wide: int) -> int:
    if not shape.routed:
        return found.intermediate[wide] * shape.active_intermediate
    routed = shape.active_intermediate - shape.shared_intermediate
    expert = _EXPERT.get(shape.model_type, (6, 12))[wide]
    return expert * routed + found.intermediate[wide] * shape.shared_intermediate


def _fused(shape: Shape, found: _Set, *, element: int, lora: Lora, kernels: Kernels) -> int:
    """Bytes per token that the fused functions do not keep."""
    if kernels == "off":
        return 0
    saved = element * shape.query if found.turned == "yes" else 0
    if element == 2:  # a float32 stream has no second copy
        saved += 2 * found.rms * shape.hidden
        saved += 2 * (shape.query + shape.key_value) if found.head_norms == "yes" else 0
    if fuses_mlp(shape, lora=lora, kernels=kernels):
        saved += 2 * element * (shape.shared_intermediate if shape.routed else shape.active_intermediate)
    return saved


def fuses_mlp(shape: Shape, *, lora: Lora, kernels: Kernels) -> bool:
    """Whether the MLPs are computed by the fused function: gated, plain LoRA on all of their layers."""
    mlp = [linear for linear in shape.linears if linear.name in _MLP]
    plain = kernels == "auto" and lora.method in _PLAIN and not lora.dropout
    gated = _SETS.get(shape.model_type, _LLAMA).gated == "yes"
    return gated and plain and all(is_target(linear, lora) for linear in mlp)


def is_followed(shape: Shape) -> bool:
    """Whether a norm that keeps its input stands behind the MLP."""
    return shape.model_type in _FOLLOWED


def gate_and_up_bytes(shape: Shape, *, element: int) -> int:
    """Bytes a token of what gate and up put out, which a fused MLP keeps."""
    return 2 * element * shape.active_intermediate


def _adapters(shape: Shape, element: int, lora: Lora, mask: int) -> int:
    """Bytes per token by what has an adapter: its rank, its input where nothing else keeps it, dropout, DoRA."""
    targets = [linear for linear in shape.linears if is_target(linear, lora)]
    per_token = 0
    for linear in targets:
        share = linear.count / shape.layers
        rank = rank_of(linear, lora) * (2 if lora.method in _ANCHORED else 1)
        per_token += round(share * element * rank)
        if lora.dropout:
            per_token += round(share * (element + mask) * linear.inputs)
        if lora.method == "dora":
            per_token += round(share * 2 * element * linear.outputs)
    per_token -= _not_kept(shape, targets, element, lora)
    return per_token


def _not_kept(shape: Shape, targets: Iterable[Linear], element: int, lora: Lora) -> int:
    """Inputs that no adapter reads, or reads after dropout alone."""
    names = {linear.name for linear in targets} if not lora.dropout else set()
    saved = 0
    if not names & set(_QUERIES):
        saved += element * shape.hidden
    if not shape.routed:
        saved += 0 if names & set(_UP) else element * shape.hidden
        down = [linear for linear in shape.linears if linear.inputs == shape.intermediate != shape.hidden]
        saved += 0 if names & {linear.name for linear in down} else element * shape.active_intermediate
    return saved


def is_target(linear: Linear, lora: Lora) -> bool:
    """Whether the `lora` section puts an adapter on layers of this name."""
    return lora.targets == "all-linear" or any(_ends(name, linear.name) for name in lora.targets)


def rank_of(linear: Linear, lora: Lora) -> int:
    """The rank of the adapters on layers of this name."""
    return next((rank for name, rank in lora.rank_pattern.items() if _ends(name, linear.name)), lora.rank)


def _ends(name: str, module: str) -> bool:
    """Whether a name of the recipe (`q_proj`, `self_attn.q_proj`) means modules of this name."""
    return name.rsplit(".", 1)[-1] == module


def input_bytes(shape: Shape, *, tokens: int, element: int) -> int:
    """Bytes that a checkpointed layer keeps: its input."""
    return tokens * shape.hidden * element


def kept_after_forward(
    shape: Shape, *, one_set: int, tokens: int, element: int, checkpointed: int, kernels: Kernels = "auto"
) -> int:
    """Bytes kept when the forward pass of all layers has ended; `one_set` as `saved_bytes_per_layer` gives it.

    The first of the layers keeps no input of its norm, since nothing below it is trained; the last norm keeps as much.
    """
    inputs = checkpointed * input_bytes(shape, tokens=tokens, element=element)
    found = _SETS.get(shape.model_type, _LLAMA)
    norm = element if found.norm is None or (found.rms and kernels != "off") else found.norm
    last_norm = norm * tokens * shape.hidden if checkpointed else 0
    return inputs + (shape.layers - checkpointed) * one_set + last_norm

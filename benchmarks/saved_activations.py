"""What one decoder layer keeps for the backward pass, counted by saved-tensor hooks and fitted by least squares:

    python -m benchmarks.saved_activations [MODEL_TYPE ...]

Prints the bytes per token as factors of hidden size h, intermediate size i, query width q, key width k, heads, rank and
1, in bfloat16 (as training runs: autocast, float32 adapters) and float32, with `train.kernels` off and auto.
`lora_tune/model/activations.py` holds them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from lora_tune.model.attention import use_varlen
from lora_tune.model.base import checkpoint_layers
from lora_tune.model.kernels.fuse import fuse
from lora_tune.model.methods import attach, cast_inputs
from lora_tune.model.source import BaseSource
from lora_tune.recipe import Base, Lora

COMMON: dict[str, Any] = {
    "vocab_size": 256, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {  # what a model type needs beside the sizes
    "llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {}, "gemma": {}, "gemma2": {},
    "gemma3_text": {}, "phi3": {}, "olmo": {}, "olmo2": {}, "granite": {}, "smollm3": {}, "cohere": {}, "cohere2": {},
    "stablelm": {}, "phi": {}, "glm4": {}, "exaone4": {}, "starcoder2": {}, "gpt_neox": {}, "falcon": {}, "gpt2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": []},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
SIZES = (  # hidden, intermediate, heads, key-value heads, head size
    (64, 160, 4, 2, 16), (96, 128, 3, 3, 64), (128, 96, 2, 1, 32), (64, 224, 4, 1, 32), (160, 128, 8, 4, 16),
    (96, 288, 6, 2, 16), (128, 192, 4, 4, 32), (192, 96, 2, 2, 32),
)  # fmt: skip
WITHOUT_GROUPS = (  # or without a head size of its own: their factors of q and k stand in that of h
    "gpt2", "gpt_neox", "phi", "falcon", "phi3", "starcoder2", "stablelm", "cohere", "cohere2", "granite", "olmo",
    "smollm3",
)  # fmt: skip
EQUAL_HEADS = (  # where hidden = heads x head size and there are no groups
    (64, 160, 4, 4, 16), (96, 128, 3, 3, 32), (128, 96, 2, 2, 64), (64, 224, 2, 2, 32), (160, 128, 10, 10, 16),
    (96, 288, 6, 6, 16), (128, 192, 8, 8, 16), (192, 96, 2, 2, 96),
)  # fmt: skip


def tiny_config(model_type: str, sizes: Sequence[int], *, layers: int) -> dict[str, Any]:
    """A config of this family with these sizes, as `AutoConfig.for_model` takes it."""
    hidden, intermediate, heads, kv_heads, head = sizes
    config = {"model_type": model_type, **COMMON, **FAMILIES.get(model_type, {})}
    if model_type == "gpt2":
        return config | {"n_embd": hidden, "n_inner": intermediate, "n_head": heads, "n_layer": layers,
                         "n_positions": 512, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}  # fmt: skip
    config |= {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads,
               "num_key_value_heads": kv_heads, "num_hidden_layers": layers, "head_dim": head}  # fmt: skip
    if model_type in ("falcon", "gpt_neox", "phi", "starcoder2", "stablelm", "cohere", "phi3"):
        del config["head_dim"]
    if model_type == "falcon":
        config |= {"ffn_hidden_size": intermediate, "num_kv_heads": kv_heads, "new_decoder_architecture": True,
                   "alibi": False, "bias": False}  # fmt: skip
    if "moe" in model_type:
        config |= {"moe_intermediate_size": intermediate}
    if model_type == "qwen2_moe":
        config |= {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 64}
    return config


def saved_bytes(
    config: Mapping[str, Any],
    *,
    dtype: Literal["bfloat16", "float32"],
    lora: Lora,
    documents: Sequence[int],
    quantize: Literal["nf4", "none"] = "none",
    checkpointed: Literal["all", "none"] | int = "none",
    kernels: Literal["auto", "off"] = "auto",
    attention: Literal["sdpa", "varlen"] = "sdpa",
) -> int:
    """Bytes that the decoder of this config keeps for the backward pass of one row of documents.

    With `varlen` attention is told their lengths (`model/attention.py`). bfloat16 runs as training does: autocast over
    float32 adapters. Weights, and autocast's copies of adapter weights, do not count; of layers that are checkpointed
    their inputs do.
    """
    torch.manual_seed(0)
    settings = AutoConfig.for_model(**dict(config))
    model = AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, dtype))
    if quantize == "nf4":
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        wanted = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                    bnb_4bit_compute_dtype=getattr(torch, dtype))  # fmt: skip
        weights_ = model.state_dict()
        model = replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=wanted)
        _quantize(model, weights_)
    source = BaseSource(name="x", kind="local", folder=Path(), revision=None, config=settings.to_dict())
    base = Base(name="x", quantize="none", compute_dtype=dtype)
    adapted: Any = attach(model.requires_grad_(False), lora, source=source, base=base, seed=0).train()
    if attention == "varlen" and (why := use_varlen(adapted, Base(name="x", attention="varlen"))):
        raise ValueError(why)
    checkpoint_layers(adapted, checkpointed)
    if kernels == "auto":
        fuse(adapted)
    autocast = dtype == "bfloat16"
    if autocast:
        cast_inputs(adapted, to="autocast")
    parameters = {tensor.untyped_storage().data_ptr() for tensor in (*adapted.parameters(), *adapted.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    positions = torch.cat([torch.arange(length) for length in documents])[None]
    ids = torch.randint(3, 200, positions.shape)
    ends_D = torch.tensor([0, *np.cumsum(documents)], dtype=torch.int32)
    longest, told = max(documents), attention == "varlen"
    bounds = {"cu_seq_lens_q": ends_D, "cu_seq_lens_k": ends_D, "max_length_q": longest, "max_length_k": longest}
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        decoder = adapted.get_base_model().base_model
        hidden = decoder(input_ids=ids, position_ids=positions, use_cache=False, **(bounds if told else {}))
    trained = [tuple(p.shape) for p in adapted.parameters() if p.requires_grad]
    trained += [shape[::-1] for shape in trained]
    total = sum(t.untyped_storage().nbytes() for t in kept.values() if tuple(t.shape) not in trained)
    del hidden
    return total


def _quantize(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Put the weights into the 4-bit layers; moving them to a device is what quantizes."""
    import bitsandbytes

    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            stored = weights[f"{name}.weight"]
            stored = stored if stored.shape == (module.out_features, module.in_features) else stored.T.contiguous()
            module.weight = bitsandbytes.nn.Params4bit(stored.clone(), quant_type="nf4")
            if f"{name}.bias" in weights:
                module.bias = torch.nn.Parameter(weights[f"{name}.bias"], requires_grad=False)
            module.to("cpu")


def one_layer(model_type: str, sizes: Sequence[int], *, tokens: int, **job: Any) -> float:
    """Bytes per token that one more layer keeps."""
    more, fewer = (saved_bytes(tiny_config(model_type, sizes, layers=n), documents=[tokens], **job) for n in (4, 2))
    return (more - fewer) / (2 * tokens)


def fit(
    model_type: str, dtype: Literal["bfloat16", "float32"], *, kernels: Literal["auto", "off"]
) -> tuple[list[float], float]:
    """Factors of h, i, q, k, heads, rank, 1, and the largest relative error of the fit."""
    equal = model_type in WITHOUT_GROUPS
    features, found = [], []
    for number, sizes in enumerate(EQUAL_HEADS if equal else SIZES):
        hidden, intermediate, heads, kv_heads, head = sizes
        rank = 3 + 2 * (number % 3)
        features.append([hidden, intermediate, heads * head, kv_heads * head, heads, rank, 1])
        found.append(one_layer(model_type, sizes, tokens=100, dtype=dtype, lora=Lora(rank=rank), kernels=kernels))
    rows, values = np.array(features, dtype=float), np.array(found)
    if equal:
        rows[:, 2] = rows[:, 3] = 0
    factors, *_ = np.linalg.lstsq(rows, values, rcond=None)
    return factors.tolist(), float(np.abs(rows @ factors / values - 1).max())


def main() -> None:
    """Print a line for every model type and dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", metavar="MODEL_TYPE", nargs="*", help=f"such as {', '.join(FAMILIES)}")
    given = parser.parse_args()
    print(f"{'':14} {'':9} {'':4} {'h':>8} {'i':>8} {'q':>8} {'k':>8} {'heads':>8} {'rank':>8} {'1':>8} {'error':>8}")
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    paths: tuple[Literal["off", "auto"], ...] = ("off", "auto")
    for model_type, dtype, kernels in product(given.model_types or FAMILIES, dtypes, paths):
        try:
            factors, error = fit(model_type, dtype, kernels=kernels)
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as problem:
            print(f"{model_type:14} {dtype:9} {kernels:4} {type(problem).__name__}: {str(problem)[:120]}")
            continue
        numbers = " ".join(f"{factor:8.2f}" for factor in factors)
        print(f"{model_type:14} {dtype:9} {kernels:4} {numbers} {error:8.4f}", flush=True)


if __name__ == "__main__":
    main()

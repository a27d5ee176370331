"""The published config.json of models that tables and comparisons speak of, as far as a plan reads it."""

from __future__ import annotations

from typing import Any

_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "vocab_size", "tie_word_embeddings")  # fmt: skip


def _config(model_type: str, *sizes: int) -> dict[str, Any]:
    found: dict[str, Any] = {"model_type": model_type, **dict(zip(_KEYS, sizes, strict=True))}
    return found | {"tie_word_embeddings": bool(found["tie_word_embeddings"]), "max_position_embeddings": 32_768}


# name on the hub: hidden, feed-forward, layers, heads, key-value heads, head size, vocabulary, tied embeddings
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _config("qwen3", 1024, 3072, 28, 16, 8, 128, 151_936, 1),
    "meta-llama/Llama-3.2-1B": _config("llama", 2048, 8192, 16, 32, 8, 64, 128_256, 1),
    "Qwen/Qwen3-1.7B": _config("qwen3", 2048, 6144, 28, 16, 8, 128, 151_936, 1),
    "meta-llama/Llama-3.2-3B": _config("llama", 3072, 8192, 28, 24, 8, 128, 128_256, 1),
    "Qwen/Qwen3-4B": _config("qwen3", 2560, 9728, 36, 32, 8, 128, 151_936, 1),
    "meta-llama/Llama-2-7b": _config("llama", 4096, 11_008, 32, 32, 32, 128, 32_000, 0),
    "mistralai/Mistral-7B-v0.3": _config("mistral", 4096, 14_336, 32, 32, 8, 128, 32_768, 0),
    "Qwen/Qwen2.5-7B": _config("qwen2", 3584, 18_944, 28, 28, 4, 128, 152_064, 0),
    "meta-llama/Llama-3.1-8B": _config("llama", 4096, 14_336, 32, 32, 8, 128, 128_256, 0),
    "Qwen/Qwen3-8B": _config("qwen3", 4096, 12_288, 36, 32, 8, 128, 151_936, 0),
    "meta-llama/Llama-2-13b": _config("llama", 5120, 13_824, 40, 40, 40, 128, 32_000, 0),
    "Qwen/Qwen3-14B": _config("qwen3", 5120, 17_408, 40, 40, 8, 128, 151_936, 0),
    "Qwen/Qwen3-32B": _config("qwen3", 5120, 25_600, 64, 64, 8, 128, 151_936, 0),
    "meta-llama/Llama-3.1-70B": _config("llama", 8192, 28_672, 80, 64, 8, 128, 128_256, 0),
}

"""A tiny random Llama base for tests: two layers, one token for every byte, a ChatML template, half a megabyte."""

from __future__ import annotations

import json
import random
import struct
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")  # ids 0 to 3; the 256 bytes follow
PAD, START, END, DOCUMENT = range(4)
CHATML = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' + (message.content or '') }}"
    "{%- if message.tool_calls -%}{{ message.tool_calls | tojson }}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "dtype": "float32",
    "bos_token_id": DOCUMENT,
    "eos_token_id": END,
    "pad_token_id": PAD,
}


def write_base(
    folder: Path, seed: int = 1, *, chat_template: str | None = CHATML, config: Mapping[str, Any] | None = None
) -> Path:
    """Writes config, tokenizer, template and normally distributed float32 weights (deviation 0.1); returns the folder.

    `config` overrides keys of the Llama configuration above; `chat_template` None leaves the base without a template.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**CONFIG, **(config or {})}
    ids = {key: settings[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    words = {"bos_token": SPECIAL[DOCUMENT], "eos_token": SPECIAL[END], "pad_token": SPECIAL[PAD]}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": settings["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **words,
    }
    for name, content in {
        "config.json": settings,
        "generation_config.json": ids,
        "tokenizer_config.json": tokenizer_config,
        "tokenizer.json": tokenizer(),
    }.items():
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    write_safetensors(folder / "model.safetensors", weights(settings, seed=seed))
    return folder


def tokenizer() -> dict[str, Any]:
    """A byte-level tokenizer.json: four special tokens and one token for each byte, no merges."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + number) for number, byte in enumerate(hidden)}
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *(letters[byte] for byte in range(256))])}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": token, **plain} for number, token in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": step,
        "post_processor": None,
        "decoder": step,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": None, "byte_fallback": False},
    }


def weights(settings: Mapping[str, Any], *, seed: int) -> dict[str, tuple[tuple[int, ...], array[float]]]:
    """Name to (shape, float32 values) of a Llama model; norms are ones."""
    draw = random.Random(seed)
    hidden, inner, vocabulary = settings["hidden_size"], settings["intermediate_size"], settings["vocab_size"]
    narrow = settings["head_dim"] * settings["num_key_value_heads"]
    wide = settings["head_dim"] * settings["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(settings["num_hidden_layers"]):
        for name, shape in {
            "self_attn.q_proj": (wide, hidden),
            "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden),
            "self_attn.o_proj": (hidden, wide),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not settings["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)

    def values(shape: tuple[int, ...]) -> array[float]:
        if len(shape) == 1:
            return array("f", [1.0]) * shape[0]
        return array("f", (draw.gauss(0.0, 0.1) for _ in range(shape[0] * shape[1])))

    return {name: (shape, values(shape)) for name, shape in shapes.items()}


def write_safetensors(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], array[float]]]) -> None:
    """Writes float32 tensors in the safetensors format: header length (8 bytes), header in JSON, values in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, values) in tensors.items():
        end = offset + 4 * len(values)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for _, values in tensors.values():
            stream.write(values.tobytes())

"""Random bases of the architectures that become GGUF files, an adapter on each, and a GGUF file read back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import finished
import numpy as np
import tiny
import torch
from gguf import GGUFReader, quants
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 3,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_theta": 10000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
TIED = {"tie_word_embeddings": True}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, long context": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama, linear": {"model_type": "llama", "rope_parameters": LINEAR},
    "llama, tied": {"model_type": "llama", **TIED},
    "llama, biases": {"model_type": "llama", "attention_bias": True},
    "llama, wide heads": {"model_type": "llama", "head_dim": 32},
    "mistral": {"sliding_window": 128},
    "qwen2": {},
    "qwen2, tied": {"model_type": "qwen2", **TIED},
    "qwen3": {},
    "phi3": {"original_max_position_embeddings": 512},
    "gemma": {**TIED, "hidden_act": "gelu_pytorch_tanh"},
    "gemma, exact gelu": {"model_type": "gemma", **TIED, "hidden_act": "gelu"},
    "gemma2": {**TIED, "query_pre_attn_scalar": 16, "sliding_window": 16},
    "gemma3_text": {**TIED, "query_pre_attn_scalar": 16, "sliding_window": 16, "num_hidden_layers": 7},
}


def config_of(kind: str, **changes: Any) -> Any:
    """The transformers configuration of a small base of this kind."""
    settings = {**SIZES, **KINDS.get(kind, {}), **changes}
    return AutoConfig.for_model(settings.pop("model_type", kind), **settings)


def random_base(folder: Path, kind: str, **changes: Any) -> Path:
    """A random base of this kind with the tiny tokenizer; norms vary, so that none of them can be left out."""
    tiny.write_base(folder)
    config = config_of(kind, **changes)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    center = 0.0 if config.model_type.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(center if "norm" in name else 0.0, 0.1)
    model.save_pretrained(folder)
    return folder


def adapter_on(base: Path, folder: Path, **recipe: Any) -> PeftModel:
    """An rsLoRA adapter (whose scale is not alpha / rank) in `folder`, and the live model."""
    lora = {"method": "rslora", **recipe.pop("lora", {})}
    return finished.write_finished(folder, base, lora=lora, **recipe)


def foreign_adapter(base: Path, folder: Path, targets: list[str]) -> PeftModel:
    """An adapter that PEFT alone has written, on modules that a recipe does not take."""
    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about a name that PEFT reads
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a GGUF file as float32, rows first."""
    reader = GGUFReader(path)
    return {
        tensor.name: quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        for tensor in reader.tensors
    }


def keys_of(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file."""
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}

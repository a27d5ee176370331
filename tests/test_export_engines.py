"""Exported adapters executed in mlx-lm against PEFT, over architectures: `make nightly` installs it, else skipped."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from benchmarks.export_parity import in_mlx, in_transformers, largest
from lora_tune.adapter.compat import MLX_ARCHITECTURES
from lora_tune.adapter.expected_keys import expected_keys, module_shapes
from lora_tune.adapter.folder import CONFIG, WEIGHTS
from lora_tune.adapter.lora_config import read_settings
from lora_tune.cli import main
from lora_tune.model.weights import tensor_infos

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        importlib.util.find_spec("mlx_lm") is None and "LORA_TUNE_ENGINES_REQUIRED" not in os.environ,
        reason="mlx-lm is not installed",
    ),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SMALL: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": tiny.DOCUMENT,
    "eos_token_id": tiny.END,
    "pad_token_id": tiny.PAD,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, head_dim=16)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SMALL, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL)),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "patterns": {"rank_pattern": {"o_proj": 2, "down_proj": 8}, "alpha_pattern": {"o_proj": 11.0}},
    "some layers": {"layers_to_transform": [1], "target_modules": ["o_proj", "down_proj"]},
    "embeddings and head": {"target_modules": ["o_proj", "embed_tokens", "lm_head"]},
}
ROWS = [list(range(4, 60)), [7, 3, 250, 9] * 8]


def _base(place: Path, name: str) -> Path:
    torch.manual_seed(5)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # logits far enough from uniform to tell a difference
    like = tiny.write_base(place / "words")
    model.save_pretrained(place / "base")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(like / file, place / "base" / file)
    return place / "base"


def _adapter(folder: Path, base: Path, changes: dict[str, Any]) -> Path:
    """A stranger's folder with normally distributed matrices in the very shapes that base and settings imply."""
    import json

    folder.mkdir()
    settings = json.loads((base / "config.json").read_text())
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": 4, "lora_alpha": 6,
        "target_modules": "all-linear", **changes,
    }  # fmt: skip
    shapes = module_shapes({name: info.shape for name, info in tensor_infos(base).items()}, config=settings)
    draw = torch.Generator().manual_seed(3)
    expected = expected_keys(read_settings(config), shapes)
    save_file({key: 0.2 * torch.randn(shape, generator=draw) for key, shape in expected.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def test_every_architecture_is_executed() -> None:
    assert set(MODELS) == set(MLX_ARCHITECTURES)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_mlx_computes_what_peft_computes(name: str, variant: str, tmp_path: Path) -> None:
    base = _base(tmp_path, name)
    adapter = _adapter(tmp_path / "in", base, VARIANTS[variant])
    out = tmp_path / "out"
    code = main(["export", str(adapter), "--to", "mlx", "--output", str(out), "--base", str(base)])
    if variant == "embeddings and head" and name in ("qwen2", "qwen3", "gemma2"):
        assert code == 1 and not out.exists()  # one tensor for both there
        return
    assert code == 0
    trained, bare = in_transformers(base, ROWS, adapter=adapter), in_transformers(base, ROWS)
    found, noise = in_mlx(base, ROWS, adapter=out), largest(in_mlx(base, ROWS), bare)
    assert largest(trained, bare) > 0.1  # the adapter does something
    assert largest(found, trained) < max(4 * noise, 1e-4) and noise < 1e-3
    assert all(np.isfinite(logits).all() for logits in found)

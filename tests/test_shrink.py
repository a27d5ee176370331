"""Small bases of the same architecture: real configurations are shrunk, built, loaded by the loader and asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_tune.errors import UsageError
from lora_tune.model.base import linear4bit_modules, load_base
from lora_tune.model.shrink import shrunk_config, write_shrunk
from lora_tune.model.source import BaseSource, check_against_base, find_base, load_tokenizer
from lora_tune.model.weights import tensor_infos
from lora_tune.recipe import Base, Lora, Train

# configuration, tokenizer with its vocabulary (or a smaller one)
REAL = {
    "llama": ("llama_h4096_l32_Llama-2-7b-hf", "tinyllama-1.1b-chat"),
    "llama tied": ("llama_h3072_l28_Llama-3.2-3B-Instruct", "tinyllama-1.1b-chat"),
    "mistral": ("mistral_h4096_l32_Mistral-7B-Instruct-v0.3", "tinyllama-1.1b-chat"),
    "mixtral": ("mixtral_h4096_l32_Mixtral-8x7B-v0.1", "tinyllama-1.1b-chat"),
    "qwen2": ("qwen2_h3584_l28_Qwen2.5-7B", "qwen2.5-7b-unsloth_vision-pad"),
    "qwen3 moe": ("qwen3_moe_h2048_l48_Qwen3-30B-A3B", "qwen2.5-cogito-14b"),
    "phi3": ("phi3_h3072_l32_Chocolatine-3.8B", "phi-3-mini"),
    "gpt2": ("gpt2_h768_l12_gpt2", "gpt2_no-template"),
    "gemma": ("gemma_h2048_l18_gemma-2b", "tinyllama-1.1b-chat"),
    "glm4 moe": ("glm4_moe_lite_h2048_l47_GLM-4.7-Flash", "mpt-gpt-neox"),
    "stored in int8": ("llama_h4096_l32_Llama-3.1-8B-Instruct_bnb-int8", "tinyllama-1.1b-chat"),
}
KINDS = ["sliding_attention"] * 5 + ["full_attention"]
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 500,
    "max_position_embeddings": 256,
}  # fmt: skip


def real_base(corpus: Path, folder: Path, name: str) -> Path:
    """A folder with a real config.json and the files of a real tokenizer; no weight."""
    config, tokenizer = REAL[name]
    folder.mkdir()
    for path in (corpus / "data" / "tokenizers" / tokenizer).iterdir():
        shutil.copyfile(path, folder / path.name)
    shutil.copyfile(corpus / "data" / "configs" / config / "config.json", folder / "config.json")
    return folder


@pytest.mark.parametrize("name", REAL)
def test_real_bases_are_built_loaded_and_asked(name: str, corpus: Path, tmp_path: Path) -> None:
    real = json.loads((corpus / "data" / "configs" / REAL[name][0] / "config.json").read_text())
    folder = str(real_base(corpus, tmp_path / "real", name))
    source = find_base(Base(name=folder, quantize="int8" if "int8" in name else "nf4"))
    parameters = write_shrunk(source, tmp_path / "small", seed=1)
    assert parameters < 40e6
    small = Base(name=str(tmp_path / "small"), quantize="nf4")
    found = find_base(small)
    for key in ("model_type", "architectures", "vocab_size", "tie_word_embeddings", "max_position_embeddings"):
        assert found.config.get(key) == real.get(key)
    assert [p for p in check_against_base(found, lora=Lora(), train=Train()) if p.severity == "error"] == []
    model = load_base(found, small)
    assert len(linear4bit_modules(model)) >= 8
    tokenizer = load_tokenizer(found)
    ids = torch.tensor([tokenizer.encode("The quick brown fox jumps.", add_special_tokens=False)])
    logits = model(input_ids=ids).logits
    assert logits.shape == (1, ids.shape[1], real["vocab_size"])
    assert bool(logits.isfinite().all()) and float(logits.std()) > 0.3  # some tokens are likelier than others


def test_the_same_seed_gives_the_same_weights(tmp_path: Path, tiny_base: Path) -> None:
    source = find_base(Base(name=str(tiny_base)))
    before = torch.random.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_shrunk(source, tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert torch.equal(before, torch.random.get_rng_state())


def test_no_weight_of_the_base_is_read(tmp_path: Path, tiny_base: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "real")
    (tmp_path / "real" / "model.safetensors").write_bytes(b"no weights")
    write_shrunk(find_base(Base(name=str(tmp_path / "real"))), tmp_path / "small", seed=1)
    assert tensor_infos(tmp_path / "small")
    assert (tmp_path / "small" / "tokenizer.json").read_bytes() == (tiny_base / "tokenizer.json").read_bytes()


def ratio(config: dict[str, Any]) -> float:
    """Query heads of one key head."""
    return config["num_attention_heads"] / config["num_key_value_heads"]


@pytest.mark.parametrize(("heads", "key_heads"), [(32, 32), (32, 8), (28, 4), (24, 8), (16, 8), (8, 1), (12, 4)])
def test_the_ratio_of_heads_stays(heads: int, key_heads: int) -> None:
    config = LLAMA | {"num_attention_heads": heads, "num_key_value_heads": key_heads}
    small = shrunk_config(config)
    assert ratio(small) == ratio(config)
    assert small["hidden_size"] % small["num_attention_heads"] == 0
    with_size = shrunk_config(config | {"head_dim": 128})
    assert ratio(with_size) == ratio(config) and with_size["hidden_size"] % with_size["num_attention_heads"] == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layer_types": ["full_attention"] * 32}, {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}),
        (
            {"num_hidden_layers": 30, "layer_types": KINDS * 5},
            {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
        ),
        ({"first_k_dense_replace": 3, "n_routed_experts": 256}, {"first_k_dense_replace": 1, "n_routed_experts": 4}),
        ({"mlp_only_layers": [0]}, {"num_hidden_layers": 2, "mlp_only_layers": [0]}),
        ({"decoder_sparse_step": 2, "num_experts": 60}, {"decoder_sparse_step": 2, "num_experts": 4}),
        ({"decoder_sparse_step": 1}, {"decoder_sparse_step": 1}),
        ({"max_window_layers": 32}, {"max_window_layers": 2}),
        ({"max_window_layers": 28, "use_sliding_window": True}, {"max_window_layers": 1}),
        ({"sliding_window": 4096}, {"sliding_window": 4096}),
        ({"sliding_window": None}, {"sliding_window": None}),
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ({"num_experts_per_tok": 1, "num_experts": 16}, {"num_experts_per_tok": 1}),
        ({"quantization_config": {"load_in_4bit": True}}, {"quantization_config": None}),
        ({"eos_token_id": [1, 2]}, {"eos_token_id": [1, 2]}),
    ],
)
def test_what_makes_the_architecture_stays(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    small = shrunk_config(LLAMA | changes)
    assert {key: small.get(key) for key in expected} == expected


def test_factors_of_long_contexts_fit_the_small_heads(tmp_path: Path, tiny_base: Path) -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    changes = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 3072, "pad_token_id": 0}
    changes |= {"num_key_value_heads": 32, "rope_scaling": scaling, "original_max_position_embeddings": 128}
    source = BaseSource("phi", "local", tiny_base, None, LLAMA | changes)
    write_shrunk(source, tmp_path / "small", seed=1)
    small = Base(name=str(tmp_path / "small"), quantize="none")
    model = load_base(find_base(small), small)
    assert bool(model(input_ids=torch.arange(40)[None]).logits.isfinite().all())


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "vocab_size": 100},
        LLAMA | {"model_type": "no_such_model"},
        LLAMA | {"hidden_act": "no_such_function"},
        LLAMA | {"rope_scaling": {"rope_type": "no_such_type"}},
    ],
)
def test_what_cannot_be_built_is_one_line(config: dict[str, Any], tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(UsageError) as caught:
        write_shrunk(BaseSource("odd", "local", tiny_base, None, config), tmp_path / "small", seed=1)
    (problem,) = caught.value.problems
    assert "base.name=" in problem.fix and "\n" not in str(problem)

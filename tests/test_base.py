"""The base in memory: dtypes, quantization, evaluation that leaves training alone, checkpointing, broken weights."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from lora_tune.errors import UsageError
from lora_tune.model import base as base_module
from lora_tune.model.base import (
    checkpoint_layers,
    compute_dtype,
    fit_embeddings,
    full_weight,
    is_read_wrongly,
    linear4bit_modules,
    load_base,
    protect_from_repacking,
)
from lora_tune.model.kernels import plain
from lora_tune.model.methods import attach
from lora_tune.model.source import find_base
from lora_tune.recipe import Base, Lora

IDS = torch.arange(4, 44).reshape(2, 20)


def loaded(folder: Path, **settings: Any) -> Any:
    base = Base.model_validate({"name": str(folder), **settings})
    return load_base(find_base(base), base)


def with_adapter(folder: Path, **settings: Any) -> Any:
    base = Base.model_validate({"name": str(folder), **settings})
    source = find_base(base)
    model = attach(load_base(source, base), Lora(rank=4), source=source, base=base, seed=0)
    with torch.no_grad():  # B is zero at the start, and A would get no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-0.05, 0.05, parameter.numel()).reshape(parameter.shape))
    return model.train()


def gradients(model: Any) -> torch.Tensor:
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.requires_grad])


def cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(left, right, dim=0))


# --- dtypes and quantization


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8", "none"])
def test_every_weight_has_the_dtype_that_was_asked_for(tiny_base: Path, quantize: str, dtype: str) -> None:
    model = loaded(tiny_base, quantize=quantize, compute_dtype=dtype)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    expected = {"nf4": "Linear4bit", "fp4": "Linear4bit", "int8": "Linear8bitLt", "none": "Linear"}[quantize]
    assert {kinds[name] for name in kinds if name.endswith("_proj")} == {expected}
    assert kinds["lm_head"] == "Linear"
    floating = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    assert floating == {getattr(torch, dtype)} == {model.dtype}
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert torch.isfinite(model(IDS).logits).all()
    for _, module in linear4bit_modules(model):
        assert (module.compute_dtype, module.weight.quant_type) == (getattr(torch, dtype), quantize)


@pytest.mark.parametrize("double_quant", [True, False])
def test_double_quantization_is_as_asked(tiny_base: Path, double_quant: bool) -> None:
    model = loaded(tiny_base, double_quant=double_quant)
    assert {module.weight.quant_state.nested for _, module in linear4bit_modules(model)} == {double_quant}


def test_auto_is_float32_on_a_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert compute_dtype(Base(name="x")) == torch.float32
    assert compute_dtype(Base(name="x", compute_dtype="bfloat16")) == torch.bfloat16


@pytest.mark.parametrize(("quantize", "error"), [("nf4", 0.12), ("fp4", 0.15), ("int8", 0.01), ("none", 0.0)])
def test_the_full_weight_is_the_one_in_the_file_up_to_quantization(
    tiny_base: Path, quantize: str, error: float
) -> None:
    stored = load_file(tiny_base / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    layer = loaded(tiny_base, quantize=quantize).model.layers[1].mlp.down_proj
    before = full_weight(layer)
    assert before.shape == stored.shape and before.dtype == torch.float32
    assert float((before - stored).norm() / stored.norm()) <= error
    x = torch.randn(3, stored.shape[1], generator=torch.Generator().manual_seed(1))
    difference = (layer(x) - x @ before.T).norm() / layer(x).norm()
    assert float(difference) < (0.02 if quantize == "int8" else 1e-5)  # int8 rounds the activations too
    assert torch.equal(full_weight(layer), before)  # int8 moves its scales at the first forward


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_a_base_stored_quantized_is_loaded_as_it_is(tiny_base: Path, tmp_path: Path, quantize: str) -> None:
    first = loaded(tiny_base, quantize=quantize, compute_dtype="bfloat16")
    first.save_pretrained(tmp_path / "stored")
    again = loaded(tmp_path / "stored", quantize=quantize, compute_dtype="bfloat16")
    assert torch.equal(again(IDS).logits, first(IDS).logits)
    wide = loaded(tmp_path / "stored", quantize=quantize, compute_dtype="float32")
    assert {module.compute_dtype for _, module in linear4bit_modules(wide)} <= {torch.float32}
    assert wide(IDS).logits.dtype == torch.float32


# --- evaluation in the middle of training


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8", "none"])
def test_evaluating_in_mid_training_leaves_the_gradient_as_it_was(tiny_base: Path, quantize: str) -> None:
    never = gradients(with_adapter(tiny_base, quantize=quantize, compute_dtype="float32"))
    model = with_adapter(tiny_base, quantize=quantize, compute_dtype="float32")
    model.eval()
    with torch.no_grad():
        first, second = model(IDS).logits, model(IDS).logits
    model.state_dict()
    model.train()
    assert torch.equal(first, second)
    assert cosine(gradients(model), never) == pytest.approx(1.0, abs=1e-12)
    assert float(never.norm()) > 0


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit")
def test_without_the_protection_the_gradient_is_wrong_on_such_a_cpu(tiny_base: Path) -> None:
    from bitsandbytes.nn.modules import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes does not repack")
    never = gradients(with_adapter(tiny_base, compute_dtype="bfloat16"))
    model = with_adapter(tiny_base, compute_dtype="bfloat16")
    for _, module in linear4bit_modules(model):
        module.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        model.eval()(IDS)
    assert cosine(gradients(model.train()), never) < 0.95

    protected = with_adapter(tiny_base, compute_dtype="bfloat16")
    protect_from_repacking(protected)
    with torch.no_grad():
        protected.eval()(IDS)
    assert cosine(gradients(protected.train()), never) == pytest.approx(1.0, abs=1e-12)


# --- checkpointed layers


def _forwards(model: Any, layers: Any) -> tuple[float, torch.Tensor, list[int]]:
    """Loss, gradient and how often the layers' forward ran in one step."""
    checkpoint_layers(model.get_base_model(), layers)
    counts = [0, 0]
    blocks = model.get_base_model().model.layers

    def counting(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[index] += 1

        return hook

    hooks = [block.self_attn.q_proj.register_forward_hook(counting(i)) for i, block in enumerate(blocks)]
    model.zero_grad()
    loss = model(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    for hook in hooks:
        hook.remove()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]), counts


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_checkpointed_layers_run_twice_and_change_neither_loss_nor_gradient(tiny_base: Path, quantize: str) -> None:
    model = with_adapter(tiny_base, quantize=quantize)
    loss, gradient, counts = _forwards(model, "none")
    assert counts == [1, 1]
    for layers, expected in ((0, [1, 1]), (1, [2, 1]), (2, [2, 2]), (9, [2, 2]), ("all", [2, 2]), ("none", [1, 1])):
        other, other_gradient, counts = _forwards(model, layers)
        assert (other, counts) == (loss, expected)
        assert torch.allclose(other_gradient, gradient, atol=1e-7)


# --- embeddings for new tokens


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_of_the_embedding_are_the_mean_of_the_old_ones(tiny_base: Path, tmp_path: Path, tied: bool) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    if tied:
        tensors = load_file(folder / "model.safetensors")
        tensors.pop("lm_head.weight")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = loaded(folder)
    before = model.get_input_embeddings().weight.clone()
    fit_embeddings(model, 260)
    assert model.get_input_embeddings().weight.shape[0] == 260
    fit_embeddings(model, 263)
    weight = model.get_input_embeddings().weight
    assert torch.equal(weight[:260], before) and not weight.requires_grad
    assert torch.allclose(weight[260:], before.mean(dim=0).expand(3, -1), atol=1e-6)
    assert (model.get_output_embeddings().weight is weight) == tied
    assert model.config.vocab_size == 263 and model(IDS).logits.shape[-1] == 263


# --- weights that are not there or not right


def broken(tiny_base: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(tiny_base, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def refused(folder: Path, *words: str, **settings: Any) -> None:
    with pytest.raises(UsageError) as caught:
        loaded(folder, **settings)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_missing_tensor_is_refused_instead_of_drawn_at_random(tiny_base: Path, tmp_path: Path) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    refused(broken(tiny_base, tmp_path / "a", lambda tensors: tensors.pop(key)), key, "download the base again")


def test_weights_of_another_shape_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    def wider(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = torch.ones(65)

    refused(broken(tiny_base, tmp_path / "a", wider), "base 'a'", quantize="none")


def test_tensors_that_belong_nowhere_are_told(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def extra(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.extra.weight"] = torch.ones(3)

    loaded(broken(tiny_base, tmp_path / "a", extra))
    assert [record.getMessage() for record in caplog.records if "model.extra.weight" in record.getMessage()] == [
        "base 'a': 1 tensors of its files belong nowhere, such as model.extra.weight"
    ]


def test_a_cut_file_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = broken(tiny_base, tmp_path / "a", lambda _: None)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "not a whole safetensors file")


def test_pickled_weights_are_not_read(tiny_base: Path, tmp_path: Path) -> None:
    folder = broken(tiny_base, tmp_path / "a", lambda _: None)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "no safetensors weights")


def test_attention_that_is_not_installed_is_refused(tiny_base: Path) -> None:
    asked = {"attention": "flash_attention_2", "compute_dtype": "bfloat16"}
    refused(tiny_base, "base.attention: flash_attention_2 needs", "set it to auto", **asked)
    assert loaded(tiny_base).config._attn_implementation == "sdpa"
    assert loaded(tiny_base, attention="eager").config._attn_implementation == "eager"


def test_an_unknown_model_type_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = broken(tiny_base, tmp_path / "a", lambda _: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama_9"}))
    refused(folder, "llama_9", "newer transformers")


def test_code_may_run_only_for_the_base_that_the_flag_names(tiny_base: Path) -> None:
    base = Base(name=str(tiny_base))
    with pytest.raises(UsageError, match="another repository"):
        load_base(find_base(base), base, trust_remote_code="owner/model")


def test_a_hub_base_in_the_local_cache_is_loaded_offline(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--model"
    shutil.copytree(tiny_base, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    base = Base(name="owner/model", quantize="none")
    assert torch.equal(load_base(find_base(base), base)(IDS).logits, loaded(tiny_base, quantize="none")(IDS).logits)
    (repository / "snapshots" / commit / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="no safetensors weights"):
        load_base(find_base(base), base)


# --- noise


def test_loading_and_running_says_nothing(tiny_base: Path) -> None:
    script = (
        "import sys, torch\n"
        "from lora_tune.model.base import load_base\n"
        "from lora_tune.model.source import find_base\n"
        "from lora_tune.recipe import Base\n"
        "for quantize in ('nf4', 'int8'):\n"
        "    base = Base(name=sys.argv[1], quantize=quantize)\n"
        "    load_base(find_base(base), base)(torch.arange(8)[None])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, "-c", script, str(tiny_base)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_other_messages_of_bitsandbytes_still_pass(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    logger.warning("MatMul8bitLt: inputs will be cast from torch.float32 to float16 during quantization")
    logger.warning("something new")
    assert [record.getMessage() for record in caplog.records] == ["something new"]


# --- other layouts


def test_layers_that_keep_their_weight_transposed_are_read_the_right_way_round(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=3, eos_token_id=2)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    for quantize in ("none", "nf4"):
        layer = loaded(tmp_path / "gpt2", quantize=quantize).transformer.h[0].mlp.c_fc
        assert full_weight(layer).shape == (128, 32)
        x = torch.randn(2, 32)
        assert torch.allclose(layer(x), x @ full_weight(layer).T + layer.bias, atol=1e-5)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8", "none"])
def test_on_a_gpu_the_base_lies_there_and_trains(tiny_base: Path, quantize: str) -> None:
    model = with_adapter(tiny_base, quantize=quantize)
    expected = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert model.dtype == expected
    ids = IDS.cuda()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        with torch.autocast("cuda", expected):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("block", [64, 128])
def test_where_bitsandbytes_takes_the_scales_of_other_blocks(block: int) -> None:
    """By the definition of the format; once a newer bitsandbytes is right everywhere, the warning can go."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    found, expected = [], []
    for columns in range(2, 3 * block, 2):
        weight = torch.randn(16, columns, generator=torch.Generator().manual_seed(columns))
        packed, state = quantize_4bit(weight, blocksize=block, quant_type="nf4")
        if not torch.equal(dequantize_4bit(packed, state), plain.dequantize(packed, state, torch.float32)):
            found.append(columns)
        if is_read_wrongly(columns, block):
            expected.append(columns)
    assert found == expected


def test_a_base_that_bitsandbytes_reads_wrongly_is_named(monkeypatch: Any, caplog: Any) -> None:
    from bitsandbytes.nn import Linear4bit

    model = torch.nn.ModuleDict({str(size): Linear4bit(size, 8, quant_type="nf4").to("cpu") for size in (64, 96)})
    monkeypatch.setattr(base_module, "device_type", lambda: "cpu")
    for capability, lines in (("AVX512", ["96 of 96 inputs"]), ("AVX2", [])):
        caplog.clear()
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda now=capability: now)
        base_module._warn_of_ragged_rows(model, "base 'odd'")
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == len(lines) and all(line in text for line, text in zip(lines, said, strict=True))

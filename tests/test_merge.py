"""Merging an adapter into its base: equal answers, an ordinary folder, measured against the adapter as trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import finished
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, LlamaConfig

from lora_tune.adapter.combine import combined
from lora_tune.adapter.folding import folds_of
from lora_tune.adapter.load import load_adapter, read_adapter
from lora_tune.cli import main
from lora_tune.errors import CheckFailed
from lora_tune.model.base import full_weight, linear4bit_modules, load_base
from lora_tune.model.fold_writer import write_folded
from lora_tune.model.merging import divergence, merge_into, position_log_probs
from lora_tune.model.methods import SavedAdapter
from lora_tune.model.source import find_base
from lora_tune.model.streaming import (
    StoredWeights,
    as_held,
    quantized_names,
    sketch,
    stored_names,
    streamed_log_probs,
)
from lora_tune.recipe import Base

IDS = torch.arange(4, 60)[None]


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "pissa"])
def test_a_merged_model_answers_like_base_and_adapter(method: str, tiny_base: Path, tmp_path: Path) -> None:
    model = finished.write_finished(tmp_path / "adapter", tiny_base, lora={"method": method})
    out = tmp_path / "merged"
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(out), "--base", str(tiny_base)]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    assert merged.dtype == torch.float32
    with torch.no_grad():
        difference = (merged(IDS).logits - model(IDS).logits).abs().max()
    assert difference <= 1e-5
    facts = json.loads((out / "merge.json").read_text())
    assert facts["candidates"]["stored"]["top1"] == 1.0 and facts["chosen"] == "stored"


def test_modules_to_save_and_new_tokens_are_merged(tiny_base: Path, tmp_path: Path) -> None:
    for name, lora in {"head": {"modules_to_save": ["lm_head"]}, "tokens": {"new_tokens": ["<a>"]}}.items():
        model = finished.write_finished(tmp_path / name, tiny_base, lora=lora)
        out = tmp_path / f"{name}_merged"
        assert main(["merge", str(tmp_path / name), "--output", str(out), "--base", str(tiny_base)]) == 0
        merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
        with torch.no_grad():
            assert (merged(IDS).logits - model(IDS).logits).abs().max() <= 1e-5
        assert len(AutoTokenizer.from_pretrained(out)) == (261 if name == "tokens" else 260)


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_what_quantization_costs_is_measured_and_the_nearest_is_taken(
    quantize: str, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on a quantized base: folded into the stored one it answers otherwise, into what training saw the same."""
    model = finished.write_finished(tmp_path / "adapter", tiny_base, quantize=quantize)
    out = tmp_path / "merged"
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(out), "--base", str(tiny_base), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["problems"] == [] and printed["exit_code"] == 0
    facts = json.loads((out / "merge.json").read_text())
    assert printed["candidates"] == facts["candidates"] and facts["chosen"] == "dequantized"
    assert facts["candidates"]["dequantized"]["kl"] < 1e-6 < 1e-4 < facts["candidates"]["stored"]["kl"] < 1
    assert facts["candidates"]["dequantized"]["kl"] < facts["requantized"]["kl"]
    assert facts["candidates"]["stored"]["positions"] > 100
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    with torch.no_grad():
        difference = (merged(IDS).logits - model(IDS).logits).abs().max()
    assert difference <= (1e-5 if quantize != "int8" else 0.5)  # int8 rounds activations as well
    assert "dequantized (this folder)" in (out / "README.md").read_text()


def test_the_precision_can_be_chosen_and_the_distance_bounded(tiny_base: Path, tmp_path: Path) -> None:
    model = finished.write_finished(tmp_path / "adapter", tiny_base, quantize="nf4")
    arguments = ["merge", str(tmp_path / "adapter"), "--base", str(tiny_base), "--base-precision", "stored"]
    assert main([*arguments, "--output", str(tmp_path / "far"), "--max-kl", "1e-6"]) == 1
    assert not (tmp_path / "far").exists() and not list(tmp_path.glob(".far*"))
    assert main([*arguments, "--output", str(tmp_path / "stored")]) == 0
    section = Base(name=str(tiny_base), quantize="none", compute_dtype="float32")
    peft = merge_into(load_adapter(load_base(find_base(section), section), tmp_path / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "stored", dtype="auto")
    for name, parameter in merged.named_parameters():
        assert torch.allclose(parameter, dict(peft.named_parameters())[name], atol=1e-6), name
    assert model is not None
    finished.write_finished(tmp_path / "plain", tiny_base)
    arguments = ["merge", str(tmp_path / "plain"), "--base", str(tiny_base), "--output", str(tmp_path / "x")]
    assert main([*arguments, "--base-precision", "dequantized"]) == 2


def test_loss_is_measured_on_rows_that_are_given(tiny_base: Path, tmp_path: Path) -> None:
    model = finished.write_finished(tmp_path / "adapter", tiny_base, quantize="nf4")
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes."}]} for n in range(5)
    ]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "merged"
    arguments = ["merge", str(tmp_path / "adapter"), "--output", str(out), "--base", str(tiny_base)]
    assert main([*arguments, "--data", str(tmp_path / "held.jsonl")]) == 0
    facts = json.loads((out / "merge.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(out)
    losses = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True)["input_ids"]
        answer = tokenizer("Yes.", add_special_tokens=False)["input_ids"] + [2]  # and the token that ends the turn
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    assert facts["loss_as_trained"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-4)
    assert facts["candidates"]["dequantized"]["loss"] == pytest.approx(facts["loss_as_trained"], abs=1e-4)


@pytest.mark.parametrize("family", ["tied", "gpt2"])
def test_other_layouts_are_folded_shard_by_shard(family: str, tmp_path: Path) -> None:
    """Tied heads, transposed weights, names without a prefix: streamed and whole merges agree."""
    base = tmp_path / "base"
    tiny.write_base(base)
    config: Any = LlamaConfig.from_pretrained(base)
    if family == "gpt2":
        config = GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=2,
            vocab_size=config.vocab_size,
            n_positions=512,
            bos_token_id=1,
            eos_token_id=2,
        )
    else:
        config.tie_word_embeddings = True
    (base / "model.safetensors").unlink()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(base, max_shard_size="30KB")
    model = finished.write_finished(tmp_path / "adapter", base, lora={"targets": "all-linear"})
    source = find_base(Base(name=str(base), quantize="none"))
    sketched = sketch(source)
    names = stored_names(sketched, source)
    assert names is not None
    folds = folds_of(read_adapter(tmp_path / "adapter"))
    (tmp_path / "out").mkdir()
    write_folded(source, tmp_path / "out", names, change=folds.apply, shard_bytes=40_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    shutil.copy(base / "config.json", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    with torch.no_grad():
        assert (merged(IDS).logits - model(IDS).logits).abs().max() <= 1e-5
    weights = StoredWeights(source.folder, names, change=folds.apply)
    rows = [list(range(4, 60)), [5, 6]]
    streamed = streamed_log_probs(sketched, weights, rows, pad_id=0)
    assert torch.allclose(streamed, position_log_probs(merged, rows), atol=1e-5)
    assert all(parameter.device.type == "meta" for parameter in sketched.parameters())


@pytest.mark.parametrize("quantize", ["nf4", "fp4"])
def test_a_streamed_base_is_quantized_like_a_loaded_one(quantize: Any, tiny_base: Path) -> None:
    section = Base(name=str(tiny_base), quantize=quantize, compute_dtype="bfloat16")
    source = find_base(section)
    loaded = load_base(source, section)
    sketched = sketch(source)
    names = stored_names(sketched, source)
    assert names is not None
    held = as_held(section, quantized_names(sketched), dtype=torch.bfloat16)
    weights = StoredWeights(source.folder, names, change=held)
    for name, module in linear4bit_modules(loaded):
        assert torch.equal(full_weight(module), weights[f"{name}.weight"]), name
    assert len(linear4bit_modules(loaded)) == len(quantized_names(sketched))


def test_a_half_precision_base_stays_one(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(base)
    finished.write_finished(tmp_path / "adapter", base)
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged"), "--base", str(base)]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    measured = json.loads((tmp_path / "merged" / "merge.json").read_text())["candidates"]["stored"]
    assert measured["kl"] < 5e-3  # rounding of the merged weights to bfloat16


def test_tokenizer_template_and_end_tokens_come_along(tiny_base: Path, tmp_path: Path) -> None:
    finished.write_finished(tmp_path / "adapter", tiny_base)
    out = tmp_path / "merged"
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(out), "--base", str(tiny_base)]) == 0
    messages = [{"role": "user", "content": "Hi"}]
    ours, theirs = (
        AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        for folder in (out, tiny_base)
    )
    assert ours == theirs
    generation = GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == 2 and generation.pad_token_id == 0
    assert not list(out.glob("*.bin")) and not list(tmp_path.glob(".merged*"))


def test_refusals_leave_nothing(tiny_base: Path, tmp_path: Path) -> None:
    finished.write_finished(tmp_path / "adapter", tiny_base)
    there = tmp_path / "there"
    there.mkdir()
    arguments = ["merge", str(tmp_path / "adapter"), "--output"]
    assert main([*arguments, str(there), "--base", str(tiny_base)]) == 2  # the output must be new
    assert main([*arguments, str(tmp_path / "out")]) == 1  # a local base has to be named
    other = tiny.write_base(tmp_path / "other", seed=2)
    assert main([*arguments, str(tmp_path / "out"), "--base", str(other)]) == 1  # another base
    assert main(["merge", str(tiny_base), "--output", str(tmp_path / "out"), "--base", str(tiny_base)]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "other", "there"]


def test_a_quantized_base_is_not_merged_into(tiny_base: Path, tmp_path: Path) -> None:
    finished.write_finished(tmp_path / "adapter", tiny_base, quantize="nf4")
    section = Base(name=str(tiny_base), quantize="nf4", compute_dtype="float32")
    model = load_adapter(load_base(find_base(section), section), tmp_path / "adapter")
    with pytest.raises(CheckFailed, match="quantized"):
        merge_into(model)


def test_divergence_of_known_distributions() -> None:
    same = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    other = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    assert divergence(same, same) == divergence(other, other)
    found = divergence(same, other)
    assert found.worst_kl == pytest.approx(
        0.5 * torch.tensor(2.0).log().item() + 0.5 * torch.tensor(2 / 3).log().item()
    )
    assert found.kl == pytest.approx(found.worst_kl / 2) and found.positions == 2


# ----- several adapters -----
@pytest.fixture(scope="module")
def pair(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of one base with different ranks and scales."""
    place = tmp_path_factory.mktemp("pair")
    finished.write_finished(place / "a", tiny_base, quantize="nf4")
    finished.write_finished(place / "b", tiny_base, quantize="nf4", lora={"method": "rslora", "rank": 2, "alpha": 3})
    return [place / "a", place / "b"]


def _delta(saved: SavedAdapter) -> dict[str, torch.Tensor]:
    return {name: update.delta() for name, update in folds_of(saved).updates.items()}


def test_a_linear_combination_is_the_sum_of_the_updates(pair: list[Path], tiny_base: Path) -> None:
    source = find_base(Base(name=str(tiny_base), quantize="nf4"))
    mixed = combined(pair, source, weights=(0.7, -0.2), method="linear", density=1.0, seed=0)
    a, b = (_delta(read_adapter(folder)) for folder in pair)
    found = _delta(mixed)
    assert found.keys() == a.keys()
    for name, delta in found.items():
        assert torch.allclose(delta, 0.7 * a[name] - 0.2 * b[name], atol=1e-6)


@pytest.mark.parametrize("method", ["svd", "ties", "dare_linear", "dare_ties"])
def test_other_combinations(method: Any, pair: list[Path], tiny_base: Path) -> None:
    source = find_base(Base(name=str(tiny_base), quantize="nf4"))
    state = torch.random.get_rng_state()
    first, again = (combined(pair, source, weights=(0.5, 0.5), method=method, density=0.5, seed=3) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(first.tensors[key], again.tensors[key]) for key in first.tensors)
    assert any(float(tensor.abs().max()) > 0 for tensor in first.tensors.values())
    if method == "svd":  # the best approximation of its rank
        exact = _delta(combined(pair, source, weights=(0.5, 0.5), method="linear", density=1.0, seed=0))
        for name, delta in _delta(first).items():
            values = torch.linalg.svdvals(exact[name].double())
            assert float((delta - exact[name]).norm()) == pytest.approx(float(values[4:].norm()), rel=1e-3, abs=1e-5)


def test_several_adapters_are_merged_and_measured(pair: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    namesake = tmp_path / "other" / "a"
    shutil.copytree(pair[1], namesake)  # two folders of one name are two adapters
    pair = [pair[0], namesake]
    arguments = ["merge", *map(str, pair), "--output", str(out), "--base", str(tiny_base), "--weights", "1,0"]
    assert main(arguments) == 0
    facts = json.loads((out / "merge.json").read_text())
    assert facts["combined"] == {"method": "linear", "weights": {"a": 1.0, "a (2)": 0.0}}
    assert facts["from_each"]["a"]["kl"] < 1e-8 < 1e-4 < facts["from_each"]["a (2)"]["kl"]
    assert main([*arguments[:-1], "1", "--output", str(tmp_path / "x")]) == 2
    finished.write_finished(tmp_path / "c", tiny_base)  # trained on the unquantized base
    arguments = ["merge", str(pair[0]), str(tmp_path / "c"), "--output", str(tmp_path / "x"), "--base", str(tiny_base)]
    assert main(arguments) == 1 and not (tmp_path / "x").exists()

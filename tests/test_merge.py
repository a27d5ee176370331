"""Merging an adapter into its base: equal answers, an ordinary folder, measured against the adapter as trained."""

from __future__ import annotations

import json
from pathlib import Path

import finished
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lora_tune.adapter.load import load_adapter
from lora_tune.cli import main
from lora_tune.errors import CheckFailed
from lora_tune.model.base import load_base
from lora_tune.model.merging import divergence, merge_into
from lora_tune.model.source import find_base
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
    assert json.loads((out / "merge.json").read_text())["against"]["adapter_as_trained"]["top1"] == 1.0


def test_modules_to_save_and_new_tokens_are_merged(tiny_base: Path, tmp_path: Path) -> None:
    for name, lora in {"head": {"modules_to_save": ["lm_head"]}, "tokens": {"new_tokens": ["<a>"]}}.items():
        model = finished.write_finished(tmp_path / name, tiny_base, lora=lora)
        out = tmp_path / f"{name}_merged"
        assert main(["merge", str(tmp_path / name), "--output", str(out), "--base", str(tiny_base)]) == 0
        merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
        with torch.no_grad():
            assert (merged(IDS).logits - model(IDS).logits).abs().max() <= 1e-5
        assert len(AutoTokenizer.from_pretrained(out)) == (261 if name == "tokens" else 260)


def test_what_quantization_costs_is_measured(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on NF4, merged into float32: the two differ, and the numbers say by how much."""
    finished.write_finished(tmp_path / "adapter", tiny_base, quantize="nf4")
    arguments = ["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged"), "--base", str(tiny_base)]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["problems"] == [] and printed["exit_code"] == 0
    measured = json.loads((tmp_path / "merged" / "merge.json").read_text())["against"]
    assert printed["against"] == measured
    assert 1e-4 < measured["adapter_as_trained"]["kl"] < 1
    assert measured["adapter_on_the_same_base"]["kl"] < 1e-6
    assert measured["adapter_on_the_same_base"]["top1"] == 1.0
    assert measured["adapter_as_trained"]["positions"] > 100


def test_a_half_precision_base_stays_one(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(base)
    finished.write_finished(tmp_path / "adapter", base)
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged"), "--base", str(base)]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    measured = json.loads((tmp_path / "merged" / "merge.json").read_text())["against"]["adapter_on_the_same_base"]
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

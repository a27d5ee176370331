"""`lora-tune plan`: real configurations, overrides, cards, data, bad input; cold, and one JSON object of fixed keys."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_tune import plan as verb
from lora_tune.cli import main
from lora_tune.data.amount import estimate
from lora_tune.model.cards import CARDS
from lora_tune.model.device import Machine
from lora_tune.recipe import DataSource

KEYS = [
    "exit_code", "parts_gib", "peak_gib", "uncertainty_gib", "fits", "micro_batch_size", "accumulation",
    "gradient_checkpointing", "optimizer", "offload", "tokens_per_s", "step_s", "hours", "parameters",
    "trainable_parameters", "problems",
]  # fmt: skip
PARTS = ["weights", "adapters", "gradients", "optimizer", "activations", "loss_head", "buffers", "runtime"]
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder that holds the config.json of an 8B model and nothing else."""
    return write_config(tmp_path / "base", {})


def write_config(folder: Path, changes: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in (CONFIG | changes).items() if value != "left out"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def planned(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == code
    captured = capsys.readouterr()
    assert captured.err == "" and len(captured.out.splitlines()) == 1
    answer: dict[str, Any] = json.loads(captured.out)
    assert answer["exit_code"] == code
    return answer


def test_the_json_object_has_the_keys_that_are_promised(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--model", str(base), "--gpu", "rtx4090", "--max-steps", "100")
    assert list(found) == KEYS and list(found["parts_gib"]) == PARTS
    assert sum(found["parts_gib"].values()) == pytest.approx(found["peak_gib"], abs=0.001)
    assert found["fits"] is True and found["problems"] == []
    assert found["parameters"] == 8030261248 and found["trainable_parameters"] == 41943040
    assert found["micro_batch_size"] * found["accumulation"] == 2
    assert found["hours"] == pytest.approx(100 * found["step_s"] / 3600, rel=0.01)
    assert found["tokens_per_s"] == pytest.approx(2 * 2048 / found["step_s"], rel=0.01)


def test_a_base_without_weights_is_planned_cold(base: Path) -> None:
    """Without torch, in less than half a second of processor time (the imports of Python itself included)."""
    code = (
        "import sys\nfrom lora_tune.cli import main\n"
        f"code = main(['plan', '--model', {str(base)!r}, '--gpu', 'rtx3060', '--json'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'pyarrow', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(times) < 0.5


def test_real_configurations_are_planned_and_agree_with_their_index(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checked, indexed = 0, 0
    for folder in sorted((corpus / "data" / "configs").iterdir()):
        config = json.loads((folder / "config.json").read_text())
        refused = "VL" in folder.name or config.get("quantization_config", {}).get("quant_method", "bitsandbytes") != (
            "bitsandbytes"
        )
        quantize = "int8" if "int8" in folder.name else "none"
        arguments = ["--model", str(folder), "--quantize", quantize, "--gpu", "2048GiB"]
        found = planned(capsys, *arguments, code=2 if refused else 0)
        if refused:
            assert len(found["problems"]) == 1 and found["problems"][0]["fix"]
            continue
        assert all(problem["severity"] != "error" for problem in found["problems"]), folder.name
        index = folder / "model.safetensors.index.json"
        if index.exists():
            stored = json.loads(index.read_text())["metadata"]["total_size"]
            assert found["parts_gib"]["weights"] * 2**30 == pytest.approx(stored, rel=0.01), folder.name
            indexed += 1
        checked += 1
    assert checked >= 14 and indexed >= 5


def test_an_index_of_another_model_is_said(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = base / "model.safetensors.index.json"
    for size, told in ((2 * 8030261248, False), (4 * 8030261248, False), (9e9, True), ("x", False), (-1, False)):
        index.write_text(json.dumps({"metadata": {"total_size": size}}))
        found = planned(capsys, "--model", str(base), "--gpu", "a100-80")
        assert [problem["key"] for problem in found["problems"]] == (["base.name"] if told else [])


def test_keys_may_be_written_short_or_in_full(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--method", "dora", "--rank=8", "--quantize", "none", "--max-length", "1024", "--batch-size=8"]
    full = ["lora.method=dora", "lora.rank=8", "base.quantize=none", "train.max_length=1024", "train.batch_size=8"]
    common = ["--model", str(base), "--gpu", "48GiB"]
    assert planned(capsys, *common, *short) == planned(capsys, *full, *common)
    assert planned(capsys, *common)["tokens_per_s"] is None


def recipe_file(folder: Path, base: Path, data: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"base: {{name: {base}}}\ndata:\n  - {{source: {data}}}\noutput: {folder / 'out'}\n")
    return path


def rows(folder: Path, count: int, *, words: int = 60, name: str = "rows.jsonl") -> Path:
    path = folder / name
    lines = [
        {"instruction": f"Number {n}: say it again.", "output": "words and words " * (words // 3)} for n in range(count)
    ]
    text = json.dumps(lines) if name.endswith(".json") else "\n".join(map(json.dumps, lines))
    path.write_text(text)
    return path


def test_a_recipe_is_planned_with_its_data(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_file(tmp_path, base, rows(tmp_path, 5000))
    found = planned(capsys, str(recipe), "--gpu", "rtx4090")
    tokens = 4900 * (30 + 960 / 3) / 4.3
    assert found["hours"] * 3600 * found["tokens_per_s"] == pytest.approx(tokens, rel=0.25)
    twice = planned(capsys, str(recipe), "train.epochs=2", "--gpu", "rtx4090")
    assert twice["hours"] == pytest.approx(2 * found["hours"], rel=0.1)
    assert planned(capsys, str(recipe), "--gpu", "24GiB")["hours"] is None
    assert main(["plan", str(recipe), "--gpu", "rtx4090"]) == 0
    shown = capsys.readouterr().out
    for word in ("weights of linear layers (nf4)", "kept activations", "optimizer states", "at the peak", "tokens/s",
                 "TFLOP", "estimated", "41.9 M trained"):  # fmt: skip
        assert word in shown


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("count", [7, 300, 4000])
def test_rows_are_counted_without_reading_all_of_them(tmp_path: Path, count: int, name: str) -> None:
    source = DataSource(source=str(rows(tmp_path, count, name=name)))
    found = estimate([source], hold_out=0, max_length=2048, vocabulary=128_000)
    assert found is not None and found.rows == pytest.approx(count, rel=0.1)
    capped = source.model_copy(update={"max_rows": 5, "weight": 2.0})
    few = estimate([capped], hold_out="20%", max_length=8, vocabulary=128_000)
    assert few is not None and few.rows == 8 and few.tokens == 8 * 8


def test_parquet_and_folders_are_counted_and_the_hub_is_not(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["some words " * 20] * 1234}), tmp_path / "a.parquet")
    found = estimate([DataSource(source=str(tmp_path))], hold_out=0, max_length=2048, vocabulary=32_000)
    assert found is not None and found.rows == pytest.approx(1234, rel=0.01)
    assert estimate([DataSource(source="tatsu-lab/alpaca")], hold_out=0, max_length=2048, vocabulary=32_000) is None
    (tmp_path / "a.parquet").write_bytes(b"PAR1 damaged")
    assert estimate([DataSource(source=str(tmp_path))], hold_out=0, max_length=2048, vocabulary=32_000) is None


def test_what_does_not_fit_ends_with_4_and_three_changes(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(base), "--quantize", "none", "--gpu", "rtx3060"]
    found = planned(capsys, *arguments, code=4)
    (problem,) = found["problems"]
    assert list(found) == KEYS and found["fits"] is False and problem["severity"] == "error"
    changes = problem["fix"].split("; or ")
    assert len(changes) == 3 and changes[0].startswith("set base.quantize: nf4 (") and "% time" in changes[0]
    assert main(["plan", *arguments]) == 4
    captured = capsys.readouterr()
    assert captured.out.count("it would fit") == 3 and len(captured.err.splitlines()) == 1
    assert planned(capsys, *arguments[:2], "--gpu", "rtx3060")["fits"]


def test_a_larger_card_is_compared_with_one_whose_speed_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_config(tmp_path / "base", {"num_hidden_layers": 100})
    for card, has_time in (("rtx4060", True), ("8GiB", False)):
        (problem,) = planned(capsys, "--model", str(folder), "--gpu", card, code=4)["problems"]
        cards = re.findall(r"take a card of [^;]* \(([^)]*)\)", problem["fix"])
        assert len(cards) == 3 and all(re.fullmatch(r"[\d.]+ GiB" + ", .*%.*" * has_time, text) for text in cards)


def test_auto_is_the_card_in_this_machine(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine("cuda", "NVIDIA GeForce RTX 4090", 14.0, 24.0, CARDS["rtx4090"])
    monkeypatch.setattr(verb, "this_machine", lambda: machine)
    assert main(["plan", "--model", str(base)]) == 0
    assert "14.0 of 24.0 GiB free, 10.0 held by the driver and others" in capsys.readouterr().out
    found = planned(capsys, "--model", str(base), "--gpu", "auto")
    assert found["peak_gib"] < 14 and found["gradient_checkpointing"] != "none"
    monkeypatch.setattr(verb, "this_machine", lambda: Machine("cpu", "cpu", 64.0, 64.0, None))
    assert main(["plan", "--model", str(base), "--max-length", "256"]) == 0
    shown = capsys.readouterr().out
    assert "no GPU here" in shown and "seconds unknown" in shown and "speed is not known" in shown


def test_a_base_in_the_cache_of_the_hub_is_planned_offline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots").mkdir()
    write_config(folder / "snapshots" / commit, {})
    assert planned(capsys, "--model", "some/model", "--gpu", "a100-80")["parameters"] == 8030261248
    assert planned(capsys, "--model", "some/model", "--revision", commit, "--gpu", "a100-80")["fits"]


def test_a_small_base_is_shown_in_small_units(capsys: pytest.CaptureFixture[str]) -> None:
    """No part that exists is shown as nothing; the parts shown add up to the peak."""
    arguments = ["--model", "builtin:quickstart", "--max-length", "256", "--batch-size", "6", "--gpu", "rtx4060"]
    found = planned(capsys, *arguments)
    assert main(["plan", *arguments]) == 0
    shown = capsys.readouterr().out
    rows = dict(re.findall(r"^(\S.*?)  +([\d.]+)(?: ± [\d.]+)?$", shown, re.MULTILINE))
    sizes = {name: float(size) for name, size in rows.items()}
    assert len(sizes) == 10 and min(sizes.values()) > 0, shown
    assert sizes.pop("at the peak") == pytest.approx(1024 * found["peak_gib"], abs=0.1)
    assert sum(sizes.values()) == pytest.approx(1024 * found["peak_gib"], abs=1) and "MiB" in shown
    assert " 0.0 " not in shown and "0.00 B" not in shown and "GFLOP a step" in shown
    assert f"{found['parameters'] / 1e6:.1f} M parameters" in shown
    assert "the largest power of two that divides batch_size 6" in shown
    assert main(["plan", *arguments, "train.micro_batch_size=3"]) == 0
    assert "as the recipe says" in capsys.readouterr().out
    assert main(["plan", "--model", "builtin:quickstart", "--batch-size", "4", "--gpu", "rtx4060"]) == 0
    assert "the whole batch_size 4" in capsys.readouterr().out


def test_a_time_budget_says_how_long_it_takes(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(base), "--gpu", "rtx4090", "train.budget=1h30m"]
    found = planned(capsys, *arguments)
    assert found["hours"] == pytest.approx(1.5)
    assert main(["plan", *arguments]) == 0
    assert f"1h30m ends it, after about {int(5400 / found['step_s']):,} steps" in capsys.readouterr().out
    assert planned(capsys, *arguments[:2], "train.budget=90m", "--gpu", "24GiB")["hours"] == pytest.approx(1.5)


def test_a_peak_outside_of_training_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is kept for a backward pass then: zeros that would puzzle."""
    folder = write_config(tmp_path / "base", {"num_hidden_layers": 1, "vocab_size": 1_000_000})
    arguments = ["--model", str(folder), "--quantize", "none", "--gpu", "a100-80"]
    found = planned(capsys, *arguments, "train.micro_batch_size=1")
    assert found["parts_gib"]["activations"] == 0
    assert main(["plan", *arguments, "train.micro_batch_size=1"]) == 0
    assert "at the peak, in an evaluation" in capsys.readouterr().out


def test_an_old_card_computes_in_float16(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(base), "--gpu", "t4"]) == 0
    assert "65 TFLOP/s float16" in capsys.readouterr().out
    found = planned(capsys, "--model", str(base), "--gpu", "t4", "base.compute_dtype=bfloat16")
    assert [problem["key"] for problem in found["problems"]] == ["base.compute_dtype"]


def test_an_unknown_architecture_is_counted_on_the_meta_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bloom"
    folder.mkdir()
    config = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 4096, "n_head": 32,
              "n_layer": 30, "vocab_size": 250880}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    found = planned(capsys, "--model", str(folder), "--gpu", "a100-80")
    assert found["parameters"] == 7_069_016_064
    assert ["meta device" in problem["fix"] for problem in found["problems"]] == [True]


BAD: list[tuple[dict[str, Any], list[str], str]] = [
    ({"hidden_size": "left out"}, [], "no hidden_size or n_embd"),
    ({"num_attention_heads": 0}, [], "num_attention_heads must be a whole number"),
    ({"num_hidden_layers": 10**7}, [], "no model has 10000000 layers"),
    ({"hidden_size": 10**8, "intermediate_size": 10**8}, [], "no model has"),
    ({"num_key_value_heads": 5}, [], "cannot be shared"),
    ({"num_key_value_heads": 64}, [], "cannot be shared"),
    ({"vocab_size": 1.5}, [], "vocab_size must be a whole number"),
    ({"model_type": "never_heard_of"}, [], "never_heard_of"),
    ({"model_type": "left out"}, [], "names no model_type"),
    ({"architectures": ["BertForMaskedLM"]}, [], "not supported: an encoder"),
    ({"quantization_config": {"quant_method": "gptq"}}, [], "stored as gptq"),
    ({}, ["--rank", "0"], "lora.rank"),
    ({}, ["--max-length", "-1"], "train.max_length"),
    ({}, ["--batch-size", "many"], "train.batch_size"),
    ({}, ["--quantize", "nf5"], "base.quantize"),
    ({}, ["--method"], "--method needs a value"),
    ({}, ["--metod", "lora"], "no such option"),
    ({}, ["lora.targets=[no_such_layer]"], "no layer of the base has that name"),
    ({}, ["--gpu", "rtx4900"], "take one such as rtx4090"),
    ({}, ["--gpu", "0GiB"], "no card has that memory"),
    ({}, ["other.yaml"], "give one of them"),
]


@pytest.mark.parametrize(("changes", "arguments", "told"), BAD)
def test_bad_input_is_one_line(
    changes: dict[str, Any], arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_config(tmp_path / "base", changes)
    card = [] if "--gpu" in arguments else ["--gpu", "rtx4090"]
    assert main(["plan", "--model", str(folder), *card, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and told in captured.err
    found = planned(capsys, "--model", str(folder), *card, *arguments, code=2)
    assert told in str(found["problems"])


def test_a_recipe_or_a_model_must_be_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan"]) == 2 and "give a recipe, or --model NAME" in capsys.readouterr().err
    assert main(["plan", "a.yaml", "b.yaml"]) == 2 and "got 'a.yaml b.yaml'" in capsys.readouterr().err
    assert main(["plan", "--model", str(tmp_path)]) == 2 and "no config.json there" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    assert main(["plan", "--model", str(tmp_path)]) == 2 and "not JSON" in capsys.readouterr().err


def test_absurd_lengths_and_batches_are_refused_for_what_they_need(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", str(base), "--gpu", "h200"]
    found = planned(capsys, *common, "--max-length", str(2**31 - 1), code=4)
    assert found["peak_gib"] > 10_000 and found["fits"] is False
    assert planned(capsys, *common, "--batch-size", str(2**30))["accumulation"] >= 2**28

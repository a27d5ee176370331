"""Configurations of other tools as recipes of ours: the real ones of the corpus, value by value, and any YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tune.cli import main
from lora_tune.errors import RecipeError
from lora_tune.foreign_sources import Draft
from lora_tune.foreign_values import RULES
from lora_tune.recipe import Recipe
from lora_tune.recipe_file import read_recipe
from lora_tune.recipe_import import import_recipe

ALL_LINEAR = ("gate_proj", "down_proj", "up_proj", "q_proj", "v_proj", "k_proj", "o_proj")
# {file: (tool, {path of ours: value})}; read off the files by hand
EXPECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "axolotl/qlora-1b.yaml": ("axolotl", {
        "base.name": "NousResearch/Llama-3.2-1B", "base.quantize": "nf4", "base.attention": "flash_attention_2",
        "data.0.source": "teknium/GPT4-LLM-Cleaned", "data.0.format": "alpaca", "lora.rank": 32, "lora.alpha": 16.0,
        "lora.targets": ALL_LINEAR, "train.batch_size": 8, "train.optimizer": "adamw_8bit", "train.learning_rate": 2e-4,
        "train.schedule": "cosine", "train.warmup": 10, "train.max_length": 2048, "train.packing": True,
        "train.gradient_checkpointing": "all", "output": "outputs/qlora-out",
    }),
    "axolotl/dev_sharegpt.yaml": ("axolotl", {
        "base.quantize": "int8", "base.compute_dtype": "float16", "data.0.format": "sharegpt",
        "lora.targets": "all-linear", "train.max_steps": 10, "train.packing": False, "eval.hold_out": 0,
    }),
    "axolotl/legacy_4bit-lora-7b.yaml": ("axolotl", {
        "base.quantize": "nf4", "lora.targets": ("q_proj", "v_proj"), "train.batch_size": 1,
        "train.learning_rate": 2e-7, "eval.hold_out": "2%", "eval.every": 110, "train.save_every": 660,
        "track": ("wandb",),
    }),
    "axolotl/qwen3-4b-qlora.yaml": ("axolotl", {
        "loss_on": "all", "train.max_steps": 99, "train.gradient_checkpointing": "none", "seed": 0, "lora.alpha": 64.0,
    }),
    "axolotl/lora-8b-kernels.yaml": ("axolotl", {"base.quantize": "none", "train.batch_size": 8, "train.epochs": 4.0}),
    "llamafactory/qwen3_qlora_otfq.yaml": ("LLaMA-Factory", {
        "base.name": "Qwen/Qwen3-4B-Instruct-2507", "base.quantize": "nf4", "data.0.source": "identity",
        "data.1.source": "alpaca_en_demo", "data.0.max_rows": 1000, "lora.rank": 8, "lora.targets": "all-linear",
        "train.batch_size": 8, "train.warmup": "10%", "train.epochs": 3.0, "train.save_every": 500,
    }),
    "llamafactory/company_extract_llama3.2.yaml": ("LLaMA-Factory", {
        "base.quantize": "none", "base.compute_dtype": "bfloat16", "train.batch_size": 16, "eval.hold_out": "10%",
        "eval.every": 500, "train.max_length": 2048,
    }),
    "llamafactory/webui_chapterization_mistral.yaml": ("LLaMA-Factory", {
        "base.quantize": "nf4", "base.compute_dtype": "bfloat16", "lora.rank": 8, "lora.alpha": 16.0,
        "train.batch_size": 64, "train.max_grad_norm": 0.3, "train.learning_rate": 2e-4, "train.max_length": 1024,
    }),
    "litgpt/mistral-7b_qlora.yaml": ("LitGPT", {
        "base.name": "mistralai/Mistral-7B-v0.1", "base.quantize": "nf4", "base.double_quant": False,
        "data.0.source": "mhenrichsen/alpaca_2k_test", "lora.rank": 32, "lora.targets": ("q_proj", "v_proj"),
        "loss_on": "all", "train.batch_size": 8, "train.learning_rate": 2e-4, "eval.every": 100, "eval.hold_out": "5%",
        "seed": 1337, "train.epochs": 4.0, "train.max_length": 512,
    }),
    "oumi/llama3.1_8b_qlora.yaml": ("oumi", {
        "base.quantize": "nf4", "data.0.source": "yahma/alpaca-cleaned", "train.batch_size": 64,
        "train.max_length": 8192, "train.warmup": 100, "train.weight_decay": 0.01, "track": ("wandb",),
    }),
    "torchtune/llama2_7B_qlora_single_device.yaml": ("torchtune", {
        "base.quantize": "nf4", "data.0.source": "yahma/alpaca-cleaned", "lora.rank": 8, "train.batch_size": 16,
        "lora.targets": ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "train.warmup": 100,
        "train.optimizer": "adamw", "output": "/tmp/torchtune/llama2_7B/qlora_single_device",
    }),
    "trl/zephyr-7b-beta_sft_qlora.yaml": ("TRL", {
        "base.revision": "main", "base.quantize": "nf4", "data.0.split": "train_sft", "data.1.split": "test_sft",
        "train.batch_size": 8, "train.keep_checkpoints": 1, "train.warmup": "10%", "eval.hold_out": 1000, "seed": 42,
    }),
    "custom/gemma270m_exp4_final_lr1e-6.yaml": ("ms-swift", {
        "base.quantize": "none", "train.max_steps": 55, "train.schedule": "constant", "train.batch_size": 8,
        "train.too_long": "drop", "eval.hold_out": "data/valid.jsonl", "eval.every": 1, "train.keep_checkpoints": 60,
    }),
}  # fmt: skip
LOST = {  # settings that must be named as not carried over
    "axolotl/mistral-qlora-orpo.yaml": {"rl", "orpo_alpha", "chat_template"},
    "axolotl/qlora-fsdp-70b.yaml": {"fsdp", "fsdp_config"},
    "axolotl/legacy_4bit-lora-7b.yaml": {"gptq_groupsize", "base_model_config"},
    "trl/zephyr-7b-beta_sft_qlora.yaml": {"chat_template", "push_to_hub", "hub_model_id"},
    "torchtune/gemma2_9B_qlora_single_device.yaml": {"profiler", "tokenizer", "optimizer.fused"},
    "llamafactory/company_extract_llama3.2.yaml": {"trust_remote_code", "template", "data"},
}
REAL = sorted({*EXPECTED, *LOST, "axolotl/qlora-fsdp-70b.yaml", "custom/gemma270m_exp1_rank8_lr1e-4.yaml"})


def _value(recipe: Recipe, path: str) -> Any:
    found: Any = recipe
    for part in path.split("."):
        found = found[int(part)] if part.isdecimal() else getattr(found, part)
    return found


def _recipe(text: str, folder: Path) -> Recipe:
    """The recipe of an import; the files that it names are made first."""
    for name in ("data/train_filtered.jsonl", "data/valid.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}\n")
    (folder / "models" / "gemma-3-270m-it").mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(text)
    return read_recipe(folder / "recipe.yaml").recipe


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_real_configurations_become_recipes(name: str, corpus: Path, tmp_path: Path) -> None:
    tool, expected = EXPECTED[name]
    imported = import_recipe(corpus / "data" / "recipes" / name)
    assert imported.tool == tool
    text = imported.text
    for source in ("identity", "alpaca_en_demo", "company_extract", "chapterization"):
        text = text.replace(f"source: {source}\n", f"source: some/{source}\n")  # names of a file that is not there
    text = text.replace("name: /tmp/Llama-2-7b-hf", "name: some/base")
    recipe = _recipe(text, tmp_path)
    for path, value in expected.items():
        found = _value(recipe, path)
        if path.endswith("source"):
            found = found.removeprefix("some/")
        if path == "eval.hold_out" and isinstance(value, str) and value.endswith(".jsonl"):
            found = str(Path(found).relative_to(tmp_path.resolve()))
        if path == "output":
            found = found.removeprefix(f"{Path.cwd()}/")
        assert found == value, path


@pytest.mark.parametrize("name", sorted(LOST))
def test_what_is_left_out_is_named_with_its_line(name: str, corpus: Path) -> None:
    path = corpus / "data" / "recipes" / name
    problems = import_recipe(path).problems
    assert {problem.key for problem in problems} >= LOST[name]
    lines = path.read_text().splitlines()
    for problem in problems:
        if problem.line is not None and problem.key:
            assert problem.key.rpartition(".")[2] in lines[problem.line - 1]


@pytest.mark.parametrize("name", REAL)
def test_every_setting_is_carried_over_or_named(name: str, corpus: Path) -> None:
    """Nothing silent: a setting that has no rule and is switched on stands in a line."""
    path = corpus / "data" / "recipes" / name
    imported = import_recipe(path)
    named = {(problem.key or "").rpartition(".")[2] for problem in imported.problems}
    for line in path.read_text().splitlines():
        key, colon, value = line.partition(":")
        value = value.partition(" #")[0].strip().strip("'\"")
        off = value in ("", "false", "False", "null", "none", "0", "no", "[]", "0.0")
        if colon and not line.startswith((" ", "#", "-")) and not off and "." not in key:
            assert key in named or key.lower() in RULES or f"{key}: " in imported.text, key


def test_the_verb_writes_a_recipe_that_checks(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    source = str(corpus / "data" / "recipes" / "axolotl" / "qlora-1b.yaml")
    out = tmp_path / "mine.yaml"
    assert main(["recipe", "import", source, "--output", str(out)]) == 0
    assert main(["recipe", "check", str(out)]) == 0
    assert "special_tokens" in capsys.readouterr().err
    before = out.read_text()
    assert main(["recipe", "import", source, "--output", str(out)]) == 2 and out.read_text() == before
    assert main(["recipe", "import", source, "--json"]) == 0
    capsys.readouterr()
    assert main(["recipe", "import", source]) == 0
    assert capsys.readouterr().out == before


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no settings"),
        ("- a\n- b\n", "holds no settings"),
        ("colour: blue\n", "is the configuration of no tool"),
        ("base_model: a\nbase_model: b\n", "twice"),
        ("base_model: !!python/object:os.system x\n", "tag"),
        ("base_model: [a\n", "x.yaml:"),
    ],
)
def test_what_is_no_configuration_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(RecipeError, match=reason):
        import_recipe(tmp_path / "x.yaml")


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 10**6), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8), st.lists(st.one_of(
        st.text(max_size=5), st.dictionaries(st.sampled_from(["path", "type", "weight", "x"]), st.integers()),
    )),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted({rule.rpartition(".")[2] for rule in RULES})), VALUES, max_size=12))
def test_any_values_give_a_recipe_text_and_no_fault(tmp_path_factory: Any, content: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("any") / "x.yaml"
    path.write_text(json.dumps({**content, "base_model": "org/base"}))
    imported = import_recipe(path)
    assert "base:" in imported.text and "data:" in imported.text


def test_rules_never_raise_on_a_list() -> None:
    for name, rule in RULES.items():
        try:
            rule(Draft("axolotl"), ["a", 1])
        except (TypeError, ValueError):
            continue  # said as "is no value for this key"
        except Exception as error:  # anything else would reach the user as a fault
            pytest.fail(f"{name}: {error!r}")

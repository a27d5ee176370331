"""The recipes in the repository: each loads, checks, fits the committed schema and says only what is so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lora_tune.cli import main
from lora_tune.data.checking import read_conversations
from lora_tune.model.memory import plan_memory
from lora_tune.recipe import Recipe
from lora_tune.recipe_file import read_recipe, recipe_as_yaml
from lora_tune.recipes import schema_text
from lora_tune.yaml_tree import parse

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
SCHEMA_LINE = "# yaml-language-server: $schema=recipe.schema.json\n"
each = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def plain(path: Path) -> dict[str, Any]:
    """A recipe as dictionaries and lists."""
    tree, found = parse(path.read_text(encoding="utf-8"), origin=path.name)
    assert tree is not None and not found
    return dict(tree.plain())


def test_all_are_here() -> None:
    names = {path.stem for path in RECIPES}
    assert names >= {"quickstart", "alpaca", "alpaca_8gb", "chat", "tools", "my_data"}


@each
def test_it_loads_and_checks_without_a_warning(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "check", str(path), "--json"]) == 0
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [problem for problem in problems if problem["severity"] != "note"] == []


@each
def test_it_names_its_schema_and_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith(SCHEMA_LINE)
    header = re.match(r"(#.*\n)+", text)
    assert header is not None and len(header[0]) > len(SCHEMA_LINE) + 40


@each
def test_it_survives_its_canonical_form(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path).recipe
    (tmp_path / "again.yaml").write_text(recipe_as_yaml(recipe), encoding="utf-8")
    assert read_recipe(tmp_path / "again.yaml").recipe == recipe


def test_no_two_write_to_the_same_folder() -> None:
    outputs = [read_recipe(path).recipe.output for path in RECIPES]
    assert len(set(outputs)) == len(outputs)


def test_the_schema_is_not_stale() -> None:
    committed = (FOLDER / "recipe.schema.json").read_text(encoding="utf-8")
    assert committed == schema_text(), "run: lora-tune recipe schema > recipes/recipe.schema.json"


@each
def test_it_validates_against_the_schema(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((FOLDER / "recipe.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(plain(path), schema, cls=jsonschema.Draft202012Validator)


def test_the_schema_refuses_what_the_models_refuse() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(schema_text())
    good = plain(FOLDER / "alpaca.yaml")
    for section, key, value in (
        ("train", "lerning_rate", 1),
        ("train", "learning_rate", 0),
        ("lora", "rank", "16"),
        ("base", "quantize", "nf5"),
        ("eval", "hold_out", -1),
        ("limits", "lost_tokens", "many"),
    ):
        bad = {**good, section: {**good.get(section, {}), key: value}}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)
        with pytest.raises(ValueError, match=key):
            Recipe.model_validate(bad)


def test_the_example_rows_of_my_data_are_read() -> None:
    recipe = read_recipe(FOLDER / "my_data.yaml").recipe
    rows = read_conversations(recipe.data, hold_out=recipe.eval.hold_out, seed=recipe.seed)
    lines = (FOLDER / "my_data.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows.train) + len(rows.held_out) == len(lines) == 24
    assert len(rows.held_out) > 0


@pytest.mark.parametrize(
    ("name", "config", "free_gib", "micro", "peak_gib"),
    [
        ("alpaca", "qwen2_h3584_l28_Qwen2.5-7B", 22.5, 1, 14.0),
        ("alpaca", "qwen2_h3584_l28_Qwen2.5-7B", 11.2, 1, 10.0),
        ("chat", "qwen2_h3584_l28_Qwen2.5-7B", 15, 1, 13.5),
        ("tools", "qwen2_h3584_l28_Qwen2.5-7B", 22.5, 1, 14.0),
        ("alpaca_8gb", "mistral_h4096_l32_Mistral-7B-Instruct-v0.3", 7, 1, 6.3),
    ],
)
def test_the_memory_that_a_header_states_is_what_is_planned(
    name: str, config: str, free_gib: float, micro: int, peak_gib: float, corpus: Path
) -> None:
    path = FOLDER / f"{name}.yaml"
    recipe = read_recipe(path).recipe
    shape = json.loads((corpus / "data" / "configs" / config / "config.json").read_text())
    plan = plan_memory(
        shape, base=recipe.base, lora=recipe.lora, train=recipe.train, budget_gib=free_gib, device="cuda"
    )
    assert plan.micro_batch_size == micro and plan.peak_gib == pytest.approx(peak_gib, abs=0.06)
    assert f"{peak_gib} GiB" in path.read_text(encoding="utf-8")

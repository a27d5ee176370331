"""The recipe: every key has help and a default that is one, and every mistake a plain word at its place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from recipe_texts import SHORT, keys, leaves, put

from lora_tune.errors import RecipeError
from lora_tune.foreign_keys import ELSEWHERE, NOT_NEEDED, recipe_keys, unknown_key
from lora_tune.recipe import Recipe
from lora_tune.recipe_file import read_recipe
from lora_tune.recipe_problems import field_at
from lora_tune.recipe_values import share_of
from lora_tune.yaml_tree import parse

# --- the models -------------------------------------------------------------------------------------------------------


def test_every_key_has_help() -> None:
    without = [key for key in keys() if not (field_at(key) or pytest.fail(key)).description]
    assert without == []
    assert 50 <= len(leaves()) <= 80


def test_recipe_is_frozen() -> None:
    recipe = Recipe.model_validate(parse(SHORT, origin="x")[0].plain())  # type: ignore[union-attr]
    with pytest.raises(ValidationError):
        recipe.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("key", [key for key in leaves() if not field_at(key).is_required()])  # type: ignore[union-attr]
def test_writing_the_default_changes_nothing(key: str, recipe_from: Any) -> None:
    default = field_at(key).get_default()  # type: ignore[union-attr]
    text, _ = put(key, json.dumps(default))
    assert recipe_from(text).recipe == recipe_from(SHORT).recipe


@pytest.mark.parametrize("key", leaves())
def test_wrong_type_is_named_with_line_and_what_to_do(key: str, problems_in: Any) -> None:
    text, line = put(key, "[[1]]")
    found = [problem for problem in problems_in(text) if problem.key and problem.key.startswith(key)]
    assert found, "the key itself is not named"
    assert {problem.line for problem in found} == {line}
    for problem in found:
        assert problem.column and problem.fix and re.search(r"must .*, got ", problem.reason), str(problem)


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_shares(percent_hundredths: int, total: int) -> None:
    share = f"{percent_hundredths / 100}%"
    assert share_of(total, 5) == total
    assert abs(share_of(share, total) - total * percent_hundredths / 10_000) <= 0.5 + 1e-9


def test_share_of_nonsense() -> None:
    with pytest.raises(ValueError, match="share"):
        share_of("many", 3)


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        ("eval: {hold_out: 0%, metrics: [loss]}", "eval.hold_out", "eval.metrics needs held-out rows"),
        ("eval: {hold_out: 0, every: 5}", "eval.hold_out", "eval.every needs held-out rows"),
        ("eval: {hold_out: 0.0%, every: 5, stop_after: 2}", "eval.hold_out", "eval.stop_after"),
        ("eval: {keep_best: true}", "eval.keep_best", "needs evaluations"),
        ("eval: {stop_after: 2}", "eval.stop_after", "needs evaluations"),
        ("train: {batch_size: 16, micro_batch_size: 5}", "train.micro_batch_size", "divide train.batch_size 16"),
        ("lora: {plus_ratio: 16}\ntrain: {optimizer: sgd}", "lora.plus_ratio", "AdamW"),
    ],
)
def test_values_that_are_wrong_together(text: str, key: str, says: str, problems_in: Any) -> None:
    found = [problem for problem in problems_in(SHORT + text) if says in problem.reason]
    assert [problem.key for problem in found] == [key]
    assert found[0].line is not None and found[0].fix


def test_a_table_needs_its_columns(problems_in: Any) -> None:
    (problem,) = problems_in(put("data.0.format", "table")[0])
    assert (problem.key, problem.line) == ("data.0.format", 4)
    assert "columns" in problem.fix


def test_metrics_in_force(recipe_from: Any) -> None:
    assert recipe_from(SHORT).recipe.metrics == ("loss",)
    assert recipe_from(SHORT + "eval: {hold_out: 0%}").recipe.metrics == ()
    assert recipe_from(SHORT + "eval: {metrics: [exact_match]}").recipe.metrics == ("exact_match",)


# --- what a message says ----------------------------------------------------------------------------------------------


def test_all_problems_in_one_pass_in_the_order_of_lines(problems_in: Any) -> None:
    text = (
        "base: {name: ./missing, quantize: nf5}\nlora_r: 8\ntrain:\n  epochs: '2'\n  packing: yes\n  epochs: 3\n"
        "data:\n  - {source: rows.jsonl, weight: 0}\n  - 5\nseed: -1\ntrack: [wandb, tensorbord]\n"
    )
    found = problems_in(text, "train.batch_size=x")
    assert [(problem.line, problem.key) for problem in found] == [
        (1, "base.name"),
        (1, "base.quantize"),
        (2, "lora_r"),
        (4, "train.epochs"),
        (5, "train.packing"),
        (6, "train.epochs"),
        (8, "data.0.source"),
        (8, "data.0.weight"),
        (9, "data.1"),
        (10, "seed"),
        (11, "track.1"),
        (None, "output"),
        (None, "train.batch_size"),
    ]
    said = "\n".join(map(str, found))
    for words in (
        "recipe.yaml:1:35: base.quantize: must be one of nf4, fp4, int8, none, got text 'nf5'; did you mean `nf4`?",
        "recipe.yaml:2:1: lora_r: unknown key, got 8; here it is `lora.rank`",
        "recipe.yaml:4:11: train.epochs: must be a number, got text '2'; drop the quotes",
        "write true (in YAML 1.2 `yes` is text)",
        "train.epochs: stands twice, first in line 4",
        "data.1: must be a section of keys, got 5",
        "got text 'tensorbord'; did you mean `tensorboard`?",
        "output: is missing; add `output:`",
        "override train.batch_size=x: train.batch_size: must be a whole number, got text 'x'",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("train.warmup", "0.03", "write 3%"),
        ("eval.hold_out", "0.2", "write 20%"),
        ("eval.hold_out", "100%", "below 100%"),
        ("limits.dropped_rows", "101%", "from 0% to 100%"),
        ("lora.targets", "'.*_proj'", "all-linear or a list"),
        ("lora.targets", "['.*_proj']", "regular expressions are not supported"),
        ("lora.targets", "[q_proj, q_proj]", "each module once"),
        ("lora.modules_to_save", "[a, a]", "each thing once"),
        ("lora.rank", "1025", "at most 1024"),
        ("lora.rank", "true", "must be a whole number, got true"),
        ("lora.dropout", "1", "must be below 1"),
        ("base.quantize", "false", "write none"),
        ("base.revision", "1234", "put it in quotes: '1234'"),
        ("base.name", "''", "must not be empty"),
        ("train", "5", "write its keys below it, indented"),
        ("data", "[]", "at least one source"),
        ("data", "{source: x}", "must be a list with at least one source"),
        ("data.0.columns", "{prompt: 1}", "put it in quotes: '1'"),
        ("data.0.columns", "[a]", "must be a mapping"),
        ("train.packing", "'true'", "drop the quotes"),
        ("train.batch_size", str(10**30), "must be below 2147483648"),
        ("train.max_length", "1", "nothing would be predicted"),
        ("train.gradient_checkpointing", "some", "auto, all, none or a number of layers"),
    ],
)
def test_words(key: str, value: str, says: str, problems_in: Any) -> None:
    text, line = put(key, value)
    found = problems_in(text)
    assert any(says in str(problem) for problem in found), "\n".join(map(str, found))
    assert {problem.line for problem in found} == {line}


def test_long_values_are_cut(problems_in: Any) -> None:
    (problem,) = problems_in(put("base.quantize", "x" * 5000)[0])
    assert len(problem.reason) < 200


# --- names of other tools ---------------------------------------------------------------------------------------------


def test_the_table_of_other_names_leads_to_keys_that_exist() -> None:
    assert len(ELSEWHERE) >= 40
    own = set(recipe_keys())
    names = {key.rpartition(".")[2] for key in own}
    for name, hint in ELSEWHERE.items():
        assert re.split(r"[: ]", hint)[0] in own, name
        assert name == name.lower() and name not in NOT_NEEDED
    assert not names & (set(ELSEWHERE) | set(NOT_NEEDED)), "a hint that no one would ever see"


@pytest.mark.parametrize("section", ["", "base.", "data.0.", "train."])
def test_other_names_get_their_hint_wherever_they_stand(section: str) -> None:
    for name, hint in ELSEWHERE.items():
        assert unknown_key(section + name)[1].startswith(f"here it is `{hint.split(' (')[0]}`")
    for name, why in NOT_NEEDED.items():
        assert unknown_key(section + name)[1] == f"not needed: {why}"


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("learning_rate", "here it is `train.learning_rate`"),
        ("train.rank", "here it is `lora.rank`"),
        ("max_rows", "here it is `data[].max_rows` or `eval.max_rows`"),
        ("train.lerning_rate", "did you mean `learning_rate`?"),
        ("lora.Rank", "here it is `lora.rank`"),
        ("trian", "did you mean `train`?"),
        ("data.0.sourc", "did you mean `source`?"),
        ("gradient_acumulation_steps", "did you mean `train.batch_size` ("),
        ("limits.zzz", "remove it; the keys here are dropped_rows, lost_tokens, lost_end_tokens, duplicates"),
    ],
)
def test_nearest_names(key: str, fix: str) -> None:
    assert unknown_key(key)[1].startswith(fix)


def test_recipes_of_other_tools_are_answered_with_hints(corpus: Path) -> None:
    files = sorted((corpus / "data" / "recipes").rglob("*.yaml"))
    assert len(files) >= 15
    hinted = total = 0
    for file in files:
        with pytest.raises(RecipeError) as caught:
            read_recipe(file)
        unknown = [problem for problem in caught.value.problems if problem.reason.startswith("unknown key")]
        assert all(problem.line for problem in unknown), file
        total += len(unknown)
        hinted += sum(not problem.fix.startswith("remove it") for problem in unknown)
    assert hinted / total >= 0.8, f"{hinted} of {total} keys get a hint"

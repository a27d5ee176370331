"""The recipe's file: YAML 1.2 that cannot expand or run, overrides, paths, places, and back to YAML."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_texts import SHORT, put

from lora_tune.errors import Problem, RecipeError, UsageError
from lora_tune.recipe import Recipe
from lora_tune.recipe_file import read_recipe, recipe_as_yaml
from lora_tune.yaml_tree import MAX_DEPTH, MAX_EVENTS, parse, scalar

# --- YAML 1.2, and what is refused in it ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4), ("1.", 1.0), (".5", 0.5), ("+3", 3), ("-7", -7), ("0o17", 15), ("0xff", 255), ("010", 10),
        ("true", True), ("False", False), ("yes", "yes"), ("no", "no"), ("on", "on"), ("null", None), ("~", None),
        ("", None), ("1_000", "1_000"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("2%", "2%"),
        ("-.inf", float("-inf")), ("1e400", float("inf")), ("9" * 401, float("inf")),
    ],
)  # fmt: skip
def test_scalars_of_the_core_schema(text: str, value: Any) -> None:
    assert scalar(text) == value and type(scalar(text)) is type(value)


def test_nan_is_a_number() -> None:
    assert isinstance(scalar(".nan"), float)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: [1, 2\nb: 3\n", 1, "bracket [ is never closed"),
        ("a: {x: 1\n", 1, "bracket { is never closed"),
        ("a: 'x\nb: 'y'\n", 1, "quote opened here runs on to line 2"),
        ('a: 1\nb: "x\n\n\nc: 3\n', 2, "quote opened here is never closed"),
        ("a: b: c\n", 1, "a key where none can stand"),
        ("a: 1\n  b: 2\n", 2, "a key where none can stand"),
        ("a: 1\nb\n", 2, "expected `key: value`, got 'b'"),
        ("a: @x\n", 1, "cannot begin with @"),
        ("a:\n\tb: 1\n", 2, "tab used as indentation"),
        ("a: 1\n \tb: 1\n", 2, "tab used as indentation"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("? [a]\n: 3\n", 1, "a key must be text"),
        ("a: \x07\n", 1, "control character, got \\x07"),
        ("a: 1\nb: \x00\n", 2, "control character"),
        ("a: \x85b\n", None, ""),
    ],
)  # fmt: skip
def test_broken_yaml_names_the_place_of_the_mistake(text: str, line: int | None, says: str) -> None:
    try:
        parse(text, origin="r.yaml")
    except RecipeError as error:
        assert error.problems[-1].line == line and says in error.problems[-1].reason, str(error)
        assert error.problems[-1].fix
    else:
        assert line is None


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab:{}[]'\"&*!|>-?#%@, \n\t0"), max_size=40))
def test_any_text_is_a_tree_or_a_refusal(text: str) -> None:
    try:
        tree, found = parse(text, origin="r.yaml")
    except RecipeError as error:
        assert error.problems
        return
    assert all(problem.line for problem in found)
    if tree is not None:
        json.dumps(tree.plain(), default=str)


def test_nothing_expands(problems_in: Any) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    started = time.process_time()
    found = problems_in(SHORT + bomb)
    assert time.process_time() - started < 1
    assert [problem.line for problem in found] == list(range(5, 65))


HOSTILE = """
import sys, time
from pathlib import Path
from lora_tune.errors import LoraTuneError
from lora_tune.recipe_file import MAX_BYTES, read_recipe
for text in (
    "a: " + "[" * 50_000,
    "a: " + "{b: " * 30_000,
    "- " * 100_000,
    "a: [" + "1," * 100_000 + "]",
    "\\n".join(f"k{n}: 1" for n in range(20_000)),
    "# comment\\n" * 25_000,
    "a: " + "x " * 120_000,
    "x" * (MAX_BYTES + 1),
    '"' + "a" * 200_000,
    "a: " + "9" * 200_000,
):
    Path("recipe.yaml").write_text(text)
    started = time.process_time()
    try:
        read_recipe(Path("recipe.yaml"))
    except LoraTuneError:
        print(time.process_time() - started)
"""


def test_hostile_sizes_are_judged_within_a_second(tmp_path: Path) -> None:
    """In a process of its own, where no coverage is measured."""
    done = subprocess.run([sys.executable, "-c", HOSTILE], cwd=tmp_path, capture_output=True, text=True, check=True)
    seconds = [float(line) for line in done.stdout.splitlines()]
    assert len(seconds) == 10 and max(seconds) < 1, seconds


def test_limits_of_depth_and_number(recipe_from: Any) -> None:
    with pytest.raises(RecipeError, match="levels deep"):
        recipe_from("a: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))
    with pytest.raises(RecipeError, match=f"more than {MAX_EVENTS} values"):
        recipe_from("a: [" + "1," * MAX_EVENTS + "]")


def test_byte_order_mark_and_windows_lines(recipe_from: Any, problems_in: Any) -> None:
    text = "\ufeff" + (SHORT + "seed: 7\n").replace("\n", "\r\n")
    assert recipe_from(text).recipe.seed == 7
    (problem,) = problems_in(text.replace("7", "x"))
    assert (problem.line, problem.column) == (5, 7)


@pytest.mark.parametrize(
    ("content", "byte", "line"), [(b"\xff\xfea\x00", "0xff", 1), (b"a: 1\nb: caf\xe9\n", "0xe9", 2)]
)
def test_not_utf8_names_the_byte(content: bytes, byte: str, line: int, problems_in: Any) -> None:
    (problem,) = problems_in(content)
    assert byte in problem.reason and problem.line == line


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing.yaml", ".", "pipe"):
        with pytest.raises(UsageError, match=r"no such file|is not a file"):
            read_recipe(tmp_path / name)


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides(recipe_from: Any) -> None:
    recipe = recipe_from(
        SHORT,
        "train.epochs=2",
        "train.learning_rate=1e-5",
        "data.0.source=other/rows",
        "lora.targets=[q_proj, v_proj]",
        "lora.rank_pattern.q_proj=4",
        "base.revision='007'",
        "seed=3",
    ).recipe
    assert (recipe.train.epochs, recipe.train.learning_rate, recipe.seed) == (2, 1e-5, 3)
    assert recipe.data[0].source == "other/rows"
    assert recipe.lora.targets == ("q_proj", "v_proj") and recipe.lora.rank_pattern == {"q_proj": 4}
    assert recipe.base.revision == "007"


@pytest.mark.parametrize("override", ["train.epochs", "=2", "train.=2", ".epochs=2", "train epochs=2", "a..b=1"])
def test_overrides_without_a_form(override: str, recipe_from: Any) -> None:
    with pytest.raises(UsageError, match=r"section\.key=value"):
        recipe_from(SHORT, override)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.epochs=x", "override train.epochs=x: train.epochs: must be a number, got text 'x'"),
        ("train.epoch=2", "override train.epoch=2: train.epoch: unknown key, got 2; did you mean `epochs`?"),
        ("data.1.source=x", "override data.1.source=x: data has 1 entry, number 0, got '1'"),
        ("data.x.source=x", "data has 1 entry, number 0, got 'x'"),
        ("output.x=1", "output is a single value and has no key 'x'"),
        ("train.epochs=[1", "override train.epochs=[1: the bracket [ is never closed"),
        ("seed=&a 1", "seed: must be a whole number, got text '&a 1'"),
        ("lora.targets=[&a q_proj]", "anchors are not allowed"),
        ("base.name=./nowhere", "override base.name=./nowhere: base.name: no such folder, got './nowhere'"),
        ("data.0.source=nowhere.jsonl", "data.0.source: no such file or folder, got 'nowhere.jsonl'"),
    ],
)
def test_wrong_overrides_say_where(override: str, says: str, problems_in: Any) -> None:
    found = problems_in(SHORT, override)
    assert any(says in str(problem) for problem in found), found
    assert all(problem.line is None for problem in found)


def test_an_override_twice(problems_in: Any) -> None:
    (problem,) = problems_in(SHORT, "seed=1", "seed=2")
    assert "twice" in problem.reason


def test_an_override_replaces_what_was_wrong(recipe_from: Any) -> None:
    assert recipe_from(put("train.epochs", "nonsense")[0], "train.epochs=2").recipe.train.epochs == 2


# --- paths ------------------------------------------------------------------------------------------------------------


def test_paths_start_at_the_recipe_and_overrides_at_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    for folder in (there, here):
        (folder / "base").mkdir(parents=True)
        for name in ("rows.jsonl", "template.jinja", "held.jsonl"):
            (folder / name).write_text("{}\n")
    monkeypatch.chdir(here)
    recipe = there / "recipe.yaml"
    recipe.write_text(
        "base: {name: ./base, chat_template: template.jinja}\n"
        "data:\n  - {source: rows.jsonl}\n  - {source: '*.jsonl'}\n"
        "lora: {start_from: ./base}\neval: {hold_out: held.jsonl}\noutput: out\n"
    )
    found = read_recipe(recipe).recipe
    assert found.base.name == str(there / "base") and found.base.chat_template == str(there / "template.jinja")
    assert [source.source for source in found.data] == [str(there / "rows.jsonl"), str(there / "*.jsonl")]
    assert found.lora.start_from == str(there / "base") and found.eval.hold_out == str(there / "held.jsonl")
    assert found.output == "out"
    overrides = ["base.name=base", "data.0.source=*.jsonl", "eval.hold_out=./held.jsonl"]
    changed = read_recipe(recipe, overrides=overrides).recipe
    assert changed.base.name == str(here / "base") and changed.data[0].source == str(here / "*.jsonl")
    assert changed.eval.hold_out == str(here / "held.jsonl") and changed.data[1].source == str(there / "*.jsonl")


def test_names_on_the_hub_stay(recipe_from: Any) -> None:
    recipe = recipe_from(SHORT, "base.name=builtin:quickstart").recipe
    assert (recipe.base.name, recipe.data[0].source) == ("builtin:quickstart", "some/rows")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("base.name", "./rows.jsonl", "is a file, not a folder"),
        ("base.chat_template", ".", "is a folder, not a file"),
        ("base.name", "./org/name", "written without ./, such as org/name"),
        ("data.0.source", "'*.csv'", "no file matches"),
        ("data.0.source", "rows.jsonl.gz", "no such file"),
        ("eval.hold_out", "two percent", "write a share such as 2%"),
        ("lora.start_from", "./no", "no such folder"),
        ("output", "rows.jsonl", "is a file"),
        ("output", "rows.jsonl/x/y", "cannot be created: rows.jsonl is a file"),
        ("output", ".", "is the working folder"),
    ],
)
def test_paths_that_cannot_be(key: str, value: str, says: str, tmp_path: Path, problems_in: Any) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    text, line = put(key, value)
    (problem,) = problems_in(text)
    assert says in str(problem) and (problem.line, problem.key) == (line, key) and problem.fix


def test_the_output_may_not_be_what_is_read(tmp_path: Path, problems_in: Any) -> None:
    (tmp_path / "base").mkdir()
    (problem,) = problems_in(SHORT.replace("some/base", "./base").replace("out\n", "base\n"))
    assert "folder that this recipe reads" in problem.reason


def test_a_path_from_the_working_folder_in_a_recipe_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "recipes" / "r.yaml").write_text(SHORT.replace("some/rows", "rows.jsonl"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"relative to its own folder: write \.\./rows\.jsonl"):
        read_recipe(Path("recipes/r.yaml"))


def test_warnings(tmp_path: Path, recipe_from: Any) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    file = recipe_from(put("data.0.split", "test")[0].replace("some/rows", "rows.jsonl").replace("out\n", "../away\n"))
    assert [(warning.key, warning.line, warning.severity) for warning in file.warnings] == [
        ("data.0.split", 4, "warning"),
        ("output", 2, "warning"),
    ]


# --- places, and back to YAML -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "line", "column"),
    [
        ("base.name", 1, 14), ("data.0.source", 3, 14), ("data.0", 3, 5), ("output", 4, 9), ("base", 1, 1),
        ("base.revision", 1, 1), ("train.max_length", None, None), ("data.7.source", 2, 1),
    ],
)  # fmt: skip
def test_locate(key: str, line: int | None, column: int | None, recipe_from: Any) -> None:
    problem = recipe_from(SHORT).locate(Problem("something", key=key))
    assert (problem.file, problem.line, problem.column) == ("recipe.yaml", line, column)


def test_locate_in_an_override_and_in_a_name_with_dots(recipe_from: Any) -> None:
    file = recipe_from(SHORT + "lora:\n  rank_pattern: {layers.0.q_proj: 4}\n", "train.max_length=9")
    assert file.locate(Problem("x", key="train.max_length")).file == "override train.max_length=9"
    assert file.locate(Problem("x", key="lora.rank_pattern.layers.0.q_proj")).line == 6
    assert file.locate(Problem("x", file="other", key="seed")).file == "other"


_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
_odd = ["yes", "2e-4", "null", "~", "a: b", "- x", "# no", "*.x", "'q'", '"', "0x1f", "é\u2028\x85", "\x7f", "{a}"]
_words = st.sampled_from(_odd)


@settings(max_examples=100, deadline=None)
@given(
    name=_words | _text,
    number=st.floats(1e-12, 1e12),
    names=st.lists(_words | _text, unique=True, max_size=4),
    pattern=st.dictionaries(_words | _text, st.integers(1, 1024), max_size=3),
    held=st.sampled_from([0, 7, "2%", "0.5 %"]),
    weight=st.floats(1e-3, 10),
)
def test_a_recipe_survives_its_yaml(
    name: str, number: float, names: list[str], pattern: dict[str, int], held: int | str, weight: float
) -> None:
    recipe = Recipe.model_validate(
        {
            "base": {"name": name, "revision": name},
            "data": [{"source": name, "columns": {name: name}}, {"source": "x/y", "weight": weight, "pack": False}],
            "lora": {"alpha": number, "new_tokens": names, "rank_pattern": pattern, "targets": ["q_proj"]},
            "train": {"learning_rate": number, "micro_batch_size": 2},
            "eval": {"hold_out": held},
            "output": name,
        }
    )
    tree, found = parse(recipe_as_yaml(recipe), origin="stored")
    assert not found and tree is not None
    assert Recipe.model_validate(tree.plain()) == recipe

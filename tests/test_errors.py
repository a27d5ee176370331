"""Errors: one line each, one exit code for each kind, and they travel between processes."""

from __future__ import annotations

import json
import pickle

import pytest

from lora_tune import errors
from lora_tune.errors import (
    CheckFailed,
    DataError,
    Interrupted,
    LoraTuneError,
    Problem,
    RecipeError,
    ResourceError,
    UsageError,
)


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem("bad"), "bad"),
        (Problem("bad", "mend it"), "bad; mend it"),
        (Problem("bad", file="f"), "f: bad"),
        (Problem("bad", "mend", "f", 3), "f:3: bad; mend"),
        (Problem("bad", "mend", "f", 3, 7, "a.b"), "f:3:7: a.b: bad; mend"),
        (Problem("bad", key="a.b"), "a.b: bad"),
    ],
)
def test_a_problem_is_one_line(problem: Problem, text: str) -> None:
    assert str(problem) == text
    assert Problem(**json.loads(json.dumps(problem.as_json()))) == problem


@pytest.mark.parametrize(
    ("kind", "code"),
    [(LoraTuneError, 1), (CheckFailed, 1), (UsageError, 2), (RecipeError, 2), (DataError, 3), (ResourceError, 4)],
)
def test_exit_codes_and_pickling(kind: type[LoraTuneError], code: int) -> None:
    error = kind([Problem("one", file="f", line=1), Problem("two")])
    assert error.exit_code == code
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and again.problems == error.problems and str(again) == "f:1: one\ntwo"


def test_every_kind_is_tested_here() -> None:
    classes = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    kinds = {name for name, value in classes.items() if issubclass(value, LoraTuneError)}
    assert kinds == {
        "LoraTuneError", "CheckFailed", "UsageError", "RecipeError", "DataError", "ResourceError", "Interrupted",
    }  # fmt: skip


def test_a_signal() -> None:
    error = pickle.loads(pickle.dumps(Interrupted(15, "stopped")))
    assert (error.exit_code, error.signal_number, str(error)) == (143, 15, "stopped")


@pytest.mark.parametrize(("count", "lines"), [(1, 1), (20, 20), (21, 21), (500, 21)])
def test_twenty_in_full(count: int, lines: int) -> None:
    error = DataError([Problem(f"row {number}") for number in range(count)])
    assert len(str(error).splitlines()) == lines and len(error.problems) == count
    assert ("more" in str(error)) == (count > 20)

"""Steps that need each other: their order, what is skipped, what ends the journey; processes with their logs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_tune.errors import CheckFailed, DataError, Problem
from lora_tune.training.journey import Outcome, Processes, Step, Tolerable, travel


def good() -> str:
    """A step that goes well."""
    return "well"


def failing() -> str:
    """A step that fails."""
    raise CheckFailed(Problem("went wrong", "look", file="the.log"))


def odd() -> str:
    """A step with something to know."""
    raise Tolerable("does not fit here")


def take(*steps: Step, at_once: int = 2) -> dict[str, Outcome]:
    """The outcomes by name; every one was reported once."""
    reported: list[Outcome] = []
    left: list[str] = []
    outcomes = travel(steps, at_once=at_once, report=reported.append, leave=lambda: left.append("left"))
    assert sorted(reported, key=lambda one: one.name) == sorted(outcomes, key=lambda one: one.name)
    assert [one.name for one in outcomes] == [step.name for step in steps] and left == ["left"]
    return {one.name: one for one in outcomes}


def test_what_needs_a_failed_step_is_skipped_and_the_rest_goes_on() -> None:
    found = take(
        Step("a", (), failing), Step("b", ("a",), good), Step("c", ("b",), good), Step("d", (), good),
        Step("e", ("d",), good), Step("f", (), odd), Step("g", ("f",), good), Step("h", (), None, absent="not yet"),
        Step("i", ("h",), good),
    )  # fmt: skip
    states = {name: one.state for name, one in found.items()}
    assert states == {
        "a": "failed", "b": "skipped", "c": "skipped", "d": "ok", "e": "ok", "f": "warning", "g": "ok", "h": "absent",
        "i": "skipped",
    }  # fmt: skip
    assert (found["a"].said, found["a"].log) == ("went wrong; look", "the.log")
    assert found["b"].said == "needs a" and found["h"].said == "not yet" and found["f"].said == "does not fit here"


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_as_many_steps_at_a_time_as_asked_and_never_before_their_needs(at_once: int) -> None:
    lock, running, most, order = threading.Lock(), 0, 0, []

    def step(name: str) -> Callable[[], str]:
        def work() -> str:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.02)
            with lock:
                running -= 1
                order.append(name)
            return ""

        return work

    needs = {"a": (), "b": (), "c": (), "d": ("a", "b"), "e": ("d",)}
    take(*(Step(name, need, step(name)) for name, need in needs.items()), at_once=at_once)
    assert most == at_once
    assert all(order.index(before) < order.index(name) for name, need in needs.items() for before in need)


def test_an_error_of_another_kind_ends_the_journey() -> None:
    def refused() -> str:
        raise DataError("rows.jsonl:3: not JSON")

    taken: list[str] = []
    left: list[str] = []

    def after() -> str:
        taken.append("after")
        return ""

    reported: list[Outcome] = []
    with pytest.raises(DataError, match="not JSON"):
        travel(
            [Step("a", (), refused), Step("b", ("a",), after)],
            at_once=2,
            report=reported.append,
            leave=lambda: left.append("left"),
        )
    assert taken == [] and left == ["left"]
    assert [(one.name, one.state, one.said) for one in reported] == [("a", "failed", "rows.jsonl:3: not JSON")]


def test_a_process_answers_fails_or_is_tolerated(tmp_path: Path) -> None:
    processes = Processes(tmp_path, {"PYTHONIOENCODING": "utf-8"})
    (tmp_path / "recipe.yaml").write_text("base: {name: builtin:quickstart}\n")
    schema = processes.run("list", ["adapters", "list", "."])
    assert schema["adapters"] == []
    with pytest.raises(CheckFailed) as caught:
        processes.run("check", ["recipe", "check", "recipe.yaml"])
    (problem,) = caught.value.problems
    assert "data" in problem.reason and problem.file == str(tmp_path / "logs" / "check.log")
    assert (tmp_path / "logs" / "check.log").read_text().startswith("lora-tune recipe check recipe.yaml --json\n")
    with pytest.raises(Tolerable, match="data"):
        processes.run("again", ["recipe", "check", "recipe.yaml"], tolerated=(2,))


def test_a_process_without_an_answer_is_told_by_its_last_words(tmp_path: Path) -> None:
    processes = Processes(tmp_path, {"PYTHONPATH": str(tmp_path)})
    (tmp_path / "lora_tune").mkdir()
    (tmp_path / "lora_tune" / "__init__.py").touch()
    (tmp_path / "lora_tune" / "__main__.py").write_text("raise SystemExit('no room in the inn')")
    with pytest.raises(CheckFailed, match="ended with exit code 1: no room in the inn"):
        processes.run("odd", ["run"])


def test_leaving_ends_what_still_runs(tmp_path: Path) -> None:
    processes = Processes(tmp_path, {"PYTHONPATH": str(tmp_path)})
    (tmp_path / "lora_tune").mkdir()
    (tmp_path / "lora_tune" / "__init__.py").touch()
    (tmp_path / "lora_tune" / "__main__.py").write_text("import time; time.sleep(60)")
    started = processes.start("slow", ["run"])
    assert started.poll() is None
    processes.close()
    assert started.poll() is not None

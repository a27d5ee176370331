"""`lora-tune eval` on a real finished run: the numbers of the run again, bounds, other rows, and everything that is
refused before the base is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import warm

from lora_tune.adapter.folder import read_manifest
from lora_tune.cli import main
from lora_tune.evaluation.bounds import Bound, read_bounds
from lora_tune.evaluation.scores import Score
from lora_tune.recipe_file import read_recipe
from lora_tune.run import run

RECIPE = """\
base: {name: base, quantize: none, compute_dtype: float32}
data: [{source: rows.jsonl, format: messages}]
lora: {rank: 4, alpha: 8}
train: {max_steps: 4, batch_size: 4, micro_batch_size: 2, max_length: 128, learning_rate: 1e-2}
eval: {hold_out: 6, every: 2, metrics: [loss, rouge_l, stop_rate, chrf], samples: 2}
output: out
"""


def turns(question: str, answer: str) -> str:
    row = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": row}) + "\n"


def sums(start: int, count: int) -> str:
    numbers = range(start, start + count)
    return "".join(turns(f"What is {number} and {number + 2}?", f"It is {2 * number + 2}.") for number in numbers)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with a recipe and its finished run, and a second run with a held-out file."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "base").symlink_to(tiny_base)
    (folder / "rows.jsonl").write_text(sums(0, 30))
    (folder / "apart.jsonl").write_text(sums(100, 5))
    (folder / "other.jsonl").write_text(sums(200, 4))
    (folder / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("subprocess.run", warm.instead)
        for changes in (
            [],
            ["output=file", "eval.hold_out=apart.jsonl", "eval.every=null"],
        ):
            run(read_recipe(Path("recipe.yaml"), overrides=changes), preflight="off")
    return folder


Call = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def call(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`lora-tune eval … --json` in that folder: exit code, object, stderr."""
    monkeypatch.chdir(place)

    def calling(*arguments: str) -> tuple[int, dict[str, Any], str]:
        code = main(["eval", *arguments, "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out), said.err

    return calling


def same(found: dict[str, Any], folder: Path) -> None:
    """Whether the numbers are those of the manifest."""
    recorded = read_manifest(folder).scores
    assert set(found) == set(recorded)
    for name, score in recorded.items():
        assert found[name] == pytest.approx({**score.model_dump(), "difference": score.adapter - score.base}, abs=1e-9)


@pytest.mark.parametrize("target", ["out", "recipe.yaml"])
def test_the_numbers_of_a_run_are_made_again(call: Call, place: Path, target: str) -> None:
    code, found, _ = call(target, *(["--base", "base"] if target == "out" else []))
    assert code == 0 and set(found) == {"exit_code", "rows", "metrics", "tasks", "problems"}
    assert found["rows"] == 6 and found["tasks"] == {} and found["problems"] == []
    issue = {"base", "adapter", "difference", "low", "high", "p_value", "direction"}
    assert all(issue <= set(score) for score in found["metrics"].values())
    same(found["metrics"], place / "out")


def test_evaluations_at_intervals_measure_what_the_end_measures(place: Path) -> None:
    lines = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    at_intervals = [line["eval"] for line in lines if "eval" in line]
    assert len(at_intervals) == 2 and set(at_intervals[0]) >= {"loss", "rouge_l", "stop_rate", "chrf"}
    final = read_manifest(place / "out").scores
    assert all(at_intervals[1][name] == pytest.approx(score.adapter, abs=1e-6) for name, score in final.items())


def test_held_out_rows_of_a_file_are_found_again_by_their_content(call: Call, place: Path, tmp_path: Path) -> None:
    code, found, _ = call("file", "--base", "base")
    assert code == 0 and found["rows"] == 5
    same(found["metrics"], place / "file")
    moved = shutil.copy(place / "apart.jsonl", tmp_path / "renamed.jsonl")
    code, again, _ = call("file", "--base", "base", "--data", str(moved))
    assert code == 0 and again == found
    code, found, _ = call("file", "--base", "base", "--data", "rows.jsonl")
    assert code == 3 and "was trained on" in found["problems"][0]["reason"]


def test_data_that_moved_is_named_and_data_that_changed_is_refused(
    call: Call, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(sums(0, 29))  # the right name and another content
    folder, base = str(place / "out"), str(place / "base")
    code, found, _ = call(folder, "--base", base)
    assert (
        code == 2 and "rows.jsonl (sha256" in found["problems"][0]["reason"] and "--data" in found["problems"][0]["fix"]
    )
    code, found, _ = call(folder, "--base", base, "--data", str(place / "rows.jsonl"))
    assert code == 0
    same(found["metrics"], place / "out")
    for name in ("base", "out"):
        (tmp_path / name).symlink_to(place / name)
    shutil.copy(place / "recipe.yaml", tmp_path)
    code, found, _ = call("recipe.yaml")
    assert code == 3 and "not what the adapter was trained with" in found["problems"][0]["reason"]


def test_other_rows_are_evaluated_whole(call: Call) -> None:
    code, found, _ = call(
        "out", "--base", "base", "--data", "other.jsonl", "--metrics", "loss,exact_match", "eval.max_rows=3"
    )
    assert code == 0 and set(found["metrics"]) == {"loss", "exact_match"}
    assert found["metrics"]["loss"]["rows"] == 3
    code, found, _ = call("out", "--base", "base", "--data", "other.jsonl", "--data", "rows.jsonl")
    assert code == 2 and "rows.jsonl was read by the training and other.jsonl was not" in found["problems"][0]["reason"]


def test_a_report_is_written_where_it_is_asked_for(call: Call, tmp_path: Path) -> None:
    arguments = ("out", "--base", "base", "--data", "other.jsonl", "--metrics", "rouge_l")
    assert call(*arguments, "--report", str(tmp_path / "new.html"))[0] == 0
    page = (tmp_path / "new.html").read_text()
    assert "rouge_l" in page and "What is 20" in page
    code, found, _ = call(*arguments, "--report", "out")
    assert code == 2 and "is no place for a file" in found["problems"][0]["reason"]


def test_bounds_end_with_1_and_keep_the_numbers(call: Call, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("out", "--base", "base", "--metrics", "loss,rouge_l")
    code, found, _ = call(*arguments, "--at-least", "loss=base", "--at-least", "rouge_l=0,loss=100")
    assert code == 0 and found["problems"] == []
    code, found, _ = call(*arguments, "--at-least", "loss=base-99", "--at-least", "rouge_l=2")
    assert code == 1 and set(found["metrics"]) == {"loss", "rouge_l"}
    reasons = [problem["reason"] for problem in found["problems"]]
    assert "measured against the base's, must be at most the base's" in reasons[0]
    assert reasons[1].startswith("rouge_l: the adapter's score must be at least 2, got")
    code, found, _ = call(*arguments, "--at-least", "rouge_x=1")
    assert code == 2 and "did you mean rouge_l?" in found["problems"][0]["fix"]
    assert main(["eval", *arguments, "--at-least", "rouge_l=2"]) == 1
    said = capsys.readouterr()
    assert "rouge_l ↑" in said.out and "must be at least 2" in said.err


@pytest.mark.parametrize(
    ("text", "bound"),
    [("rouge_l=0.4", ("rouge_l", 0.4, "", "")), ("loss=base", ("loss", 0, "base", "")),
     ("f1=base+.05", ("f1", 0.05, "base", "")), ("x=-1e-2", ("x", -0.01, "", "")),
     ("gsm8k:exact_match,strict=base-1", ("exact_match,strict", -1, "base", "gsm8k"))],
)  # fmt: skip
def test_bounds_are_read(text: str, bound: tuple[str, float, Literal["", "base"], str]) -> None:
    assert read_bounds([text]) == [Bound(*bound, text)]


def test_a_bound_asks_for_at_most_where_lower_is_better() -> None:
    scores = {"loss": Score(2.0, 1.5, -1, 0, 0.1, 9, "lower"), "f1": Score(0.5, 0.5, 0, 0, 1.0, 9, "higher")}
    held = ["loss=1.5", "loss=base", "f1=0.5", "f1=base", "t:f1=0.4"]
    missed = ["loss=1.4", "loss=base-0.6", "f1=base+0.1", "t:loss=1"]
    broken = [text for text in held + missed if read_bounds([text])[0].broken_by(scores, {"t": scores})]
    assert broken == missed


WRONG: list[tuple[tuple[str, ...], int, str]] = [
    (("out", "--metrics", "rouge_x"), 2, "no such metric, got 'rouge_x'; did you mean rouge_l?"),
    (("out", "--metrics", "tool_match,loss,accuracy"), 3, "tool_match does not fit the data: of 6 held-out rows none "),
    (("out", "--metrics", "json_valid"), 3, "json_valid does not fit the data"),
    (("out", "--at-least", "loss"), 2, "no bound, got 'loss'"),
    (("out", "--at-least", "loss=base0.1"), 2, "no bound, got 'loss=base0.1'"),
    (("out", "--data", "none.jsonl"), 2, "none.jsonl: --data: no such file or folder"),
    (("out", "--data", "other.jsonl", "--format", "alpacka"), 2, "no such format, got 'alpacka'"),
    (("out", "--data", "other.jsonl", "--format", "alpaca"), 3, "other.jsonl:1: "),
    (("out", "--data", "empty.jsonl"), 3, "empty.jsonl: no rows"),
    (("nowhere",), 2, "nowhere: no such folder or recipe"),
    (("base",), 2, "recipe.yaml: no such file"),
    (("recipe.yaml", "output=none"), 2, "none: the recipe has not been run"),
    (("out", "--tasks", "missing.yaml"), 2, "missing.yaml: --tasks: cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "line"), WRONG)
def test_what_is_wrong_is_said_in_one_line_before_the_base_is_loaded(
    place: Path,
    arguments: tuple[str, ...],
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--tasks" in arguments:
        pytest.importorskip("lm_eval")
    monkeypatch.chdir(place)
    (place / "empty.jsonl").write_text("")

    def load(*given: Any, **named: Any) -> None:
        raise AssertionError("the base is loaded")

    monkeypatch.setattr("lora_tune.model.base.load_base", load)
    base = ("--base", "base") if arguments[0] == "out" else ()
    assert main(["eval", *arguments, *base]) == code
    said = capsys.readouterr()
    assert said.out == "" and line in said.err and "Traceback" not in said.err
    rows = said.err.strip().splitlines()
    assert len(rows) == {"tool_match,loss,accuracy": 2, "alpaca": 4}.get(arguments[-1], 1), "one line for each fault"


def test_a_metric_that_does_not_fit_ends_a_run_before_it_loads(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    assert main(["run", "recipe.yaml", "output=never", "eval.metrics=[numeric_match, accuracy]"]) == 3
    said = capsys.readouterr()
    assert "accuracy does not fit the data" in said.err and not (place / "never").exists()

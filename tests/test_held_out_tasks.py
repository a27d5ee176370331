"""A held-out task through the real run: base against adapter by template, median and spread; what preview shows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import warm
from rich.console import Console

from lora_tune.cli import main
from lora_tune.evaluation.bootstrap import paired_interval, paired_p_value
from lora_tune.evaluation.metrics import mean_of
from lora_tune.evaluation.scores import Comparison, Score
from lora_tune.evaluation.spread import spread, spreads, templates_table

PROMPTS = """\
templates:
  1: {name: plain, jinja: "{{q}} ||| {{answer_choices[label]}}", answer_choices: "no ||| yes"}
  2: {name: long, jinja: "Tell me: {{q}} ||| {{answer_choices[label]}}", answer_choices: "no ||| yes"}
"""
RECIPE = """\
base: {{name: {base}, quantize: none}}
data:
  - {{source: a.jsonl, prompts: prompts.yaml, task: fish}}
  - {{source: b.jsonl, prompts: prompts.yaml, task: birds}}
train: {{max_steps: 2, batch_size: 4, max_length: 128, warmup: 0}}
eval: {{hold_out: 4, hold_out_tasks: [birds], metrics: [loss, accuracy], samples: 1, every: 1}}
output: out
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with a recipe over two tasks, one held out, and its data."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, count in (("a", 24), ("b", 6)):
        rows = [{"q": f"Is the animal {name}{n} a real animal?", "label": n % 2} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.yaml").write_text(PROMPTS)
    (folder / "recipe.yaml").write_text(RECIPE.format(base=tiny_base))
    return folder


def test_run_scores_every_template_of_the_held_out_task(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    monkeypatch.setattr("subprocess.run", warm.instead)
    code = main(["run", "recipe.yaml", "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    tasks = json.loads(printed.out)["tasks"]
    assert set(tasks) == {"fish", "birds"} and tasks["fish"]["loss"]["rows"] == 4
    birds = tasks["birds"]
    assert {name: scores["accuracy"]["rows"] for name, scores in birds["templates"].items()} == {"plain": 6, "long": 6}
    of_templates = sorted(scores["loss"]["adapter"] for scores in birds["templates"].values())
    assert birds["spread"]["loss"]["adapter"] == pytest.approx(sum(of_templates) / 2)
    assert birds["spread"]["loss"]["templates"] == 2
    stored = (finished / "out" / "recipe.yaml").read_text()
    assert "prompts.yaml" in stored and str(finished) not in stored
    lines = [json.loads(line) for line in (finished / "out" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval" in line for line in lines)


def test_preview_names_task_and_template(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    assert main(["preview", "recipe.yaml", "--json", "--rows", "4"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["task"] for row in rows} == {"fish"} and {row["template"] for row in rows} <= {"plain", "long"}
    assert main(["preview", "recipe.yaml", "--rows", "2"]) == 0
    assert "fish, plain" in capsys.readouterr().out.replace("fish, long", "fish, plain")


BAD = [
    ("eval.hold_out_tasks=[bird]", 2, "eval.hold_out_tasks: no source has the task, got 'bird'; did you mean `birds`?"),
    ("eval.hold_out_tasks=[fish, birds]", 2, "holds every source out: nothing is left to train on"),
    ("data.0.templates=[plane]", 2, "override data.0.templates=[plane]: data.0.templates: no such template in pr"),
    ("data.0.prompts=none.yaml", 2, "data.0.prompts: no such file"),
    ("data.0.prompts=a.jsonl", 2, "a.jsonl:"),
    ("data.1.shots=2", 2, "data.1.shots: changes nothing: the task is held out, and asked zero-shot"),
    ("data.0.columns={q: label, label: q}", 3, "no template applies to any row of a.jsonl"),
    ("data.0.invert=0.1", 2, "must be a share from 0% to 100%, got 0.1; write 10%"),
    ("data.0.format=alpaca", 2, "data.0.format: cannot be chosen beside prompts"),
]


@pytest.mark.parametrize(("override", "code", "expected"), BAD, ids=[override for override, _, _ in BAD])
def test_bad_input_is_one_line_before_the_base_is_loaded(
    finished: Path, override: str, code: int, expected: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(finished)
    monkeypatch.setattr("lora_tune.run._load", lambda *_, **__: pytest.fail("the base was loaded"))
    assert main(["run", "recipe.yaml", override, "output=none"]) == code
    said = capsys.readouterr().err.strip()
    assert expected in said and "Traceback" not in said, said


def score(base: float, adapter: float, *, low: float = -1.0, high: float = 1.0) -> Score:
    return Score(base, adapter, low, high, 0.5, 10, "higher")


def test_median_and_quartiles_over_templates() -> None:
    scores = {str(n): score(n / 10, n / 5) for n in range(5)} | {"up": score(0.2, 0.9, low=0.1)}
    found = spread(scores)
    assert (found.templates, found.better, found.worse) == (6, 1, 0) and found.base == pytest.approx(0.2)
    assert found.base_quartiles[0] <= found.base <= found.base_quartiles[1]
    one: dict[str, Any] = {"t": {"only": {"accuracy": score(0, 1)}}}
    assert spreads(Comparison(scores={}, samples=(), templates=one)) == {}
    with pytest.raises(ValueError, match="no template"):
        spread({})


def test_one_row_proves_nothing() -> None:
    base, adapter = mean_of([1.5]), mean_of([0.5])
    assert paired_p_value(base, adapter, seed=1) == 1.0
    assert paired_interval(base, adapter, seed=1) == (-1.0, -1.0)


def test_the_table_fits_into_eighty_columns_with_every_number() -> None:
    templates = {f"a template with a long name, number {n}": {"accuracy": score(n / 9, 0.5)} for n in range(3)}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(templates_table(Comparison(scores={}, samples=(), templates={"nli": templates})))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for number in ("0.0000", "0.1111", "0.2222", "median of 3", "upper quartile", "-1.0000 … +1.0000"):
        assert number in text

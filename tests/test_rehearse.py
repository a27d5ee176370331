"""A rehearsal: one whole journey with the real processes, what it samples, what it refuses, what it finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from seldom import SELDOM

from lora_tune import rehearse
from lora_tune.adapter.folder import WEIGHTS
from lora_tune.cli import COMMANDS, main
from lora_tune.errors import CheckFailed, Problem
from lora_tune.model.shrink import HEAD
from lora_tune.recipe_file import read_recipe
from lora_tune.training.journey import Processes
from lora_tune.training.small_recipe import TRAINED_STEPS, small_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
Printed = pytest.CaptureFixture[str]


def row(number: int) -> dict[str, Any]:
    """A question whose length goes up and down with its number."""
    return {"instruction": f"Count to {number}. {'Please. ' * (number * 7 % 20)}", "output": f"{number}, done."}


def recipe(folder: Path, base: Path, *, rows: int = 60, more: str = "") -> Path:
    """A recipe over `rows` questions, of which row 31 is by far the longest."""
    questions = [row(number) for number in range(rows)]
    if rows > 30:
        questions[30]["instruction"] = "Long. " * 30
    (folder / "rows.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    path = folder / "recipe.yaml"
    path.write_text(
        f"base: {{name: {base}}}\ndata: [{{source: rows.jsonl, format: alpaca}}]\n"
        "lora: {method: rslora, rank: 32, alpha: 64, targets: [q_proj, up_proj]}\n"
        "train: {epochs: 2, batch_size: 8, max_length: 256, optimizer: adamw_8bit, warmup: 100}\n"
        f"eval: {{hold_out: 10%, metrics: [loss, exact_match], every: 50}}\noutput: adapters/real\n{more}"
    )
    return path


def rehearsed(capsys: Printed, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code of the command with --json, and what it printed."""
    capsys.readouterr()
    code = main(["rehearse", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


@SELDOM[0]
@SELDOM[1]
def test_a_whole_rehearsal(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    monkeypatch.chdir(tmp_path)
    path = recipe(tmp_path, tiny_base)
    code, answer = rehearsed(capsys, str(path), "--keep", "kept")
    states = {step["name"]: step["state"] for step in answer["steps"]}
    assert code == 0, answer
    present = {name for name, verb, _, work in rehearse.STEPS if work and (verb is None or verb in COMMANDS)}
    assert {name for name, state in states.items() if state == "ok"} | {"plan"} >= present
    assert {name for name, state in states.items() if state == "absent"} == {n for n, *_ in rehearse.STEPS} - present
    folder = tmp_path / "kept"
    small = read_recipe(folder / "recipe.yaml").recipe
    assert small.lora.method == "rslora" and small.lora.targets == ("q_proj", "up_proj")
    assert (
        small.base.quantize == "nf4"
        and small.train.optimizer == "adamw_8bit"
        and small.metrics == ("loss", "exact_match")
    )
    # the run that was killed left no last word, was resumed by another process, and ended as the undisturbed one
    assert (folder / "killed" / WEIGHTS).read_bytes() == (folder / "calm" / WEIGHTS).read_bytes()
    assert json.loads((folder / "logs" / "resume.json").read_text())["training"]["steps"] == TRAINED_STEPS
    assert (folder / "logs" / "kill.json").read_text() == ""
    # the rows are those of the recipe, the longest among them; the held-out ones are held out again
    rows = [json.loads(line) for line in (folder / "rows-0.jsonl").read_text().splitlines()]
    real = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert all(one in real for one in rows) and real[30] in rows and len(rows) < len(real)
    assert not (tmp_path / "adapters").exists()


def test_what_is_refused_before_anything_is_built(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = recipe(tmp_path, tiny_base)
    before = set(tmp_path.iterdir())
    for overrides, expected, word in (
        (["train.batch_size=0"], 2, "batch_size"),
        (["lora.targets=[q_proj,no_such]"], 2, "no_such"),
        (["lora.method=loftq", "base.quantize=none"], 2, "loftq"),
        (["train.max_length=16"], 3, "limits."),
    ):
        code, answer = rehearsed(capsys, str(path), *overrides)
        assert (code, answer["exit_code"]) == (expected, expected), answer
        assert any(word in json.dumps(problem) for problem in answer["problems"])
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"instruction": "What?", "output": 5\n')
    code, answer = rehearsed(capsys, str(path))
    assert code == 3 and answer["problems"][0]["line"] == 61
    assert set(tmp_path.iterdir()) == before, "nothing is left"


def test_a_folder_that_holds_something_is_not_used(tmp_path: Path, tiny_base: Path, capsys: Printed) -> None:
    path = recipe(tmp_path, tiny_base)
    code, answer = rehearsed(capsys, str(path), "--keep", str(tmp_path))
    assert code == 2 and answer["problems"][0]["key"] == "--keep"
    assert path.exists()


def test_a_failed_step_is_told_and_its_folder_stays(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    def save(rehearsal: rehearse.Rehearsal) -> str:
        raise CheckFailed(Problem("saving failed: no space", file=str(rehearsal.folder / "logs" / "train.log")))

    steps = (("data", None, (), rehearse.Rehearsal.data), ("train", None, ("data",), save), ("serve", "no", (), None))
    monkeypatch.setattr(rehearse, "STEPS", steps)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = recipe(tmp_path, tiny_base)
    capsys.readouterr()
    assert main(["rehearse", str(path)]) == 1
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert [line[0] for line in lines[:3]] == ["✓", "✗", "–"] and "60 rows" in lines[0]
    assert "no space" in lines[1] and "train.log" in lines[1] and "not in this version" in lines[2]
    assert lines[-1].startswith("1 steps went well, 1 failed")
    (left,) = tmp_path.glob("lora-tune-rehearsal-*")
    assert str(left) in lines[-1]
    code, answer = rehearsed(capsys, str(path))
    assert code == 1 and answer["folder"] and "no space" in answer["problems"][0]["reason"]


@pytest.mark.parametrize(
    ("losses", "weights", "said"),
    [
        (([1.0, 0.5], [1.0, 0.5]), (b"a", b"a"), None),
        (([1.0, 0.5], [1.0, 0.50000001]), (b"a", b"a"), "another loss at step 2"),
        (([1.0, 0.5], [1.0]), (b"a", b"a"), "another loss at step 2"),
        (([1.0], [1.0]), (b"a", b"b"), "another adapter"),
    ],
)
def test_a_run_that_goes_on_otherwise_is_found(
    losses: tuple[list[float], list[float]], weights: tuple[bytes, bytes], said: str | None, tmp_path: Path
) -> None:
    for name, run, content in zip(("calm", "killed"), losses, weights, strict=True):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "loss": loss} for step, loss in enumerate(run, 1)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / name / WEIGHTS).write_bytes(content)
    rehearsal = rehearse.Rehearsal.__new__(rehearse.Rehearsal)
    rehearsal.folder, rehearsal.processes = tmp_path, Processes(tmp_path)
    if said is None:
        assert "bit for bit" in rehearsal.same()
        return
    with pytest.raises(CheckFailed, match=said):
        rehearsal.same()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_has_a_small_one(path: Path, tmp_path: Path) -> None:
    real = read_recipe(path).recipe
    small = small_recipe(real, base=tmp_path, data=real.data, hold_out=2, longest=512)
    for keys in ("method", "targets", "dropout", "modules_to_save"):
        assert getattr(small.lora, keys) == getattr(real.lora, keys)
    assert small.base.quantize == real.base.quantize and small.metrics == real.metrics and small.seed == real.seed
    assert small.train.packing == real.train.packing and small.loss_on == real.loss_on
    assert small.train.max_steps == TRAINED_STEPS and small.track == ()


def test_names_of_layers_that_the_small_base_lacks_are_left_out(tmp_path: Path, tiny_base: Path) -> None:
    path = recipe(tmp_path, tiny_base)
    overrides = ("lora.rank_pattern={layers.1.self_attn.q_proj: 64, layers.9.self_attn.q_proj: 8, up_proj: 4}",)
    real = read_recipe(
        path, overrides=(*overrides, "train.budget=2h", "train.epochs=1", "train.gradient_checkpointing=30")
    ).recipe
    small = small_recipe(real, base=tmp_path, data=real.data, hold_out=2, longest=64)
    assert small.lora.rank_pattern == {"layers.1.self_attn.q_proj": HEAD, "up_proj": 4}
    assert small.train.budget is None and small.train.gradient_checkpointing == 2

"""Sweeps: what may vary, the order of runs, pruning, going on after a kill, cards, the table and the picture.

The runs are `sweep_child.py`, a process that behaves like `lora-tune run`; a nightly test sweeps with the real one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lora_tune import sweep
from lora_tune.cli import main
from lora_tune.errors import UsageError
from lora_tune.training.sweep_space import Axis, grid, parse_axes

pytest.importorskip("optuna")
CHILD = str(Path(__file__).resolve().parent / "sweep_child.py")
RATE = "train.learning_rate"
Printed = pytest.CaptureFixture[str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, in which runs are the stand-in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "r.yaml").write_text(
        "base: {name: builtin:quickstart}\ndata: [{source: rows.jsonl}]\n"
        "eval: {every: 1, hold_out: 50%}\noutput: adapters/a\n"
    )
    monkeypatch.setattr(sweep, "_command", lambda asked: [sys.executable, "-S", CHILD, str(asked.file.path)])
    monkeypatch.setattr("lora_tune.training.sweep_runs._EVERY_S", 0.01)
    return tmp_path


def swept(capsys: Printed, *arguments: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["sweep", "r.yaml", *arguments, "--json"]) == code
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def runs_by_rate(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {run["values"][RATE]: run for run in answer["runs"]}


def test_a_grid_is_swept_and_the_best_run_named(here: Path, capsys: Printed) -> None:
    answer = swept(capsys, "--set", f"{RATE}=0.3,0.1", "--set", "lora.rank=4,8", "--prune", "none")
    values = [
        (run["values"][RATE], run["values"]["lora.rank"]) for run in sorted(answer["runs"], key=lambda r: r["run"])
    ]
    assert values == [("0.3", "4"), ("0.3", "8"), ("0.1", "4"), ("0.1", "8")]
    assert [run["loss"] for run in answer["runs"]] == [0.1, 0.1, 0.3, 0.3], "best first"
    assert answer["best"] == {
        "run": 2,
        "folder": "adapters/a-sweep/002",
        "loss": 0.1,
        "values": answer["runs"][0]["values"],
    }
    for run in answer["runs"]:
        assert (here / run["folder"] / "manifest.json").exists() and len(run["losses"]) == 6
    picture = ElementTree.parse(here / "adapters" / "a-sweep" / "sweep.svg").getroot()
    assert picture.tag.endswith("svg") and "lowest is 0.1" in picture.attrib["aria-label"]
    assert json.loads((here / "adapters/a-sweep/results.json").read_text())["best"] == answer["best"]
    assert swept(capsys, "--set", f"{RATE}=0.3,0.1", "--set", "lora.rank=4,8", "--prune", "none") == answer
    assert (here / "adapters/a-sweep/000/starts").read_text().count("\n") == 1, "nothing is trained twice"


def test_a_run_that_is_worse_than_most_is_stopped_and_keeps_its_checkpoint(here: Path, capsys: Printed) -> None:
    answer = swept(capsys, "--set", f"{RATE}=0.1,0.2,0.9,0.05")
    found = runs_by_rate(answer)
    assert {rate: run["state"] for rate, run in found.items()} == {
        "0.1": "complete", "0.2": "complete", "0.9": "pruned", "0.05": "complete",
    }  # fmt: skip
    pruned = here / found["0.9"]["folder"]
    assert not (pruned / "manifest.json").exists() and 1 <= int((pruned / "checkpoints/step").read_text()) < 6
    assert answer["best"]["values"] == {RATE: "0.05"} and answer["runs"][-1]["state"] == "pruned"


def test_a_killed_sweep_loses_nothing(here: Path, capsys: Printed) -> None:
    """KILL in the middle: its runs stop as well; the same command goes on from their checkpoints."""
    code = (
        f"import sys\nsys.argv = ['lora-tune']\nfrom lora_tune import sweep\nfrom lora_tune.cli import main\n"
        f"sweep._command = lambda asked: [sys.executable, '-S', {CHILD!r}, str(asked.file.path)]\n"
        f"sys.exit(main(['sweep', 'r.yaml', '--set', '{RATE}=0.3,0.2,0.1', '--jobs', '2', '--json']))"
    )
    environment = {**os.environ, "SWEEP_CHILD_STEP_S": "0.2"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    folder = here / "adapters" / "a-sweep"
    while not all((folder / name / "checkpoints" / "step").exists() for name in ("000", "001")):
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.wait()
    with (folder / "journal.log").open("ab") as journal:
        journal.write(b'{"half a line')
    answers = [folder / "logs" / f"{name}.json" for name in ("000", "001")]
    while not all("SIGTERM" in path.read_text() for path in answers):  # the kernel ends the runs with their sweep
        time.sleep(0.01)
    steps = [int((folder / name / "checkpoints" / "step").read_text()) for name in ("000", "001")]
    assert all(1 <= step < 6 for step in steps)
    answer = swept(capsys, "--set", f"{RATE}=0.3,0.2,0.1", "--jobs", "2")
    assert {run["values"][RATE]: run["loss"] for run in answer["runs"]} == {"0.1": 0.1, "0.2": 0.2, "0.3": 0.3}
    for name in ("000", "001"):
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "eval" in row] == [1, 2, 3, 4, 5, 6], "each step once"
        assert (folder / name / "starts").read_text().count("\n") == 2


def test_a_signal_stops_the_runs_with_a_checkpoint(
    here: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEP_CHILD_STEP_S", "0.1")
    step = here / "adapters/a-sweep/000/checkpoints/step"

    def interrupt() -> None:
        while not step.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    answer = swept(capsys, "--set", f"{RATE}=0.3,0.2", code=143)
    assert "the same command goes on" in answer["problems"][0]["reason"]
    assert int(step.read_text()) < 6
    monkeypatch.setenv("SWEEP_CHILD_STEP_S", "0")
    assert len(swept(capsys, "--set", f"{RATE}=0.3,0.2")["runs"]) == 2


def test_failed_runs_are_told_and_wrong_data_ends_it(here: Path, capsys: Printed) -> None:
    answer = swept(capsys, "--set", f"{RATE}=9,0.1")
    assert runs_by_rate(answer)["9"]["state"] == "failed" and answer["best"]["loss"] == 0.1
    assert [p["reason"] for p in answer["problems"]] == ["run 000 failed: the loss is not finite"]
    answer = swept(capsys, "--set", f"{RATE}=8,0.1", "--output", "other", code=3)
    assert "rows are empty" in answer["problems"][0]["reason"] and not (here / "other/001").exists()
    answer = swept(capsys, "--set", f"{RATE}=9", "--output", "third", code=1)
    assert answer["problems"][0]["reason"] == "no run of the sweep finished"


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_drawn_values_stay_in_their_range_and_no_run_is_made_twice(here: Path, capsys: Printed, sampler: str) -> None:
    given = ["--set", f"{RATE}=1e-4..1e-2", "--set", "lora.rank=4,8", "--sampler", sampler]
    first = swept(capsys, *given, "--trials", "2")
    more = swept(capsys, *given, "--trials", "4")
    assert len(first["runs"]) == 2 and len(more["runs"]) == 4
    drawn = [run["values"][RATE] for run in more["runs"]]
    assert all(1e-4 <= float(value) <= 1e-2 for value in drawn) and len(set(drawn)) == 4
    twice = swept(capsys, "--set", "lora.rank=4", "--set", f"{RATE}=0.2,0.1", "--sampler", sampler, "--trials", "5",
                  "--output", "small")  # fmt: skip
    made = [run for run in twice["runs"] if run["same_as"] is None and run["state"] == "complete"]
    assert len(twice["runs"]) == 5 and len(made) <= 2, "equal values are trained once"


def test_each_run_gets_a_card(here: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_tune.model.device.visible_cards", lambda: ("4", "6"))
    swept(capsys, "--set", f"{RATE}=0.3,0.2,0.1", "--jobs", "2", "--prune", "none")
    cards = [(here / "adapters/a-sweep" / name / "starts").read_text().strip() for name in ("000", "001", "002")]
    assert cards[:2] == ["4", "6"] and cards[2] in ("4", "6")
    answer = swept(capsys, "--set", f"{RATE}=0.3,0.2", "--jobs", "3", "--output", "b", code=2)
    assert "3 for 2 cards" in answer["problems"][0]["reason"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--set", f"{RATE}=1e-4,fast"], "must be a number above 0 or auto, got text 'fast'"),
        (["--set", "lora.rnk=8"], "unknown key"),
        (["--set", "lora.rank=8", "lora.rank=4"], "overridden twice"),
        (["--set", "lora.rank=8", "--set", "lora.rank=4"], "set twice"),
        (["--set", "lora.rank=8,8"], "a value twice"),
        (["--set", "lora.rank=8,,4"], "an empty value"),
        (["--set", "rank"], "section.key=values"),
        (["--set", "output=a,b"], "cannot be swept"),
        (["--set", "seed=1,2"], "cannot be swept"),
        ([], "at least one key"),
        (["--set", f"{RATE}=1e-4..1e-3"], "no grid"),
        (["--set", f"{RATE}=1e-3..1e-4", "--sampler", "tpe", "--trials", "2"], "lower to the higher"),
        (["--set", "lora.rank=8", "--sampler", "tpe"], "draws for ever"),
        (["--set", "lora.rank=8", "--trials", "3"], "as many runs as combinations"),
        (["--set", "lora.rank=8", "eval.hold_out=0", "eval.every=null"], "holds no row out"),
        (["--set", "lora.rank=8", "eval.metrics=[rouge_l]"], "has no loss"),
        (["--set", "train.batch_size=8,12", "--set", "train.micro_batch_size=8"], "must divide"),
    ],
)
def test_wrong_sweeps_are_refused_before_anything_starts(
    here: Path, capsys: Printed, arguments: list[str], reason: str
) -> None:
    answer = swept(capsys, *arguments, code=2)
    assert reason in " ".join(problem["reason"] for problem in answer["problems"])
    assert not (here / "adapters").exists()


def test_the_output_of_the_command_line_names_the_sweep(here: Path, capsys: Printed) -> None:
    answer = swept(capsys, "output=b", "train.epochs=2", "--set", f"{RATE}=0.1")
    assert answer["folder"] == "b-sweep" and (here / "b-sweep" / "000" / "manifest.json").exists()
    assert json.loads((here / "b-sweep" / "sweep.json").read_text())["overrides"] == ["train.epochs=2"]


def test_another_sweep_is_not_gone_on_with(here: Path, capsys: Printed) -> None:
    swept(capsys, "--set", f"{RATE}=0.1")
    answer = swept(capsys, "--set", f"{RATE}=0.1,0.2", code=2)
    assert "is another sweep: set changed" in answer["problems"][0]["reason"]
    (here / "used").mkdir()
    (here / "used" / "file").write_text("mine")
    assert "in use" in swept(capsys, "--set", f"{RATE}=0.1", "--output", "used", code=2)["problems"][0]["reason"]


def test_values_keep_their_brackets_and_quotes() -> None:
    (axis,) = parse_axes(['lora.targets=[q_proj, v_proj],all-linear,"a,b"'])
    assert axis.values == ("[q_proj, v_proj]", "all-linear", '"a,b"')
    assert len(grid([axis, Axis("b", ("1", "2"))])) == 6
    whole, part = parse_axes(["lora.rank=4..64", "lora.dropout=0..0.5"])
    assert whole.whole and whole.logarithmic and not part.whole and not part.logarithmic
    with pytest.raises(UsageError):
        grid([Axis("a", tuple(map(str, range(101)))), Axis("b", tuple(map(str, range(100))))])


def test_without_optuna_it_says_how_to_have_it(here: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    answer = swept(capsys, "--set", f"{RATE}=0.1", code=2)
    assert "lora_tune[sweep]" in answer["problems"][0]["fix"]


@pytest.mark.nightly
@pytest.mark.skipif("LORA_TUNE_ENGINES_REQUIRED" not in os.environ, reason="half a minute: make nightly")
def test_real_runs_are_swept(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Count to {n}.", "output": f"{n}, done."} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text(
        f"base: {{name: {tiny_base}, quantize: none, compute_dtype: float32}}\n"
        "data: [{source: rows.jsonl, format: alpaca}]\n"
        "train: {max_steps: 6, batch_size: 4, max_length: 128}\n"
        "eval: {hold_out: 10%, every: 2, samples: 0}\noutput: out/real\n"
    )
    answer = swept(capsys, "--set", f"{RATE}=1e-4,3e-2")
    assert [run["state"] for run in answer["runs"]] == ["complete", "complete"]
    assert answer["best"]["values"] == {RATE: "3e-2"} and len(answer["runs"][0]["losses"]) == 3
    assert main(["adapters", "verify", answer["best"]["folder"], "--base", str(tiny_base)]) == 0

"""What is seen of a training: metrics.jsonl, loss.png, plain lines, trackers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import training_kit as kit

from lora_tune.errors import UsageError
from lora_tune.recipe import Train
from lora_tune.training import progress
from lora_tune.training.evaluations import Evaluation
from lora_tune.training.metrics_file import MetricsFile
from lora_tune.training.progress import METRICS, TrainingDisplay, draw_loss, read_metrics
from lora_tune.training.resume import RunFacts

TRAIN = Train(batch_size=4, micro_batch_size=2, max_steps=6, save_every=2, keep_checkpoints=9, learning_rate=5e-3)
ANSWERS = [("Who?", "Ada \x1b[31m[bold]Lovelace[/bold]")]


def run(base: Path, folder: Path, *, resume: bool = False) -> Any:
    """A run of six steps with display, held-out losses and answers."""
    held_out = iter([2.5, 2.25, 2.125] if not resume else [2.25, 2.125])
    plan = Evaluation(every=2, measure=lambda model: {"loss": next(held_out)}, answer=lambda model: ANSWERS)
    trainer = kit.trainer(folder, base, kit.rows(12), train=TRAIN, evaluation=plan)
    trainer.for_run(RunFacts(display=TrainingDisplay(folder)))
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A finished run and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    return run(tiny_base, folder), folder


def test_metrics_hold_one_exact_line_a_step(finished: tuple[Any, Path]) -> None:
    trainer, folder = finished
    rows = read_metrics(folder / METRICS)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"].hex() for row in steps] == kit.losses(trainer) == [row["loss_hex"] for row in steps]
    assert [row["epoch"] for row in steps] == pytest.approx([n / 3 for n in range(1, 7)])
    for row in steps:
        assert {"grad_norm", "learning_rate", "tokens", "trained_tokens", "step_s", "gib"} <= row.keys()
        assert 0 < row["trained_tokens"] <= row["tokens"] and row["step_s"] > 0 and 0.05 < row["gib"] < 64
    assert sum(row["tokens"] for row in steps) == 2 * sum(map(sum, trainer.train_dataset["seq_lengths"]))
    assert [(row["step"], row["eval"]) for row in rows if "eval" in row] == [
        (2, {"loss": 2.5}),
        (4, {"loss": 2.25}),
        (6, {"loss": 2.125}),
    ]
    assert [row["answers"] for row in rows if "answers" in row] == [[list(pair) for pair in ANSWERS]] * 3


def test_a_resumed_run_goes_on_in_the_same_file(tiny_base: Path, finished: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = finished
    kept = Path("checkpoints") / "step-00000002"
    shutil.copytree(folder / kept, tmp_path / kept)
    lines = (folder / METRICS).read_text().splitlines()
    (tmp_path / METRICS).write_text("\n".join(lines[:6]) + '\n{"step": 5, "lo')  # killed in the middle of a line
    run(tiny_base, tmp_path, resume=True)

    def essence(row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in ("step_s", "gib")}

    again = [essence(row) for row in read_metrics(tmp_path / METRICS)]
    assert again == [essence(row) for row in read_metrics(folder / METRICS)]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1, "loss": 2.0}\n')
    MetricsFile(tmp_path / METRICS, up_to_step=0).close()
    assert (tmp_path / METRICS).read_text() == ""


def test_without_a_terminal_there_are_plain_lines(
    tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tiny_base, tmp_path)
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    assert out == ""
    assert lines[0].startswith("step 1/6  loss ")
    assert all(word in lines[0] for word in ("lr 5.00e-03", "tokens/s", "GiB", "left"))
    assert lines[-2].startswith("step 6/6") and lines[-1] == "step 6: held out: loss 2.1250"
    assert "  Who? → Ada \\x1b[31m[bold]Lovelace[/bold]" in err


def test_the_live_line_ends_with_the_training_even_after_an_error(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    monkeypatch.setattr(progress, "messages", lambda: Console(stderr=True, force_terminal=True, width=120))
    display = TrainingDisplay(tmp_path)
    trainer = kit.trainer(tmp_path, tiny_base, kit.rows(12), train=TRAIN).for_run(RunFacts(display=display))

    def fail(*given: Any) -> None:
        raise ZeroDivisionError

    trainer._save_checkpoint = fail
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert display._bar is None and display._file is None
    shown = capfd.readouterr().err
    assert "2/6" in shown and "tokens/s" in shown


def test_the_picture_shows_both_losses(
    finished: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    write = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), write(self, *a, **k))[1])
    _, folder = finished
    draw_loss(folder / METRICS, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    assert axes.get_xlabel() == "optimizer step" and axes.get_ylabel() == "loss (nats per trained token)"
    each, smooth, held_out = axes.lines
    rows = [row for row in read_metrics(folder / METRICS) if "loss" in row]
    assert list(each.get_ydata()) == [row["loss"] for row in rows] and len(smooth.get_ydata()) == len(rows)
    assert list(held_out.get_xdata()) == [2, 4, 6] and list(held_out.get_ydata()) == [2.5, 2.25, 2.125]


def test_a_disk_that_refuses_the_picture_leaves_no_half_of_it(finished: tuple[Any, Path], tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    _, folder = finished
    picture, reserve = tmp_path / "loss.png", tmp_path / "checkpoints" / ".reserve"
    picture.write_bytes(b"older")
    reserve.parent.mkdir()
    reserve.write_bytes(b"room")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            draw_loss(folder / METRICS, picture)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert picture.read_bytes() == b"older" and not list(tmp_path.glob(".*"))
    assert not reserve.exists()  # the room for the end was tried as well


def test_numbers_that_are_not_finite_stay_json(tmp_path: Path) -> None:
    row = progress.step_row({"loss": 1.5, "grad_norm": float("inf"), "learning_rate": 0.0}, step=1, epoch=0.5)
    assert json.loads(json.dumps(row, allow_nan=False))["grad_norm"] == "inf"


@pytest.mark.parametrize("tracker", progress.TRACKERS)
def test_a_tracker_that_is_not_installed_is_named_before_training(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"track: {tracker} is not installed; pip install {tracker}"):
        progress.tracker_callbacks([tracker], folder=tmp_path)


def test_tensorboard_gets_the_numbers_of_a_step(tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trackers = progress.tracker_callbacks(["tensorboard"], folder=tmp_path)
    trainer = kit.trainer(tmp_path, tiny_base, kit.rows(4), train=TRAIN.model_copy(update={"max_steps": 1}))
    trainer.for_run(RunFacts(trackers=trackers)).train()
    assert list((tmp_path / "checkpoints" / "tensorboard").glob("events*"))
    assert not [path for path in tmp_path.iterdir() if path.name == "runs"]

"""`lora-tune run … --resume`: after a signal in any part of a run, after its end, with more steps, with a full disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lora_tune import terminal
from lora_tune.adapter.folder import read_manifest
from lora_tune.cli import main
from lora_tune.disk import free_bytes, make_reserve
from lora_tune.training.metrics_file import read_metrics

RECIPE = """\
base: {name: base, quantize: nf4, compute_dtype: bfloat16}
data: [{source: rows.jsonl, format: messages}]
lora: {rank: 4, alpha: 8, dropout: 0.1}
train: {max_steps: 6, batch_size: 4, micro_batch_size: 2, max_length: 128, save_every: 2, learning_rate: 1e-3}
eval: {hold_out: 4, every: 2, metrics: [loss, exact_match], samples: 2}
output: out
"""
SAME = ("adapter_model.safetensors", "adapter_config.json", "test_vectors.json")


def write_place(folder: Path, base: Path) -> Path:
    """A folder with the recipe above, its base and its data; returns it."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "base").symlink_to(base)
    turns = [(f"What is {number} and {number + 2}?", f"It is {2 * number + 2}.") for number in range(30)]
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return folder


def losses(place: Path) -> list[object]:
    """Losses and evaluations of the finished run in `place`."""
    return [row.get("loss_hex") or row.get("eval") for row in read_metrics(place / "out" / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A run that nobody interrupted; returns the folder that it ran in."""
    place = write_place(tmp_path_factory.mktemp("whole") / "place", tiny_base)
    before = Path.cwd()
    os.chdir(place)
    try:
        assert main(["run", "recipe.yaml"]) == 0
    finally:
        os.chdir(before)
    return place


@contextmanager
def signal_while(doing: str, number: signal.Signals) -> Iterator[None]:
    """Sends this process a signal as soon as it does what is named."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            named = any(activity.startswith(doing) for activity in list(terminal._activity))
            if named and (doing != "training" or read_metrics(Path("out/metrics.jsonl"))):
                os.kill(os.getpid(), number)
                return
            time.sleep(0.0005)

    thread = threading.Thread(target=watch, daemon=True)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # a few rows are checked in less than the usual 5 ms
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)


PHASES = [
    ("checking the data", signal.SIGINT, "while checking the data"),
    ("tokenizing", signal.SIGTERM, "while tokenizing"),
    ("loading", signal.SIGHUP, "while loading"),
    ("training", signal.SIGUSR1, "after step"),
    ("comparing", signal.SIGINT, "while comparing base and adapter"),
    ("writing", signal.SIGTERM, "while writing"),
    ("verifying", signal.SIGHUP, "while verifying"),
]


def test_a_signal_in_every_part_of_a_run_and_the_same_adapter_at_the_end(
    whole: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = write_place(tmp_path / "place", tiny_base)
    monkeypatch.chdir(place)
    monkeypatch.setenv("LORA_TUNE_CACHE", str(tmp_path / "cache"))
    for doing, number, says in PHASES:
        with signal_while(doing, number):
            assert main(["run", "recipe.yaml", "--resume"]) == 128 + number, doing
        out, err = capsys.readouterr()
        last = err.splitlines()[-1]
        assert f"stopped by {number.name}" in last and says in last and "--resume" in last, err
        assert out == "" and "Traceback" not in err
        assert not list(place.rglob("*.tmp")) and not list((tmp_path / "cache").rglob("*.tmp")), doing
        if doing in ("checking the data", "tokenizing", "loading"):
            assert not (place / "out").exists() or not list((place / "out").glob("*.json"))
        if doing in ("comparing", "writing"):
            assert not (place / "out" / "manifest.json").exists()
    assert main(["run", "recipe.yaml", "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training"]["steps"] == 6  # all but the proof was done
    for name in SAME:
        assert (place / "out" / name).read_bytes() == (whole / "out" / name).read_bytes(), name
    assert losses(place) == losses(whole)
    assert not (place / "out" / "checkpoints" / ".reserve").exists()


def test_a_finished_run_goes_on_with_more_steps_where_that_is_allowed(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    assert main(["run", "recipe.yaml", "--resume", "train.learning_rate=1e-4"]) == 2
    assert "train.learning_rate: was 0.001" in capsys.readouterr().err
    again = ["run", "recipe.yaml", "--resume", "train.max_steps=8"]
    assert main(again) == 2
    assert "add --allow-change train.max_steps" in capsys.readouterr().err
    assert read_manifest(Path("out")).training.steps == 6  # a refusal leaves the finished run as it was
    fewer = ["run", "recipe.yaml", "--resume", "train.max_steps=3", "--allow-change", "train.max_steps"]
    assert main(fewer) == 2
    assert "has 6 behind it" in capsys.readouterr().err
    assert read_manifest(Path("out")).training.steps == 6
    assert main([*again, "--allow-change", "train.max_steps"]) == 0
    assert read_manifest(Path("out")).training.steps == 8
    before = losses(whole)
    assert losses(Path())[: len(before)] == before


def test_too_little_room_is_said_before_the_base_is_loaded(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    assert main(["run", "recipe.yaml", "output=new", "train.keep_checkpoints=2000000000"]) == 4
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "needs" in line]
    assert "new: output: needs" in line and "are free" in line and "GiB" in line
    assert not Path("new").exists()
    assert main(["run", "recipe.yaml", "--overwrite", "train.keep_checkpoints=2000000000"]) == 4
    assert Path("out/manifest.json").exists()  # the older run is still whole


def test_a_reserve_takes_its_room_and_a_refused_one_leaves_nothing(tmp_path: Path) -> None:
    make_reserve(tmp_path / "reserve", 3_000_000)
    assert (tmp_path / "reserve").stat().st_blocks * 512 >= 3_000_000
    with pytest.raises(OSError, match=r"No space left|too large"):
        make_reserve(tmp_path / "more", free_bytes(tmp_path) + (1 << 40))
    assert [path.name for path in tmp_path.iterdir()] == ["reserve"]

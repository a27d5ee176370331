"""One run on several processes is the run of one: equal losses and adapters, rows shared, faults named, resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ranks
from hypothesis import given
from hypothesis import strategies as st
from ranks import Strike
from safetensors.torch import load_file
from seldom import SELDOM, often

from lora_tune.adapter.folder import read_manifest
from lora_tune.errors import RecipeError, UsageError
from lora_tune.model.strategy import STRATEGIES, conflicts, layout_of
from lora_tune.recipe import Base, Hardware, Lora, Train
from lora_tune.training import checkpoint
from lora_tune.training.batches import EpochSampler, ShareSampler, share_of_step
from lora_tune.training.place import Place, first_host, place_here, take_card
from lora_tune.training.progress import read_metrics

RECIPE = """\
base: {name: base, quantize: none, compute_dtype: float32}
data: [{source: rows.jsonl, format: messages}]
lora: {rank: 4, alpha: 8}
train: {batch_size: 8, micro_batch_size: 2, max_length: 96, learning_rate: 1e-2, warmup: 0, packing: false,
        save_every: 2}
eval: {hold_out: 0, samples: 0}
output: out
"""
ROWS = 43  # five steps of 8 and one of 3, in which two of four processes have nothing
BASES = {"lora": (), "nf4": ("base.quantize=nf4",)}
SHARED = {"2 ddp": (2, "ddp"), "4 ddp": (4, "ddp"), "2 fsdp2": (2, "fsdp2"), "2 zero3": (2, "zero3")}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with a base, rows of many lengths, and the recipe."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "base").symlink_to(tiny_base)
    turns = [(f"Question {n}?", f"Answer {n}." + " It is fine." * (n % 5)) for n in range(ROWS)]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


Run = Callable[..., ranks.Ended]


@pytest.fixture(scope="module")
def run(workplace: Path) -> Run:
    """Runs the recipe into the folder `name`; without the preflight, which is no part of the numbers."""

    def of(name: str, world: int, *more: str, strike: Strike | None = None) -> ranks.Ended:
        arguments = ["recipe.yaml", f"output={name}", "--no-preflight", *more]
        return ranks.run(arguments, cwd=workplace, world=world, strike=strike)

    return of


@pytest.fixture(scope="module")
def alone(workplace: Path, run: Run) -> Callable[[str], Path]:
    """The folder of the run of one process."""

    @cache
    def of(base: str) -> Path:
        ended = run(f"alone-{base}", 1, *BASES[base])
        assert ended.codes == (0,), ended.err
        return workplace / f"alone-{base}"

    return of


def require_same(folder: Path, reference: Path) -> None:
    """Losses to 1e-4, tokens exactly, adapter of the same shapes and norms, and a folder that was verified."""
    found, expected = ([row for row in read_metrics(f / "metrics.jsonl") if "loss" in row] for f in (folder, reference))
    assert len(expected) == 6
    for name in ("step", "tokens", "trained_tokens"):
        assert [row[name] for row in found] == [row[name] for row in expected], name
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], abs=1e-4)
    assert [row["learning_rate"] for row in found] == [row["learning_rate"] for row in expected]
    adapters = [load_file(f / "adapter_model.safetensors") for f in (folder, reference)]
    assert {n: t.shape for n, t in adapters[0].items()} == {n: t.shape for n, t in adapters[1].items()}
    for name, tensor in adapters[0].items():
        assert float(tensor.norm()) == pytest.approx(float(adapters[1][name].norm()), rel=1e-3, abs=1e-5), name
    assert read_manifest(folder).training.steps == 6


@pytest.mark.parametrize(
    ("base", "shared"),
    [
        ("lora", "2 ddp"),
        pytest.param("lora", "4 ddp", marks=SELDOM),
        ("lora", "2 fsdp2"),
        ("lora", "2 zero3"),
        ("nf4", "2 ddp"),
        ("nf4", "2 fsdp2"),
        ("nf4", "2 zero3"),
    ],
)
def test_several_processes_train_as_one(
    workplace: Path, run: Run, alone: Callable[[str], Path], base: str, shared: str
) -> None:
    world, strategy = SHARED[shared]
    name = f"{base}-{world}-{strategy}"
    recomputed = "train.gradient_checkpointing=1"  # of two layers, which changes no number
    ended = run(name, world, *BASES[base], f"hardware.strategy={strategy}", recomputed)
    assert ended.codes == (0,) * world, ended.err
    assert not any(ended.err[1:] + ended.out[1:]), "only the first process prints"
    assert ("all 49 weights are divided over 2 processes" in ended.err[0]) == (strategy != "ddp")
    left = "train.kernels: 14 layers keep PEFT's path (divided between processes)"
    assert ended.err[0].count(left) == (strategy != "ddp")
    require_same(workplace / name, alone(base))
    shares = json.loads((workplace / name / "ledger.json").read_text())["rows_of_processes"]
    assert sum(shares) == ROWS and len(shares) == world


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("fewer", (2, "ddp"), (1, "auto")),
        pytest.param("more", (1, "auto"), (4, "ddp"), marks=SELDOM),
        pytest.param("whole", (2, "fsdp2"), (1, "auto"), marks=SELDOM),
        ("parts", (2, "zero3"), (1, "auto")),
        pytest.param("to parts", (1, "auto"), (2, "zero3"), marks=SELDOM),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(
    workplace: Path, run: Run, alone: Callable[[str], Path], name: str, before: Any, after: Any
) -> None:
    strike = Strike(before[0] - 1, signal.SIGTERM, turn=5)
    ended = run(f"resumed-{name}", before[0], f"hardware.strategy={before[1]}", strike=strike)
    assert set(ended.codes) == {143}, ended.err
    assert sum(text.count("stopped by SIGTERM after step") for text in ended.err) == 1
    ended = run(f"resumed-{name}", after[0], f"hardware.strategy={after[1]}", "--resume")
    assert set(ended.codes) == {0}, ended.err
    require_same(workplace / f"resumed-{name}", alone("lora"))


FAULTS = {
    "kill rank 0": (0, "ddp", Strike(0, signal.SIGKILL, turn=8), "is gone"),
    "kill rank 1": (1, "ddp", Strike(1, signal.SIGKILL, turn=8), "is gone"),
    "rank 0 hangs": (0, "ddp", Strike(0, signal.SIGSTOP, turn=8), "has not answered for 5 s"),
    "rank 1 of a divided base hangs": (1, "fsdp2", Strike(1, signal.SIGSTOP, turn=8), "has not answered for 5 s"),
    "rank 0 of flat parts hangs": (0, "zero3", Strike(0, signal.SIGSTOP, turn=8), "has not answered for 5 s"),
    "kill during a gathered save": (
        0,
        "fsdp2",
        Strike(0, signal.SIGKILL, turn=2, function="lora_tune.training.checkpoint:_write_manifest"),
        "is gone",
    ),
}


@pytest.mark.parametrize("fault", often(FAULTS, kept=("kill rank 0", "rank 1 of a divided base hangs")))
def test_the_loss_of_a_process_ends_the_run_with_one_message_and_a_checkpoint(
    workplace: Path, run: Run, fault: str
) -> None:
    rank, strategy, strike, said = FAULTS[fault]
    name = fault.replace(" ", "-")
    ended = run(name, 2, f"hardware.strategy={strategy}", "hardware.timeout=5s", strike=strike)
    assert ended.codes[rank] == -9 and ended.codes[1 - rank] == 4, ended
    lines = [line for text in ended.err for line in text.splitlines() if "process" in line and "divided" not in line]
    assert len(lines) == 1 and said in lines[0] and lines[0].startswith(f"process {rank} (pid "), lines
    found = checkpoint.newest(workplace / name, report=lambda line: pytest.fail(line))
    assert found is not None and found.step == 2


def test_what_depends_on_time_and_chance_is_decided_by_the_first(workplace: Path, run: Run) -> None:
    more = ("train.budget=2s", "eval.hold_out=4", "eval.every=3", "eval.keep_best=true", "lora.dropout=0.1")
    ended = run("budget", 2, *more, "train.neftune_alpha=5")
    assert ended.codes == (0, 0), ended.err
    rows = read_metrics(workplace / "budget" / "metrics.jsonl")
    assert [row["progress"] for row in rows if "loss" in row][-1] == 1 and any("eval" in row for row in rows)


@contextmanager
def launched(workplace: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    """A long run of two processes that our own launcher started, once it has a checkpoint."""
    arguments = ["recipe.yaml", f"output={name}", "hardware.processes=2", "train.epochs=2000", "--no-preflight"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    started = subprocess.Popen(
        [sys.executable, "-m", "lora_tune", "run", *arguments],
        cwd=workplace, env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not list((workplace / name / "checkpoints").glob("step-*")) and started.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield started
    finally:
        started.kill()


@SELDOM[0]
@SELDOM[1]
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_our_own_launcher_stops_all_processes_with_a_checkpoint(
    workplace: Path, number: signal.Signals
) -> None:
    with launched(workplace, number.name) as started:
        workers = children(started.pid)
        assert len(workers) >= 2
        started.send_signal(number)
        _, err = started.communicate(timeout=60)
    assert started.returncode == 128 + number, err
    (line,) = [line for line in err.splitlines() if "stopped by" in line]
    step = re.fullmatch(rf"stopped by {number.name} after step (\d+); the same command with --resume .*", line)
    found = checkpoint.newest(workplace / number.name, report=lambda line: pytest.fail(line))
    assert step and found is not None and found.step == int(step[1]), line
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()], "nothing of it runs on"


@SELDOM[0]
@SELDOM[1]
def test_our_own_launcher_tells_of_a_killed_process_once(workplace: Path) -> None:
    with launched(workplace, "launched") as started:
        places = [Path(f"/proc/{name}/environ").read_bytes() for name in children(started.pid)]
        ranked = {number: pid for pid, text in zip(children(started.pid), places, strict=True)
                  for number in (0, 1) if f"\0RANK={number}\0".encode() in b"\0" + text}  # fmt: skip
        os.kill(ranked[1], signal.SIGKILL)
        _, err = started.communicate(timeout=60)
    lines = err.splitlines()
    assert started.returncode == 4 and "2 processes, ddp" in lines[0]
    assert [line for line in lines if "killed" in line] == lines[-1:], err
    assert lines[-1].startswith(f"process 1 (pid {ranked[1]}) was killed by SIGKILL; ") and "--resume" in lines[-1]
    assert checkpoint.newest(workplace / "launched", report=print) is not None


def children(pid: int) -> list[int]:
    """The processes that this one has started."""
    return [int(name) for name in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@given(rows=st.integers(1, 60), micro=st.integers(1, 4), accumulation=st.integers(1, 3), world=st.integers(1, 5))
def test_every_row_is_trained_by_exactly_one_process(rows: int, micro: int, accumulation: int, world: int) -> None:
    def of(rank: int) -> ShareSampler:
        order = EpochSampler(rows, seed=3)
        return ShareSampler(order, micro=micro, accumulation=accumulation, rank=rank, world=world)

    shares = [list(of(rank)) for rank in range(world)]
    assert Counter(row for share in shares for part in share for row in part) == Counter(range(rows))
    assert {len(share) for share in shares} == {len(of(0))}, "all have equally many micro-batches"
    assert all(len(part) <= micro for share in shares for part in share)
    batch, order = micro * accumulation * world, list(EpochSampler(rows, seed=3))
    for step in range(-(-rows // batch)):
        parts = [share_of_step(order[step * batch :][:batch], micro=micro, rank=r, world=world) for r in range(world)]
        taken = [[row for part in share[step * accumulation :][: len(parts[0])] for row in part] for share in shares]
        assert taken == [[row for part in share for row in part] for share in parts], "the steps are those of one"


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "5"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}, None),
        (TORCHRUN, Place(3, 4, 1, "a", 5)),
        (SRUN | {"SLURM_STEP_NODELIST": "gpu[03-05,9]"}, Place(3, 4, 1, "gpu03", 29_577)),
        (SRUN | {"MASTER_ADDR": "b", "MASTER_PORT": "6"}, Place(3, 4, 1, "b", 6)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # in the batch script itself, outside of srun
    ],
)
def test_the_place_that_a_launcher_gives(environment: dict[str, str], found: Place | None) -> None:
    assert place_here(environment) == found


@pytest.mark.parametrize("change", [{"RANK": "x"}, {"RANK": "4"}, {"MASTER_ADDR": ""}, {"LOCAL_RANK": ""}])
def test_a_launcher_that_says_half_of_it_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="the launcher"):
        place_here(TORCHRUN | change)


def test_each_process_sees_its_own_card() -> None:
    place, alone = Place(3, 4, 1, "a", 5), {"CUDA_VISIBLE_DEVICES": "GPU-7"}
    for before, after in (({}, "1"), ({"CUDA_VISIBLE_DEVICES": "4,6"}, "6"), (alone, "GPU-7")):
        environment = dict(before)
        take_card(place, environment)
        assert environment["CUDA_VISIBLE_DEVICES"] == after
    with pytest.raises(UsageError, match="more processes than GPUs"):
        take_card(Place(3, 4, 2, "a", 5), {"CUDA_VISIBLE_DEVICES": "4,6"})


def test_the_first_host_of_a_list() -> None:
    lists = {"a": "a", "a,b": "a", "n[01-04]": "n01", "n[7,9],m": "n7", "n[1-2]-ib": "n1-ib", "": ""}
    assert {nodes: first_host(nodes) for nodes in lists} == lists


@pytest.mark.parametrize(
    ("hardware", "cards", "fits", "expected"),
    [
        ({}, 0, "yes", ("single", 1)),
        ({}, 1, "no", ("single", 1)),
        ({}, 4, "yes", ("ddp", 4)),
        ({}, 4, "no", ("fsdp2", 4)),
        ({}, 3, "yes", ("ddp", 2)),  # three cards do not divide a batch of 16
        ({"processes": 2, "strategy": "fsdp2"}, 4, "yes", ("fsdp2", 2)),
        ({"nodes": 2}, 4, "yes", ("ddp", 8)),
        ({"strategy": "single"}, 4, "yes", ("single", 1)),
    ],
)
def test_what_auto_decides(hardware: dict[str, Any], cards: int, fits: Any, expected: tuple[str, int]) -> None:
    layout = layout_of(Hardware(**hardware), cards=cards, batch_size=16, fits_one_card=fits)
    assert (layout.strategy, layout.world) == expected


@pytest.mark.parametrize(
    ("hardware", "cards", "said"),
    [
        ({"processes": 3}, 2, "at most 2"),
        ({"processes": 2, "strategy": "single"}, 2, "hardware.processes: 1"),
        ({"processes": 3}, 0, "write 15 or 18, or hardware.processes for 2 in all"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_one_that_can(hardware: dict[str, Any], cards: int, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        layout_of(Hardware(**hardware), cards=cards, batch_size=16, fits_one_card="yes").share(Train(batch_size=16))


@pytest.mark.parametrize(
    ("key", "base", "lora", "train"),
    [
        ("base.quantize", {"quantize": "int8"}, {}, {}),
        ("train.optimizer", {}, {}, {"optimizer": "adamw_8bit"}),
        ("lora.method", {}, {"method": "dora"}, {}),
        ("lora.modules_to_save", {}, {"modules_to_save": ("lm_head",)}, {}),
        ("lora.new_tokens", {}, {"new_tokens": ("<a>",)}, {}),
        ("train.compile", {}, {}, {"compile": "layers"}),
    ],
)
def test_what_does_not_work_divided_is_refused_with_what_does(
    key: str, base: dict[str, Any], lora: dict[str, Any], train: dict[str, Any]
) -> None:
    parts = {"base": Base(name="b", **base), "lora": Lora(**lora), "train": Train(**train)}
    (problem,) = conflicts("fsdp2", **parts)  # type: ignore[arg-type]
    assert problem.key == key and "hardware.strategy: ddp" in problem.fix
    assert conflicts("ddp", **parts) == [] and set(STRATEGIES) == {"single", "ddp", "fsdp2", "zero3"}  # type: ignore[arg-type]
    assert [problem.key for problem in conflicts("zero3", **parts)] == [key]  # type: ignore[arg-type]


def test_zero3_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"lora": Lora(), "train": Train()}
    (problem,) = conflicts("zero3", base=Base(name="b", compute_dtype="float16"), **parts)  # type: ignore[arg-type]
    assert problem.key == "base.compute_dtype" and "bfloat16" in problem.fix
    monkeypatch.setattr("lora_tune.model.strategy.find_spec", lambda name: None)
    (problem,) = conflicts("zero3", base=Base(name="b"), **parts)  # type: ignore[arg-type]
    assert "lora_tune[zero3]" in problem.fix and "fsdp2" in problem.fix

"""Tools side by side: they take turns, who is absent is left out, who learns something else is told, tables say it."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from seldom import SELDOM

from benchmarks import memory, start, step, table
from benchmarks.peers.protocol import Job, same_start

ROOT = Path(__file__).resolve().parent.parent
DRIVER = """
import sys
sys.path.insert(0, {protocol!r})
from protocol import Turns, given
tool, folder, job = given()
print("some tool's own words", end="")
turns = Turns(("no-such-package",))
order = open(folder / "order.txt", "a")
for number in range(job.steps):
    turns.begin()
    print(tool, job.threads, file=order, flush=True)
    sum(range(100_000))
    turns.loss(job.batch - number)
    if number == {dies}:
        sys.exit("last words")
turns.finish()
"""


def peer(peers: Path, tool: str, *, dies: int = -1) -> None:
    """An environment whose Python runs a driver of ours, whatever module it is asked for."""
    python = peers / tool / "bin" / "python"
    python.parent.mkdir(parents=True)
    driver = DRIVER.format(protocol=str(ROOT / "benchmarks" / "peers"), dies=dies)
    (peers / f"{tool}.py").write_text(driver)
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -S {peers / f"{tool}.py"} "$@"\n')
    python.chmod(0o755)


def test_sides_take_turns_and_say_what_each_step_took(tmp_path: Path) -> None:
    for tool in step.OWN_ENVIRONMENT:
        peer(tmp_path, tool)
    left_out: dict[str, str] = {}
    job = Job("lora", steps=5, threads=2, batch=7)
    sides = step.one_pass(list(step.OWN_ENVIRONMENT), tmp_path, job, peers=tmp_path, left_out=left_out)
    assert left_out == {} and list(sides) == ["unsloth", "llamafactory"]
    order = (tmp_path / "order.txt").read_text().splitlines()
    assert order == ["unsloth 2", "llamafactory 2"] * 5
    row = step.row_of("unsloth", sides["unsloth"], sides["llamafactory"], job, raw=sides["llamafactory"])
    assert row["losses"] == [7, 6, 5, 4, 3] and row["final_loss"] == 3 and row["furthest_from_raw"] == 0
    assert row["tokens_per_cpu_s"] > 0 < row["tokens_per_s"] and row["peak_mib"] > 1
    assert row["versions"]["python"] and "no-such-package" not in row["versions"]
    sides["llamafactory"].steps[2]["loss"] += 0.5
    row = step.row_of("unsloth", sides["unsloth"], sides["unsloth"], job, raw=sides["llamafactory"])
    assert row["furthest_from_raw"] == 0.5 > step.TOLERANCE


def test_the_first_steps_and_the_last_do_not_count(tmp_path: Path) -> None:
    peer(tmp_path, "unsloth")
    Job("lora", steps=1, threads=1).write(tmp_path)
    side = step.Side("unsloth", tmp_path, threads=1, peers=tmp_path)
    side.end()
    side.steps = [{"cpu_s": seconds} for seconds in (90.0, 80.0, 3.0, 1.0, 2.0, 70.0)]
    assert side.seconds("cpu_s") == 2.0


@pytest.mark.parametrize("dies", [0, 2])
def test_who_is_absent_or_ends_is_left_out_with_a_line(tmp_path: Path, dies: int) -> None:
    peer(tmp_path, "llamafactory", dies=dies)
    left_out: dict[str, str] = {}
    job = Job("lora", steps=4, threads=1)
    found = step.one_pass(list(step.OWN_ENVIRONMENT), tmp_path, job, peers=tmp_path, left_out=left_out)
    assert found == {}
    assert "benchmarks/peers/README.md" in left_out["unsloth"]
    assert left_out["llamafactory"] == f"it ended after {dies} steps: last words"


def test_every_side_starts_from_the_same_adapter() -> None:
    def adapter(prefix: str, dtype: torch.dtype) -> torch.nn.Module:
        model = torch.nn.Module()
        for name, shape in (("lora_A", (4, 16)), ("lora_B", (8, 4))):
            weight = torch.nn.Parameter(torch.randn(shape).to(dtype))
            model.register_parameter(f"{prefix}layers.3.q_proj.{name}.weight".replace(".", "/"), weight)
        named = [(name.replace("/", "."), parameter) for name, parameter in model.named_parameters()]
        model.named_parameters = lambda: iter(named)  # type: ignore[method-assign, assignment, misc]
        same_start(model, 4)
        return model

    one, other = adapter("base_model.model.model.", torch.float32), adapter("model.", torch.bfloat16)
    (a, b), (c, d) = ([value for _, value in model.named_parameters()] for model in (one, other))
    assert torch.equal(a.bfloat16(), c) and not b.any() and not d.any()
    assert 0.2 < a.abs().max() <= 0.25
    with pytest.raises(AssertionError):
        same_start(torch.nn.Linear(2, 2), 4)


def test_the_protocol_imports_nothing_that_a_peer_lacks() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import protocol; print(*sys.modules)"
    command = [sys.executable, "-S", "-c", code, str(ROOT / "benchmarks" / "peers")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "protocol" in said and not {"torch", "lora_tune", "benchmarks"} & set(said)
    for name in ("with_unsloth.py", "with_llamafactory.py"):
        driver = (ROOT / "benchmarks" / "peers" / name).read_text()
        assert "lora_tune" not in driver and "from benchmarks.peers.protocol import" in driver


def test_the_minimum_is_the_published_arithmetic() -> None:
    """Llama-3.1-8B in nf4, rank 16, 2,048 tokens, recomputed: 7.2 GiB with 0.5 of context and 8-bit moments at best."""
    sizes, job = step.SHAPES["8b"], Job("qlora", 1, 1, batch=1, length=2048)
    recomputed = memory.minimum_gib(sizes, job, recomputed=32)
    assert recomputed + 0.5 == pytest.approx(7.2, abs=0.25)
    kept = memory.minimum_gib(sizes, job, recomputed=0)
    assert kept + 0.5 == pytest.approx(13.2, abs=0.4)  # research: 13.2 without recomputation, fused
    assert memory.minimum_gib(sizes, Job("lora", 1, 1, batch=1, length=2048), recomputed=32) > recomputed + 9


def test_a_step_is_seen_when_its_line_is_whole(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert not start.has_step(metrics)
    metrics.write_text('{"step": 0, "eval_loss": 1}\n{"step": 1, "loss": 2.5')
    assert not start.has_step(metrics)
    metrics.write_text('{"step": 1, "loss": 2.5}\n')
    assert start.has_step(metrics)


def test_tables_are_those_that_were_measured() -> None:
    assert table.TABLE.read_text(encoding="utf-8") == table.text(), "run python -m benchmarks.table --write"
    assert "\n".join(table.recompute_lines()) in table.KERNELS.read_text(encoding="utf-8")


def test_what_was_not_measured_is_said_so(tmp_path: Path) -> None:
    assert table.text(tmp_path).count("unmeasured") == 9
    row: dict[str, Any] = {"tool": "raw", "tokens_per_cpu_s": 10.0, "tokens_per_s": 20.0, "peak_mib": 1.0,
                           "first_step_s": 2.0, "final_loss": 3.0}  # fmt: skip
    found = {"rows": [row], "threads": [1, 2], "versions": {"raw": {"peft": "9.9"}}, "left_out": {"unsloth": "why"},
             "machine": {"processor": "p", "cores": 2, "load_before": 0.1, "commit": "abc"}}  # fmt: skip
    (tmp_path / "step_small_lora.json").write_text(json.dumps(found))
    made = table.text(tmp_path)
    assert "| LoRA, bf16 | raw PEFT loop 9.9 | 10 | 1.00 | 20 | 1 | 2.0 | 3.000 |" in made
    (tmp_path / "step_small_lora.json").write_text(json.dumps(found | {"threads": [1]}))
    assert "| 10 | 1.00 | unmeasured | 1 | 2.0 | 3.000 |" in table.text(tmp_path)
    assert "Unsloth (CPU mode) | does not run" in made and "| QLoRA, nf4 | unmeasured |" in made


def test_the_way_to_the_floor(tmp_path: Path) -> None:
    speeds = {"raw": 100.0, "floor": 200.0, "lora_tune": 160.0, "unfused": 110.0}
    rows = [{"tool": tool, "tokens_per_cpu_s": speed} for tool, speed in speeds.items()]
    on = {"processor": "p", "cores": 2, "load_before": 0.1, "commit": "abc"}
    (tmp_path / "floor_small_lora.json").write_text(json.dumps({"rows": rows, "machine": on}))
    assert "| LoRA, bf16 | 100 | 200 | 160 | 110 | 1.60 | 60% |" in table.text(tmp_path)


@SELDOM[0]
@SELDOM[1]
def test_our_trainer_learns_what_the_raw_loop_learns() -> None:
    job = Job("qlora", steps=5, threads=1, batch=2, length=64)
    result = step.measure(["lora_tune", "unfused", "raw", "trl"], shape="tiny", job=job, threads=(1,))
    assert [row["tool"] for row in result["rows"]] == ["lora_tune", "unfused", "raw", "trl"]
    assert all(row["furthest_from_raw"] < step.TOLERANCE for row in result["rows"])
    assert result["rows"][0]["losses"][0] > result["rows"][0]["final_loss"]


# --- the command lines

KEEP = {
    "attention": "--json", "budget": "--json", "context": "--json", "eval_speed": "--json", "loss_head": "--json",
    "memory": "--json", "recompute": "--json", "step": "--json", "trainer_overhead": "--json", "serve": "--output",
    "shaped_run": "--keep", "tokens": "--json",
}  # fmt: skip


def refused(module: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line with which a benchmark refuses its arguments, before anything is measured."""
    main = importlib.import_module(f"benchmarks.{module}").main
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [module, *arguments])
        main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert not said.out
    return said.err.strip().splitlines()[-1]


@pytest.mark.parametrize("module", KEEP)
def test_a_file_that_cannot_be_written_is_refused_before_measuring(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, why in ((tmp_path / "none" / "x.json", "there is no folder"), (tmp_path, "is a folder")):
        assert why in refused(module, [KEEP[module], str(place)], capsys)


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("step", ["--rounds", "0"], "argument --rounds: must be 1 or more, got '0'"),
        ("step", ["--rounds", "many"], "argument --rounds: must be 1 or more, got 'many'"),
        ("step", ["--batch", "0"], "argument --batch: must be 1 or more"),
        ("step", ["--length", "-3"], "argument --length: must be 1 or more"),
        ("step", ["--threads", "1,x"], "argument --threads: must be 1 or more, got 'x'"),
        ("step", ["--seconds", "0"], "argument --seconds: must be above 0, got '0'"),
        ("step", ["--against", "raw,torchtune"], "got torchtune"),
        ("memory", ["--batch", "0"], "argument --batch: must be 1 or more"),
        ("memory", ["--length", "0"], "argument --length: must be 1 or more"),
    ],
)
def test_an_argument_that_cannot_be_is_refused(
    module: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(module, arguments, capsys)


@pytest.mark.parametrize("module", [step, memory])
def test_the_object_is_alone_on_stdout(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a library says while it is imported or measured (DeepSpeed's logger holds on to stdout) goes to stderr."""

    def noisy(*_: Any, **__: Any) -> dict[str, Any]:
        logger.addHandler(logging.StreamHandler(sys.stdout))
        print("a library's own words")
        return {"rows": [], "left_out": {}}

    logger = logging.getLogger("tests.noisy")
    monkeypatch.setattr(module, "measure", noisy)
    monkeypatch.setattr(sys, "argv", ["module", "--json"])
    assert not module.main()
    logger.warning("later words")
    said = capsys.readouterr()
    assert json.loads(said.out)["rows"] == [] and "own words" in said.err and "later words" in said.err
    monkeypatch.setattr(sys, "argv", ["module", "--json", str(tmp_path / "kept.json")])
    assert not module.main()
    assert json.loads((tmp_path / "kept.json").read_text())["rows"] == []


@SELDOM[0]
@SELDOM[1]
@pytest.mark.parametrize("module", ["step", "memory"])
def test_the_command_prints_one_object(module: str) -> None:
    few = ["--rounds", "1", "--threads", "1", "--against", "raw"] if module == "step" else []
    command = [sys.executable, "-m", f"benchmarks.{module}", "--shape", "tiny", "--batch", "1", "--length", "64", *few]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(done.stdout)["rows"]


def test_the_help_of_saved_activations_is_a_help(capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("benchmarks.saved_activations").main
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["saved_activations", "--help"])
        main()
    assert ended.value.code == 0 and "MODEL_TYPE" in capsys.readouterr().out

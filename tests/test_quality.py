"""What stands behind the default hyper-parameters: the settings that were compared, and the kept comparison."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality
from lora_tune.recipe import Lora, Train

RESULT: dict[str, Any] = json.loads(quality.RESULT.read_text(encoding="utf-8"))
PEERS = [tool for tool in quality.TOOLS if tool != "lora_tune" and tool in {run["tool"] for run in RESULT["runs"]}]


def test_ours_are_the_defaults_of_the_recipe() -> None:
    ours, default = quality.TOOLS["lora_tune"], Train()
    assert ours.lora() == Lora()
    changed = {name for name, value in ours.train().model_dump().items() if value != getattr(default, name)}
    assert changed == {
        "learning_rate", "max_length", "micro_batch_size", "gradient_checkpointing", "optimizer", "save_every",
    }  # fmt: skip


def test_the_numbers_of_trl_are_those_of_the_installed_one() -> None:
    spec = find_spec("trl")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    script = (folder / "scripts/sft.py").read_text(encoding="utf-8")
    example = script[script.index("# LoRA") : script.index('"""\n\nimport')]
    found = dict(re.findall(r"--(\w+) ([\d.e-]+)", example))
    tool = quality.TOOLS["TRL, script"]
    assert (tool.rank, tool.alpha) == (int(found["lora_r"]), float(found["lora_alpha"]))
    assert tool.learning_rate == float(found["learning_rate"]) and ("--packing" in example) == tool.packing
    size = int(found["per_device_train_batch_size"]) * int(found["gradient_accumulation_steps"])
    assert tool.batch_size == size
    settings = (folder / "trainer/sft_config.py").read_text(encoding="utf-8")
    assert re.search(r"learning_rate: float = field\(\s*default=2e-5", settings)
    assert quality.TOOLS["TRL, bare"].learning_rate == 2e-5


def test_the_kept_results_are_of_these_settings() -> None:
    assert RESULT["settings"] == {tool: json.loads(json.dumps(asdict(made))) for tool, made in quality.TOOLS.items()}, (
        "the defaults changed: run python -m benchmarks.quality"
    )
    assert quality.RESULT.with_suffix(".md").read_text(encoding="utf-8") == quality.table(RESULT)


@pytest.mark.parametrize("data", sorted(quality.DATA))
def test_our_defaults_are_worse_than_none(data: str) -> None:
    own = quality.losses(RESULT["runs"], data, "lora_tune")
    assert own
    for tool in PEERS:
        if tool == quality.CONTROL:
            continue
        found = quality.losses(RESULT["runs"], data, tool)
        shared = sorted(own.keys() & found.keys())
        assert all(own[seed] <= found[seed] for seed in shared) and shared, tool
        if len(shared) > 1:
            assert quality.interval([own[s] for s in shared], [found[s] for s in shared])[2] < 0, tool


@pytest.mark.parametrize("data", sorted(quality.DATA))
def test_five_seeds_of_every_side_were_compared(data: str) -> None:
    seeds = {tool: len(quality.losses(RESULT["runs"], data, tool)) for tool in quality.TOOLS}
    assert min(seeds.values()) >= 5, seeds


def test_our_defaults_are_worse_than_none_in_the_same_time() -> None:
    equal = RESULT["equal_time"]
    assert {epoch["data"] for epoch in equal["epochs"]} == set(quality.DATA)
    for epoch in equal["epochs"]:
        data, tool = epoch["data"], epoch["tool"]
        steps, own = (
            quality.steps_in_our_time(equal["epochs"], data, tool),
            quality.losses(RESULT["runs"], data, "lora_tune"),
        )
        found = quality.losses(equal["runs"], data, tool)
        assert len(found) == (5 if steps else 0) and all(own[seed] < loss for seed, loss in found.items()), tool
        assert all(run["steps"] == steps for run in equal["runs"] if (run["data"], run["tool"]) == (data, tool))


def test_what_takes_less_than_our_epoch_goes_on() -> None:
    took = {"lora_tune": (10, 30.0), "quick": (8, 20.0), "slow": (9, 31.0)}
    epochs = [{"data": "d", "tool": tool, "steps": steps, "cpu_s": s} for tool, (steps, s) in took.items()]
    found = {tool: quality.steps_in_our_time(epochs, "d", tool) for tool in took}
    assert found == {"lora_tune": None, "quick": 12, "slow": None}


def test_the_interval_is_students() -> None:
    mean, low, high = quality.interval([1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 2.0, 1.0, 4.0, 3.0])
    assert mean == pytest.approx(1.0)
    assert (low, high) == pytest.approx((1 - 2.776 / 5**0.5, 1 + 2.776 / 5**0.5))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tools", "lora_tune,torchtune"], "argument --tools: knows lora_tune, "),
        (["--tools", "lora_tune,"], "got ''"),
        (["--data", "quickstart,alpaca"], "argument --data: knows quickstart, gsm8k, got 'alpaca'"),
        (["--seeds", "0"], "argument --seeds: must be 1 or more, got '0'"),
        (["--out", "/nonexistent/x.json"], "argument --out: there is no folder /nonexistent"),
        (["--json", "/nonexistent/x.json"], "argument --json: there is no folder /nonexistent"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality, "Bench", lambda *_: pytest.fail("it began"))
    monkeypatch.setattr(sys, "argv", ["quality", *arguments])
    with pytest.raises(SystemExit) as ended:
        quality.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_every_tool_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in quality.TOOLS:
        assert quality.known_tools(tool.replace(", ", "_ ")) == [tool]
    assert quality.known_tools(",".join(quality.TOOLS).replace(", ", "_ ")) == list(quality.TOOLS)


def test_json_is_one_object_of_all_that_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Bench:
        def __init__(self, corpus: Path | None) -> None:
            print("a library's own words")

        def run(self, data: str, settings: Any, **given: Any) -> dict[str, Any]:
            return {**RESULT["runs"][0], "data": data, "seed": given["seed"]}

    monkeypatch.setattr(quality, "Bench", Bench)
    out, kept = tmp_path / "out.json", tmp_path / "kept.json"
    few = ["quality", "--tools", "lora_tune", "--data", "quickstart", "--seeds", "2", "--out", str(out), "--json"]
    monkeypatch.setattr(sys, "argv", few)
    quality.main()
    said = capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*few, str(kept)])  # everything is there already
    quality.main()
    assert json.loads(said.out) == json.loads(out.read_text()) == json.loads(kept.read_text())
    assert [run["seed"] for run in json.loads(said.out)["runs"]] == [0, 1] and "own words" in said.err

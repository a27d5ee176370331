"""What cannot be here is refused before the data is read, on one line that names its key; a plan is for any machine."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_tune import run as run_module
from lora_tune.cli import main
from lora_tune.errors import UsageError
from lora_tune.model import base as base_module
from lora_tune.model import hub, missing
from lora_tune.model.source import BaseSource
from lora_tune.recipe import Base, Train

Printed = pytest.CaptureFixture[str]


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe on a machine without a compiler and without flash-attn, whose data must not be read."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(run_module, "_prepare", lambda *_, **__: pytest.fail("the data was read"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"{n}", "completion": "x"}) for n in range(20)))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"base: {{name: {tiny_base}, quantize: none}}\ndata: [{{source: {rows}}}]\noutput: {tmp_path / 'out'}\n"
        "train: {max_length: 64}\n"
    )
    return path


CASES = {
    "base.attention=flash_attention_2": ("base.attention: flash_attention_2 needs the package flash_attn", "auto"),
    "train.compile=layers": ("train.compile: layers cannot be compiled here: there is no C++ compiler", "off"),
    "train.gradient_checkpointing=1000": ("train.gradient_checkpointing: the base has 2 layers, got 1000", "all"),
}


@pytest.mark.parametrize("override", CASES)
def test_a_run_refuses_what_cannot_be_before_its_data_is_read(override: str, recipe: Path, capsys: Printed) -> None:
    said, fix = CASES[override]
    assert main(["run", str(recipe), override]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line and f"; set it to {fix}" in line and ".;" not in line


def test_all_that_is_missing_is_said_at_once(recipe: Path, capsys: Printed) -> None:
    assert main(["run", str(recipe), *CASES]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3 and all(any(said in line for line in lines) for said, _ in CASES.values())


@pytest.mark.parametrize("override", CASES)
def test_a_plan_is_not_for_this_machine_alone(override: str, recipe: Path, capsys: Printed) -> None:
    code = main(["plan", str(recipe), override, "--gpu", "rtx4090", "--json"])
    problems = json.loads(capsys.readouterr().out)["problems"]
    of_the_base = override.startswith("train.gradient_checkpointing")
    assert code == (2 if of_the_base else 0)
    assert [problem["key"] for problem in problems if problem["severity"] == "error"] == (
        ["train.gradient_checkpointing"] if of_the_base else []
    )


@pytest.mark.parametrize("layers", [0, 1, 2, "all", "none", "auto"])
def test_as_many_layers_as_the_base_has_may_be_checkpointed(layers: Any, recipe: Path, capsys: Printed) -> None:
    assert main(["plan", str(recipe), f"train.gradient_checkpointing={layers}"]) == 0
    assert "gradient_checkpointing: the base" not in capsys.readouterr().err


def test_no_weights_are_downloaded_for_what_is_refused(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.setattr(hub, "download", lambda *_, **__: pytest.fail("weights were downloaded"))
    config = json.loads((tiny_base / "config.json").read_text())
    source = BaseSource("nobody/nothing", "hub", tiny_base, "0" * 40, config)
    with pytest.raises(UsageError, match=r"^base\.attention: flash_attention_2 needs the package") as caught:
        base_module.load_base(source, Base(name=source.name, attention="flash_attention_2"))
    assert caught.value.problems[0].key == "base.attention"


@pytest.mark.parametrize(
    ("device", "installed", "found", "said"),
    [
        ("cuda", ("triton",), ("gcc",), ""),
        ("cuda", ("triton",), ("g++",), "there is no C compiler"),
        ("cuda", (), ("gcc",), "Triton is not installed"),
        ("cpu", (), ("clang++",), ""),
        ("cpu", ("triton",), ("gcc",), "there is no C++ compiler"),
    ],
)
def test_what_compiling_needs(
    device: Any, installed: tuple[str, ...], found: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in found else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    problems = [str(problem) for problem in missing.compiler_problems(device)]
    assert len(problems) == bool(said) and all(said in problem for problem in problems)


def test_flash_attention_needs_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    asked = Base(name="x", attention="flash_attention_2")
    assert not list(missing.attention_problems(asked, "cuda"))
    (problem,) = missing.attention_problems(asked, "cpu")
    assert "needs a GPU" in problem.reason
    assert missing.missing_problems(Base(name="x"), Train()) == []

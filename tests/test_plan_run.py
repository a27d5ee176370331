"""A run takes the plan's choice, and what does not fit ends before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_tune.cli import main
from lora_tune.model import base as base_module
from lora_tune.model import memory
from lora_tune.model.cards import CARDS
from lora_tune.model.device import Machine


def test_what_does_not_fit_ends_before_a_weight_is_read(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"Add {n} and 1.", "output": str(n + 1)} for n in range(40)]
    rows.write_text("\n".join(map(json.dumps, lines)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {{name: {tiny_base}, quantize: none}}\ndata: [{{source: {rows}}}]\n"
        f"train: {{max_length: 256}}\noutput: {tmp_path / 'out'}\n"
    )
    full = Machine("cuda", "NVIDIA GeForce RTX 4090", 0.4, 24.0, CARDS["rtx4090"])
    monkeypatch.setattr(memory, "this_machine", lambda: full)
    monkeypatch.setattr(base_module, "load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    assert main(["run", str(recipe)]) == 4
    problem = capsys.readouterr().err.strip().splitlines()[-1]
    assert "GiB" in problem and "got 0.4 GiB free" in problem and problem.count("; or ") == 2
    assert not (tmp_path / "out").exists()

"""Every shipped recipe trains two steps on the embedded base with local data put in by overrides, and is verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import warm

from lora_tune.adapter.folder import read_manifest
from lora_tune.cli import main

ROOT = Path(__file__).resolve().parent.parent
MIXTURES = ("flan_mixture.yaml", "gsm8k.yaml", "sni.yaml", "t0_mixture.yaml")  # test_mixture_recipes.py runs them
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.yaml") if path.name not in MIXTURES)
SMALL = ("train.max_steps=2", "train.batch_size=4", "train.max_length=256", "eval.max_rows=4", "eval.samples=1")
LIMITS = ("limits.dropped_rows=100%", "limits.lost_tokens=100%", "limits.lost_end_tokens=100%")
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def alpaca(number: int) -> dict[str, object]:
    """A row of the Alpaca format."""
    return {"instruction": f"Add {number} and 1.", "input": "", "output": f"It is {number + 1}."}


def messages(number: int) -> dict[str, object]:
    """A conversation of two turns each."""
    turns = [("user", f"Say {number}."), ("assistant", f"{number}."), ("user", "Again."), ("assistant", f"{number}!")]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def tools(number: int) -> dict[str, object]:
    """A ShareGPT conversation with a call of a tool."""
    call = json.dumps({"name": "weather", "arguments": {"day": number}})
    turns = [
        ("human", f"Weather on day {number}?"),
        ("function_call", call),
        ("observation", "sunny"),
        ("gpt", "Sunny."),
    ]
    return {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": json.dumps([WEATHER])}


DATA = {
    "alpaca.yaml": (alpaca, "alpaca"),
    "alpaca_8gb.yaml": (alpaca, "alpaca"),
    "chat.yaml": (messages, "messages"),
    "tools.yaml": (tools, "sharegpt"),
    "my_data.yaml": (messages, "messages"),
    "quickstart.yaml": (alpaca, "alpaca"),
}


def test_every_recipe_has_data_here() -> None:
    assert sorted(DATA) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_on_the_embedded_base(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.run", warm.instead)
    row, format_ = DATA[name]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in range(40)))
    here = ("base.name=builtin:quickstart", "data.0.source=rows.jsonl", f"data.0.format={format_}", "eval.hold_out=4")
    code = main(["run", str(ROOT / "recipes" / name), *here, "output=out", *SMALL, *LIMITS])
    assert code == 0, capsys.readouterr().err
    manifest = read_manifest(tmp_path / "out")
    assert manifest.training.steps == 2 and "micro-batch" in str(manifest.training.plan)
    assert manifest.base.name == "builtin:quickstart"
    assert manifest.scores["loss"].rows > 0

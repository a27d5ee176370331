"""Real data sets of other people go through the whole command on the embedded base, in the form in which they come."""

from __future__ import annotations

from pathlib import Path

import pytest
import warm
from seldom import often

from lora_tune.adapter.folder import read_manifest, read_part
from lora_tune.cli import main

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "train.max_steps=2", "train.batch_size=2", "train.max_length=512", "train.too_long=drop", "eval.hold_out=4",
    "data.0.max_rows=120",
    "eval.samples=1", "limits.dropped_rows=100%", "limits.lost_end_tokens=100%",
)  # fmt: skip
# name: (recipe, source in the corpus, its settings, format that must come out, rows read)
REAL: dict[str, tuple[str, str, tuple[str, ...], str, int]] = {
    "alpaca": ("alpaca.yaml", "llamafactory/alpaca_en_demo.json", (), "alpaca", 999),
    "tool calls": ("tools.yaml", "llamafactory/glaive_toolcall_en_demo.json", (), "sharegpt", 300),
    "gsm8k": (
        "my_data.yaml",
        "gsm8k/test.jsonl",
        ("data.0.format=prompt_completion", "data.0.columns={prompt: question, completion: answer}"),
        "prompt_completion",
        1319,
    ),
    "multi-turn": ("chat.yaml", "parquet/turkish_dialogues_test.jsonl", (), "messages", 525),
    "t0": ("my_data.yaml", "t0/ag_news_classify_with_choices.jsonl", ("data.0.format=auto",), "prompt_completion", 200),
}


@pytest.mark.parametrize("name", often(list(REAL), kept=("alpaca", "tool calls")))
def test_real_rows_become_an_adapter(
    name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.run", warm.instead)
    recipe, source, settings, format_, rows = REAL[name]
    path = corpus / "data" / "datasets" / source
    here = ("base.name=builtin:quickstart", f"data.0.source={path}", "output=out")
    code = main(["run", str(ROOT / "recipes" / recipe), *here, *settings, *SMALL])
    assert code == 0, capsys.readouterr().err
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.data[0].format, manifest.training.steps) == (format_, 2)
    account = read_part(tmp_path / "out", "ledger.json")["sources"][0]["rows"]
    assert account["read"] == rows
    dropped = sum(count["rows"] for count in account["dropped"].values())
    assert account["read"] == account["kept"] + account["held_out"] + account["left_by_max_rows"] + dropped

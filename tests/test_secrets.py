"""Nothing in an adapter folder tells whose machine it was: canaries in every place that could leak."""

from __future__ import annotations

import getpass
import json
import pickletools
import socket
from dataclasses import replace
from pathlib import Path

import finished
import pytest
import tiny

from lora_tune.adapter.card import Sample
from lora_tune.adapter.folder import FILES
from lora_tune.adapter.write import write_run
from lora_tune.cli import main

CANARY = "hf_CanaryCanaryCanary0123456789"
HOST = "canary-host-7f3a"
USER = "canaryuser7f3a"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder written on a machine full of canaries: environment, home, host, user, paths, tokenizer settings."""
    home = tmp_path / "home" / USER
    base = tiny.write_base(home / "models" / "base")
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_SECRET"):
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", USER)
    monkeypatch.setenv("LOGNAME", USER)
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    recipe = finished.recipe_for(
        base, eval={"hold_out": str(home / "held.jsonl")}, lora={"start_from": str(home / "old")}
    )
    recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"start_from": None})})
    model = finished.trained_model(recipe)
    run = finished.finished_run(recipe, model)
    run.chat.tokenizer.init_kwargs |= {
        "hub_token": CANARY,
        "token": CANARY,
        "cache_dir": str(home),
        "name_or_path": str(base),
    }
    config = {**run.adapter.config, "base_model_name_or_path": str(base)}
    run = replace(
        run,
        recipe=recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"start_from": str(home / "old")})}),
        adapter=replace(run.adapter, config=config),
        samples=(Sample("Who?", "Ann", CANARY, "Ann"),),
        ledger={"total": {"read": 1}, "sources": [{"example": CANARY}]},
    )
    out = tmp_path / "out"
    out.mkdir()
    write_run(out, run)
    return out


def test_no_canary_in_any_file(folder: Path, tmp_path: Path) -> None:
    forbidden = [CANARY, HOST, USER, str(tmp_path), str(tmp_path)[1:], str(Path.home()), getpass.getuser()]
    for path in folder.rglob("*"):
        content = path.read_bytes()
        found = [word for word in forbidden if word.encode() in content or word.encode("utf-16-le") in content]
        assert found == [], (path.name, found)
        assert path.name in FILES


def test_no_file_is_a_pickle(folder: Path) -> None:
    for path in folder.rglob("*"):
        with pytest.raises(Exception):  # noqa: B017  (pickletools raises whatever it meets)
            list(pickletools.genops(path.read_bytes()[:100_000]))
        assert path.suffix not in (".bin", ".pt", ".pkl")


def test_no_json_value_is_an_absolute_path(folder: Path) -> None:
    def strings(value: object) -> list[str]:
        if isinstance(value, dict):
            return [text for item in value.items() for part in item for text in strings(part)]
        if isinstance(value, list):
            return [text for item in value for text in strings(item)]
        return [value] if isinstance(value, str) else []

    for path in folder.glob("*.json"):
        if path.name == "tokenizer.json":
            continue  # its vocabulary holds every byte, "/" among them
        paths = [text for text in strings(json.loads(path.read_text())) if len(text) > 1 and Path(text).is_absolute()]
        assert paths == [], path.name


def test_no_canary_in_a_merged_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "home" / USER / "models" / "base"
    assert main(["merge", str(folder), "--output", str(tmp_path / "merged"), "--base", str(base)]) == 0
    assert CANARY not in capsys.readouterr().out
    for path in (tmp_path / "merged").iterdir():
        content = path.read_bytes()
        assert [word for word in (CANARY, HOST, USER, str(tmp_path)) if word.encode() in content] == [], path.name

"""The recipes of mixtures train two steps on the embedded base, with published rows put in by overrides."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import warm
from test_recipes_run import MIXTURES, ROOT

from lora_tune.adapter.folder import read_manifest
from lora_tune.cli import main
from lora_tune.recipe_file import read_recipe

SMALL = ("train.max_steps=2", "train.batch_size=2", "base.quantize=none", "eval.max_rows=2", "eval.samples=0")
FEW = 16  # rows of a source
SHORT = 400  # characters of a text


@pytest.fixture(scope="module")
def local(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """{name of a data set: path of a file with a few short rows of it}, made when asked for."""
    folder = tmp_path_factory.mktemp("rows")
    spec = importlib.util.spec_from_file_location("t0_rows", ROOT / "benchmarks" / "t0_rows.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sets: dict[str, list[dict[str, Any]]] = module.raw_rows(corpus / "data" / "datasets" / "t0")
    # of the same columns as the sources of the recipes; inference is no part of the published T0 training rows
    sets["nli"] = [
        {"premise": r["sentence1"], "hypothesis": r["sentence2"], "label": 2 - 2 * r["label"]}
        for r in sets["glue__mrpc"]
    ][FEW:]
    sets["cnn"] = [{"article": row["document"][:SHORT], "highlights": row["summary"]} for row in sets["xsum"]]
    sets["commonsense"] = [
        {
            "question": row["question"],
            "choices": {"label": list("ABCD"), "text": [row[f"answer{number}"] for number in range(4)]},
            "answerKey": "ABCD"[row["label"]],
        }
        for row in sets["cosmos_qa"]
    ]
    for part in ("train", "test"):
        lines = (corpus / "data" / "datasets" / "gsm8k" / f"{part}.jsonl").read_text().splitlines()
        sets[f"gsm8k_{part}"] = [json.loads(line) for line in lines if len(line) < 240]
    sets["imdb"] = [{**row, "text": row["text"][:SHORT]} for row in sets["imdb"]]

    def path(name: str) -> str:
        written = folder / f"{name}.jsonl"
        written.write_text("".join(json.dumps(row) + "\n" for row in sets[name][:FEW]))
        return str(written)

    return path


def overrides(name: str, local: Callable[[str], str], corpus: Path) -> list[str]:
    """The sources of a recipe, replaced by local ones in their order."""
    if name == "gsm8k.yaml":
        sources = [local("gsm8k_train"), local("gsm8k_test")]
    elif name == "sni.yaml":
        folder = corpus / "data" / "datasets" / "natural_instructions"
        train = {"source": str(folder / "task363*" / "train.json"), "format": "sni", "shots": 2, "max_rows": FEW}
        apart = {"source": str(folder / "task1687*" / "dev.json"), "format": "sni", "task": "unseen tasks"}
        return [f"data={json.dumps([train, apart])}"]
    elif name == "t0_mixture.yaml":
        names = ("glue__mrpc", "paws__labeled_final", "ag_news", "imdb", "cnn", "commonsense", "nli")
        sources = [local(part) for part in names]
    else:
        sources = [*map(local, ("glue__mrpc", "ag_news", "imdb", "commonsense"))]
        sources += [local("gsm8k_train"), local("nli")]
    recipe = read_recipe(ROOT / "recipes" / name).recipe
    assert len(sources) == len(recipe.data)
    there = ["config", "revision"]
    entries = []
    for source, entry in zip(sources, recipe.data, strict=True):
        kept = {key: value for key, value in entry.model_dump(exclude_defaults=True).items() if key not in there}
        entries.append({**kept, "source": source, "max_rows": FEW} | ({"split": "train"} if "split" in kept else {}))
    return [f"data={json.dumps([{k: v for k, v in entry.items() if k != 'split'} for entry in entries])}"]


@pytest.mark.parametrize("name", MIXTURES)
def test_two_steps_on_the_embedded_base(
    name: str, local: Callable[[str], str], corpus: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.run", warm.instead)
    given = [*overrides(name, local, corpus), "base.name=builtin:quickstart", "output=out", *SMALL]
    given += [f"train.max_length={448 if name == 'sni.yaml' else 256}"]
    given += ["limits={dropped_rows: 100%, lost_tokens: 100%, lost_end_tokens: 100%}"]
    code = main(["run", str(ROOT / "recipes" / name), *given, "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err + printed.out
    found = json.loads(printed.out)
    recipe = read_recipe(ROOT / "recipes" / name).recipe
    (apart,) = recipe.eval.hold_out_tasks
    assert found["training"]["steps"] == 2
    assert set(found["tasks"][apart]) >= set(recipe.metrics) and found["tasks"][apart]["loss"]["rows"] > 0
    if name != "sni.yaml":
        assert len(found["tasks"][apart]["templates"]) == {"gsm8k.yaml": 2}.get(name, 3)
    assert read_manifest(tmp_path / "out").scores["loss"].rows > 0

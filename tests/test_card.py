"""The model card: metadata that the hub reads, numbers, samples, nothing that breaks out of its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import finished
import pytest
from huggingface_hub import ModelCard

from lora_tune.adapter.card import Sample, base_license, model_card
from lora_tune.adapter.folder import BaseRecord, Manifest
from lora_tune.adapter.write import FinishedRun, write_run
from lora_tune.model.source import BaseSource, find_base


@pytest.fixture(scope="module")
def run(tiny_base: Path) -> FinishedRun:
    recipe = finished.recipe_for(tiny_base)
    return finished.finished_run(recipe, finished.trained_model(recipe))


@pytest.fixture(scope="module")
def manifest(run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_run(tmp_path_factory.mktemp("card"), run)


def _card(run: FinishedRun, manifest: Manifest, *, source: BaseSource | None = None) -> str:
    return model_card(
        manifest,
        name="mine",
        recipe=run.recipe,
        config=run.adapter.config,
        samples=run.samples,
        source=source or run.source,
    )


def test_metadata_of_a_hub_base(run: FinishedRun, manifest: Manifest) -> None:
    base = BaseRecord(**{**manifest.base.model_dump(), "kind": "hub", "name": "org/base", "revision": "1" * 40})
    card = ModelCard(_card(run, manifest.model_copy(update={"base": base})))
    assert card.data.base_model == "org/base"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert card.data.datasets == ["org/data"]  # the local file is none of the hub's
    assert 'from_pretrained("org/base", revision="' in card.text


@pytest.mark.parametrize("kind, name", [("local", "base"), ("builtin", "builtin:quickstart")])
def test_a_base_that_is_not_on_the_hub_is_not_named_to_it(
    kind: str, name: str, run: FinishedRun, manifest: Manifest
) -> None:
    base = manifest.base.model_copy(update={"kind": kind, "name": name})
    card = ModelCard(_card(run, manifest.model_copy(update={"base": base})))
    assert card.data.base_model is None and "base_model_relation" not in card.data.to_dict()
    assert name.removeprefix("builtin:") in card.text


def test_the_licence_is_the_bases_or_said_to_be_unknown(run: FinishedRun, manifest: Manifest, tmp_path: Path) -> None:
    assert ModelCard(_card(run, manifest)).data.license == "other"
    assert "Unknown" in _card(run, manifest)
    (tmp_path / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\n# Base\n")
    licensed = replace(run.source, folder=tmp_path)
    assert base_license(licensed) == "apache-2.0"
    assert ModelCard(_card(run, manifest, source=licensed)).data.license == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: [a\n---\nlicense: mit\n")
    assert base_license(licensed) is None


def test_numbers_stand_in_the_card(run: FinishedRun, manifest: Manifest) -> None:
    card = _card(run, manifest)
    for shown in ("-2.25 [-2.5, -2]", "| 40 |", "290", "rows.jsonl", "loss.png", "adapters verify", "peft 0."):
        assert shown in card
    assert "Not measured" in _card(run, manifest.model_copy(update={"scores": {}}))


def test_hostile_texts_stay_in_their_place(run: FinishedRun, manifest: Manifest) -> None:
    """Whatever a sample or a file name holds, the card keeps its sections, and front matter its keys."""
    nasty = "```\n---\nlicense: mit\n---\n# Scores\n| a | b |\n" + "`" * 9
    data = manifest.data[0].model_copy(update={"name": "a|b\n## evil.jsonl"})
    hostile = replace(run, samples=(Sample(nasty, nasty, nasty, "x" * 9000),))
    text = _card(hostile, manifest.model_copy(update={"data": (data,)}))
    outside, fence = [], None
    for line in text.splitlines():
        mark = line[: len(line) - len(line.lstrip("`"))]
        if fence is None and len(mark) >= 3:
            fence = mark
        elif fence is not None and line == fence:
            fence = None
        elif fence is None:
            outside.append(line)
    headings = [line for line in outside if line.startswith("#")]
    titles = ("Scores", "Before and after", "Load it", "Trained on", "Training", "Verified", "Licence")
    assert headings == ["# mine", *(f"## {title}" for title in titles)]
    assert fence is None and ModelCard(text).data.license == "other"
    assert len(text) < 20_000


def test_new_tokens_that_need_room_are_said(tiny_base: Path, tmp_path: Path) -> None:
    recipe = finished.recipe_for(tiny_base, lora={"new_tokens": ["<a>", "<b>"]})
    run = finished.finished_run(recipe, finished.trained_model(recipe))
    write_run(tmp_path, run)
    assert "resize_token_embeddings(262)" in (tmp_path / "README.md").read_text()
    assert find_base(recipe.base).config["vocab_size"] == 260

"""The JSON Schema of manifest.json: what the model says; takes real manifests, refuses what the model refuses."""

from __future__ import annotations

import copy
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from lora_tune.adapter.folder import Manifest

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "adapters" / "manifest.schema.json"
EXAMPLE: dict[str, Any] = json.loads((ROOT / "adapters" / "example" / "manifest.json").read_text())
BREAK: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another format": lambda m: m.update(format=2),
    "no format": lambda m: m.pop("format"),
    "no base": lambda m: m.pop("base"),
    "no hashes": lambda m: m.pop("files"),
    "an unknown key": lambda m: m.update(comment="x"),
    "an unknown key of the base": lambda m: m["base"].update(path="x"),
    "a short hash": lambda m: m["files"]["README.md"].update(sha256="ab"),
    "a hash in capitals": lambda m: m["files"]["README.md"].update(sha256="A" * 64),
    "a negative size": lambda m: m["files"]["README.md"].update(size=-1),
    "another quantization": lambda m: m["base"].update(quantize="int4"),
    "another kind of base": lambda m: m["base"].update(kind="path"),
    "stop tokens as text": lambda m: m["chat"].update(stop_ids="2"),
    "steps as text": lambda m: m["training"].update(steps="many"),
    "data that is no list": lambda m: m.update(data={}),
    "a score without its interval": lambda m: m["scores"].update(loss={"base": 1.0, "adapter": 0.5, "rows": 3}),
    "another direction": lambda m: next(iter(m["scores"].values())).update(direction="sideways"),
}


def _schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def test_the_file_is_what_the_model_says() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "manifest_schema.py"))
    assert FILE.read_text() == made["text"](), "python docs/manifest_schema.py writes it again"


def test_the_example_is_accepted() -> None:
    jsonschema.Draft202012Validator.check_schema(_schema())
    jsonschema.Draft202012Validator(_schema()).validate(EXAMPLE)


@pytest.mark.parametrize("fault", BREAK)
def test_what_is_broken_is_refused_by_schema_and_model(fault: str) -> None:
    broken = copy.deepcopy(EXAMPLE)
    BREAK[fault](broken)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(_schema()).validate(broken)
    if fault != "no format":  # `read_manifest` asks for it before the model does
        with pytest.raises(ValidationError):
            Manifest.model_validate(broken)


def test_its_version_is_the_formats() -> None:
    found = _schema()
    assert (
        found["$id"].endswith(f":{EXAMPLE['format']}") and found["properties"]["format"]["const"] == EXAMPLE["format"]
    )

"""The benchmark for a base of a given shape reads what a run really writes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path


def test_the_summary_is_taken_from_the_manifest_of_a_real_run(root: Path) -> None:
    spec = importlib.util.spec_from_file_location("shaped_run", root / "benchmarks" / "shaped_run.py")
    assert spec and spec.loader
    shaped_run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shaped_run)
    folder = root / "adapters" / "example"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    found = shaped_run.summary(folder, shape="tiny", wall_s=1.0)
    assert found["training"]["peak_gib"] == manifest["training"]["peak_gib"] > 0
    assert found["versions"]["peft"] == manifest["libraries"]["peft"]

"""Writes recipes/serve/*.yaml, the example deployment that docs/serving_many.md describes."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_deploy import EXAMPLE, FORMS  # noqa: E402

from lora_tune.serving.deploy import render_vllm_deployment  # noqa: E402

for form in FORMS:
    path = ROOT / "recipes" / "serve" / f"{form}.yaml"
    path.write_text(render_vllm_deployment(EXAMPLE, to=form), encoding="utf-8")

"""Writes adapters/manifest.schema.json, the JSON Schema of manifest.json:  python docs/manifest_schema.py"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lora_tune.adapter.folder import FORMAT, Manifest

FILE = Path(__file__).resolve().parents[1] / "adapters" / "manifest.schema.json"


def schema() -> dict[str, Any]:
    """The schema of this format's manifest (JSON Schema 2020-12)."""
    content = Manifest.model_json_schema()
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:lora_tune:adapter-manifest:{FORMAT}",
        "$comment": f"format {FORMAT}; a change that readers of it would refuse is another format with another $id",
    }
    required = [*content.pop("required"), "format"]
    return {**head, **content, "required": sorted(required)}


def text() -> str:
    """The file's content."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    sys.stdout.write(f"{FILE.name} written\n")

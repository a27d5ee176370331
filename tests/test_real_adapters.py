"""The table of strangers' adapters in the documentation is what inspect and verify say of them today."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_is_up_to_date(corpus: Path) -> None:
    document = runpy.run_path(str(ROOT / "docs" / "real_adapters.py"))["document"]
    assert (ROOT / "docs" / "real_adapters.md").read_text(encoding="utf-8") == document(corpus)

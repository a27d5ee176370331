"""What takes long and is made every night: `make nightly` sets LORA_TUNE_ENGINES_REQUIRED, `make test` skips it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
from _pytest.mark.structures import ParameterSet

SELDOM = (
    pytest.mark.nightly,
    pytest.mark.skipif("LORA_TUNE_ENGINES_REQUIRED" not in os.environ, reason="takes long: make nightly"),
)


def often(names: Sequence[str], *, kept: Sequence[str]) -> list[ParameterSet]:
    """The names as parameters, those that are not kept made every night."""
    return [pytest.param(name, marks=() if name in kept else SELDOM, id=str(name)) for name in names]

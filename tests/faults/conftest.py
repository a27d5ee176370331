"""The injector, compiled at test time from the corpus, and a grid of cases under it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cases import Grid
from tests.faults.driver import build_injector


@pytest.fixture(scope="session")
def grid(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grid]:
    """Cases under the corpus' injector; the servers end with the session."""
    folder = tmp_path_factory.mktemp("faults")
    with Grid(build_injector(corpus, folder), folder, proof="left out") as made:
        yield made

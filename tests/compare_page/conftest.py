"""Fixtures of the compare page: the quickstart base with the example adapter, twice, and pages in Chromium.

Needs Chromium (LORA_TUNE_CHROMIUM, or `chromium` on the path); skipped without, failed where it is required.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_kit import BASE, Opener
from page_server import EXAMPLE, Servers
from serving_kit import base_section
from test_report_browser import browser  # noqa: F401  (a fixture)

from lora_tune.serving.local import LocalBackend
from lora_tune.serving.settings import ServeSettings


@pytest.fixture(scope="module")
def votes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of votes."""
    return tmp_path_factory.mktemp("votes") / "votes.jsonl"


@pytest.fixture(scope="module")
def backend() -> LocalBackend:
    """The quickstart base with the example adapter, twice."""
    return LocalBackend.start(base_section(BASE), adapters={"example": EXAMPLE, "twin": EXAMPLE})


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    """Servers that are ended with the module."""
    started = Servers()
    yield started
    started.close()


@pytest.fixture(scope="module")
def url(servers: Servers, backend: LocalBackend, votes: Path) -> str:
    """The address of a server without a token that keeps votes."""
    return servers.start(backend, ServeSettings(votes=votes)).url


@pytest.fixture
def opened(browser: Any) -> Iterator[Opener]:  # noqa: F811
    """Opens pages."""
    opener = Opener(browser)
    yield opener
    opener.close()

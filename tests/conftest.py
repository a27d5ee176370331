"""Shared fixtures: a tiny base, the corpus of odd inputs, and an environment without network, colours or secrets."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

_CACHE = tempfile.TemporaryDirectory(prefix="lora_tune-cache-")  # of token rows; gone with the process
os.environ.update(
    LORA_TUNE_CACHE=_CACHE.name,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    NO_COLOR="1",
    MPLBACKEND="Agg",
)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # started under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
for name in ("HF_TOKEN", "FORCE_COLOR", "CLICOLOR_FORCE"):
    os.environ.pop(name, None)

import tiny  # noqa: E402  (after the environment is set)

from lora_tune.errors import LoraTuneError, Problem  # noqa: E402
from lora_tune.recipe_file import RecipeFile, read_recipe  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = str(ROOT)  # processes that tests start run this checkout
# Machines differ in speed, and a run that fails must fail again.
settings.register_profile("lora_tune", deadline=None, derandomize=True)
settings.load_profile("lora_tune")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a two-layer random Llama with a byte-level tokenizer (260 tokens) and a ChatML template."""
    return tiny.write_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The folder of odd and hostile inputs, by LORA_TUNE_CORPUS; skipped without it, failed where it is required."""
    named = os.environ.get("LORA_TUNE_CORPUS", "")
    if named and Path(named).is_dir():
        return Path(named)
    if os.environ.get("LORA_TUNE_CORPUS_REQUIRED") == "1":
        pytest.fail(f"LORA_TUNE_CORPUS must name the corpus folder, got {named!r}")
    pytest.skip("LORA_TUNE_CORPUS does not name the corpus folder")


@pytest.fixture
def recipe_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RecipeFile]:
    """Reads a text as the recipe `recipe.yaml` in the working folder, with overrides."""
    monkeypatch.chdir(tmp_path)

    def read(text: str | bytes, *overrides: str) -> RecipeFile:
        Path("recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_recipe(Path("recipe.yaml"), overrides=overrides)

    return read


@pytest.fixture
def problems_in(recipe_from: Callable[..., RecipeFile]) -> Callable[..., tuple[Problem, ...]]:
    """The problems of a recipe's text that must be refused with exit code 2."""

    def of(text: str | bytes, *overrides: str) -> tuple[Problem, ...]:
        with pytest.raises(LoraTuneError) as caught:
            recipe_from(text, *overrides)
        assert caught.value.exit_code == 2
        return caught.value.problems

    return of


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` run only where a CUDA device is."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))

"""A short sample of `make soak`: load, adapters that come and go, hostile requests; the server as it is run."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest
from http_kit import serving
from serving_kit import base_section, write_adapter

from benchmarks.soak import damaged, hostile, soak, table
from lora_tune.serving.engine import Limits
from lora_tune.serving.local import LocalBackend
from lora_tune.serving.settings import ServeSettings


def test_a_few_seconds_of_everything_at_once(tiny_base: Path, tmp_path: Path) -> None:
    folders = {name: write_adapter(tmp_path / name, tiny_base, seed=seed) for seed, name in enumerate(("a", "b", "c"))}
    guest = folders.pop("c")
    broken = damaged(guest, tmp_path / "broken")
    backend = LocalBackend.start(base_section(tiny_base), adapters=folders, limits=Limits(rows=8, queue=64))
    with serving(backend, ServeSettings(loading=tmp_path)) as (running,):
        found = asyncio.run(soak(running.url, list(folders), (guest, broken), psutil.Process(), seconds=4))
        counted = backend.statistics()
    assert found.problems() == [] and found.honest[200] > 20
    assert found.changes["unloaded"] >= 1 and sum(found.hostile.values()) >= 5
    assert counted.running == counted.waiting == 0
    assert "nothing amiss" in table(found, minutes=0.1)


def test_every_hostile_request_is_another_one() -> None:
    assert len({str(hostile(number)) for number in range(18)}) == 18


def test_what_goes_wrong_is_seen(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers by another adapter, once it is known what each answers."""
    folders = {name: write_adapter(tmp_path / name, tiny_base, seed=seed) for seed, name in enumerate(("a", "b"))}
    backend = LocalBackend.start(base_section(tiny_base), adapters=folders)

    async def mix_up(*_: object, until: float) -> None:
        served = backend._served
        served["a"], served["b"] = served["b"], served["a"]

    monkeypatch.setattr("benchmarks.soak.watch", mix_up)  # which begins when the answers are known
    with serving(backend, ServeSettings(loading=tmp_path)) as (running,):
        both = folders["a"], folders["b"]
        found = asyncio.run(soak(running.url, ["a", "b"], both, psutil.Process(), seconds=1.2))
    assert any("another answer" in problem for problem in found.problems())

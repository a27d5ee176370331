"""Cards and this machine: names, sizes, what the driver says, what is free."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.errors import UsageError
from lora_tune.model import device as device_module
from lora_tune.model.cards import CARDS, card_of_driver, find_card, usable_gib
from lora_tune.model.device import device_budget, this_machine


@pytest.mark.parametrize("name", CARDS)
def test_every_card_is_found_by_its_name_however_it_is_written(name: str) -> None:
    card = find_card(name)
    assert card.name == name and 8 <= card.memory_gib <= 192 and 20 < card.tflops < 3000 and card.bandwidth_gbs > 200
    assert find_card(f"NVIDIA GeForce {name.upper()}") == find_card(f" {name.replace('rtx', 'RTX ')} ") == card
    assert 0.9 * card.memory_gib < usable_gib(card) < card.memory_gib


@pytest.mark.parametrize(("size", "gib"), [("24GiB", 24), ("24 gb", 24), ("24G", 24), ("7.5", 7.5), ("80GiB", 80)])
def test_a_size_is_a_card_of_unknown_speed(size: str, gib: float) -> None:
    card = find_card(size)
    assert card.memory_gib == gib and card.tflops == 0


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("rtx4900", "rtx4090"),
        ("a100", "a100-40, a100-80"),
        ("rx7900xtx", "rtx"),
        ("", "rtx4090"),
        ("0GiB", "1GiB to 2048GiB"),
        ("99999GiB", "1GiB to 2048GiB"),
        ("24TiB", "auto"),
        ("-8GiB", "auto"),
    ],
)
def test_an_unknown_card_is_one_line_with_the_nearest_names(name: str, told: str) -> None:
    with pytest.raises(UsageError, match="--gpu") as caught:
        find_card(name)
    assert told in str(caught.value) and repr(name) in str(caught.value) and "\n" not in str(caught.value)


@given(st.text(max_size=30))
def test_no_name_is_a_fault(name: str) -> None:
    try:
        assert find_card(name).memory_gib > 0
    except UsageError as error:
        assert error.exit_code == 2


@pytest.mark.parametrize(
    ("driver", "gib", "card"),
    [
        ("NVIDIA GeForce RTX 4090", 24.0, "rtx4090"),
        ("NVIDIA GeForce RTX 4070 SUPER", 12.0, "rtx4070super"),
        ("NVIDIA GeForce RTX 4060 Ti", 16.0, "rtx4060ti-16"),
        ("NVIDIA GeForce RTX 4060 Ti", 8.0, "rtx4060ti"),
        ("NVIDIA GeForce RTX 3080", 12.0, "rtx3080-12"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100-80"),
        ("NVIDIA A100 80GB PCIe", 79.3, "a100-80"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA H100 80GB HBM3", 79.6, "h100"),
        ("NVIDIA H100 PCIe", 79.6, "h100-pcie"),
        ("NVIDIA H200", 139.8, "h200"),
        ("Tesla T4", 14.7, "t4"),
        ("NVIDIA L4", 22.5, "l4"),
        ("NVIDIA L40S", 44.7, "l40s"),
        ("NVIDIA RTX A6000", 47.5, "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", 47.5, "rtx6000ada"),
        ("NVIDIA A10G", 22.1, "a10g"),
    ],
)
def test_the_names_of_the_driver(driver: str, gib: float, card: str) -> None:
    assert card_of_driver(driver, memory_gib=gib) == CARDS[card]


@pytest.mark.parametrize(
    ("driver", "gib"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16.0),
        ("NVIDIA GeForce RTX 4090 D", 24.0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4.8),
        ("NVIDIA GeForce RTX 3060", 8.0),
        ("Some New Card", 20.0),
    ],
)
def test_other_forms_of_a_card_have_their_own_memory_and_unknown_speed(driver: str, gib: float) -> None:
    found = card_of_driver(driver, memory_gib=gib)
    assert found.tflops == 0 and found.memory_gib == gib and found.name == driver


def test_the_device_has_free_memory() -> None:
    device, gib = device_budget()
    assert device in ("cuda", "cpu") and 0.05 < gib < 10_000


def test_no_gpu_is_used_where_none_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert device_budget()[0] == "cpu"


class FakeNvml(types.ModuleType):
    """A driver with two cards of 10 and 20 GiB free; there is none on a machine without a GPU."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, driver: bool) -> None:
        super().__init__("pynvml")
        self.driver = driver

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("no driver")

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index > 1:
            raise self.NVMLError("no such card")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"GPU-b": 1}[uuid]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(free=(10 + 10 * handle) * 2**30, total=24 * 2**30)

    def nvmlDeviceGetName(self, handle: int) -> str:
        return ["NVIDIA GeForce RTX 4090", "NVIDIA L4"][handle]


@pytest.mark.parametrize(
    ("visible", "driver", "torch", "found"),
    [
        (None, True, "2.13.0", ("cuda", 10)),
        ("1,0", True, "2.13.0", ("cuda", 20)),
        ("GPU-b", True, "2.13.0", ("cuda", 20)),
        ("5", True, "2.13.0", "cpu"),
        (None, False, "2.13.0", "cpu"),
        (None, True, "2.13.0+cpu", "cpu"),
    ],
)
def test_the_first_visible_card_counts(
    visible: str | None, driver: bool, torch: str, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(driver=driver))
    monkeypatch.setattr("importlib.metadata.version", lambda name: torch)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_budget() == found if found != "cpu" else device_budget()[0] == "cpu"


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "_CONTROL_GROUP", tmp_path)
    free = device_budget()[1]
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("22345\n")
    (tmp_path / "memory.stat").write_text("anon 12345\ninactive_file 10000\n")
    assert device_budget()[1] == pytest.approx(free, rel=0.2)
    (tmp_path / "memory.max").write_text(f"{2**28 + 12345}\n")
    assert device_budget() == ("cpu", 0.25)


def test_what_others_hold_is_counted_and_the_card_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(driver=True))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine = this_machine()
    assert (machine.device, machine.name, machine.card) == ("cuda", "NVIDIA GeForce RTX 4090", CARDS["rtx4090"])
    assert (machine.free_gib, machine.held_gib) == (10, 14)

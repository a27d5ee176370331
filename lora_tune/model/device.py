"""This machine: the GPU or the memory that a run would train on, found without torch."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_tune.model.cards import Card, card_of_driver

Device = Literal["cuda", "cpu"]
GIB = 2**30
_CONTROL_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a run would train: the memory that is free there now, what others hold, and the card where there is one.

    `card` is None on a CPU. `name` is what calibration keeps measurements under: the driver's name, or `cpu`.
    """

    device: Device
    name: str
    free_gib: float
    total_gib: float
    card: Card | None

    @property
    def held_gib(self) -> float:
        """What the driver and other processes hold."""
        return max(0.0, self.total_gib - self.free_gib)


def this_machine() -> Machine:
    """The first visible GPU, else the memory of this machine (or of the container that it is).

    A GPU counts where its driver answers and torch is not a CPU build; torch itself is not imported.
    """
    gpu = None if _cpu_build() else _first_gpu()
    if gpu is not None:
        return gpu
    import psutil

    memory = psutil.virtual_memory()
    free = min(memory.available, _free_of_container())
    return Machine("cpu", "cpu", free / GIB, memory.total / GIB, None)


def device_budget() -> tuple[Device, float]:
    """Where a run would train, and the GiB that are free there now: of the first visible GPU, else of memory."""
    machine = this_machine()
    return machine.device, machine.free_gib


def visible_cards() -> tuple[str, ...]:
    """The GPUs that a process started here sees, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    if _cpu_build() or _first_gpu() is None:
        return ()
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return tuple(name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip())
    import pynvml

    pynvml.nvmlInit()
    try:
        return tuple(str(number) for number in range(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()


def _cpu_build() -> bool:
    try:
        return "+cpu" in importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False


def _first_gpu() -> Machine | None:
    """The first GPU (or MIG slice) in CUDA_VISIBLE_DEVICES; None where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if not visible or visible == "-1":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        if visible.isdigit():
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(visible))
        else:
            handle = pynvml.nvmlDeviceGetHandleByUUID(visible)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        name = _text(pynvml.nvmlDeviceGetName(handle))
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    total = int(memory.total) / GIB
    named = f"{name} MIG" if visible.startswith("MIG") and "MIG" not in name else name
    return Machine("cuda", name, int(memory.free) / GIB, total, card_of_driver(named, memory_gib=total))


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _free_of_container() -> float:
    """Bytes left below the memory limit of the control group (version 2), cached files not counted as used."""
    try:
        limit, used = ((_CONTROL_GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        facts = dict(line.split() for line in (_CONTROL_GROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return float("inf")
    return float("inf") if limit == "max" else max(0, int(limit) - int(used) + int(facts.get("inactive_file", 0)))

"""What a measurement ran on, as it is kept beside every result."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores, card, the load of the minute before (a quiet machine has less than 1), and the commit."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "gpu": card(),
        "load_before": round(os.getloadavg()[0], 1),
        "commit": commit(),
    }


def processor() -> str:
    """The name that the kernel gives it, else the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def card() -> str:
    """The first CUDA device, or an empty word."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def commit() -> str:
    """The first characters of what is checked out, a plus sign where the package differs from it."""
    place = Path(__file__).resolve().parent.parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=place, capture_output=True, text=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "lora_tune"], cwd=place, capture_output=True)
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if changed.returncode == 1 else "")


def versions(*names: str) -> dict[str, str]:
    """Python and the libraries of this environment that are there."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

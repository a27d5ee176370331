"""What a measurement ran on, as it is kept beside every result, and how its command line is read."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
STDOUT = Path("-")


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


def result_file(text: str) -> Path:
    """The file that a result will be kept in, as argparse reads it; `-` (STDOUT) is none.

    Raises:
        ArgumentTypeError: it could not be written; said before hours are measured for it.
    """
    path = Path(text)
    if path == STDOUT:
        return path
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}; make it, or name another file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written; name another file")
    return path


def print_and_keep(result: dict[str, Any], file: Path | None) -> None:
    """Print a result as JSON, and write it to the file where there is one. Raises: OSError."""
    text = json.dumps(result, indent=1)
    print(text)
    if file and file != STDOUT:
        file.write_text(text + "\n", encoding="utf-8")


def at_least_one(text: str) -> int:
    """A count, as argparse reads it. Raises: ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text!r}")
    return int(text)


def counts(text: str) -> list[int]:
    """Counts with commas between them, as argparse reads them. Raises: ArgumentTypeError."""
    return [at_least_one(part) for part in text.split(",")]


def seconds(text: str) -> float:
    """A time, as argparse reads it. Raises: ArgumentTypeError."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not found > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text!r}")
    return found


@contextmanager
def result_alone() -> Iterator[None]:
    """Send to stderr what libraries print while they are imported and measured: stdout is for the result."""
    with redirect_stdout(sys.stderr):
        yield

"""How a tool takes turns with the others in `benchmarks.step`; nothing is imported that a peer's environment lacks."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BATCH, LENGTH, RANK, ALPHA, LEARNING_RATE = 4, 256, 16, 32, 2e-4


class Turns:
    """Wait for a turn before each step, and say after it what it took."""

    def __init__(self) -> None:
        self._cpu = self._wall = 0.0

    def begin(self) -> None:
        """Wait for the turn."""
        if not sys.stdin.readline():
            raise SystemExit
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def end(self, loss: float) -> None:
        """Say what the step took: seconds of processor time, of wall time, peak memory in MiB, loss."""
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        said = {"cpu_s": cpu, "wall_s": wall, "peak_mib": peak_mib(), "loss": loss}
        print("STEP " + json.dumps(said), flush=True)


def peak_mib() -> float:
    """The most memory so far: of the card where there is one, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def arguments() -> argparse.Namespace:
    """What `benchmarks.step` hands to every side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tool", nargs="?", default="")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--steps", type=int, required=True)
    return parser.parse_args()


def rows_of(folder: Path) -> list[list[int]]:
    """The token rows, in the order in which every tool trains them."""
    found: list[list[int]] = json.loads((folder / "rows.json").read_text())
    return found

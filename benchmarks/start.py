"""How long a command takes before it does something:  python -m benchmarks.start [--runs 3] [--json] [--write]

The cold commands (`--help`, a wrong recipe, `recipe check`) from process start to exit: the bound is 0.4 s, torch is
not imported. And `lora-tune run` on the embedded base from process start to the first step in `metrics.jsonl`, with
`base.quantize` none and nf4 and an empty cache: everything that a user waits for, data, plan, preflight and the step
itself included; the bound for `none` is 6 s. Seconds of the clock and of processor time (all threads, children too);
the best of the runs counts, the median stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import RESULTS, machine, versions

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
COLD_BOUND_S, FIRST_STEP_BOUND_S = 0.4, 6.0
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets")


def environment(cache: Path) -> dict[str, str]:
    """This checkout, an empty cache, no network."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "LORA_TUNE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


def cold(arguments: list[str], *, folder: Path) -> tuple[float, float]:
    """Seconds of the clock and of the processor of one `python -m lora_tune …`, from start to exit."""
    before = os.times()
    command = [sys.executable, "-m", "lora_tune", *arguments]
    subprocess.run(command, cwd=folder, env=environment(folder / "cache"), capture_output=True, check=False)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return after.elapsed - before.elapsed, spent


def first_step(overrides: list[str], *, folder: Path) -> tuple[float, float]:
    """Seconds of the clock and of the processor until `lora-tune run` has written the numbers of its first step.

    Raises:
        SystemExit: it ended before.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place, log = Path(name), folder / "run.log"
        command = [sys.executable, "-m", "lora_tune.run", str(QUICKSTART), f"output={place / 'out'}", *overrides]
        with log.open("w") as said:
            began = time.perf_counter()
            process = subprocess.Popen(command, cwd=place, env=environment(place / "cache"), stdout=said, stderr=said)
            looked, cpu = psutil.Process(process.pid), 0.0
            try:
                while not has_step(place / "out" / "metrics.jsonl"):
                    if process.poll() is not None:
                        raise SystemExit(f"the run ended with {process.returncode}: {log.read_text()[-1500:]}")
                    cpu = spent_by(looked, cpu)
                    time.sleep(0.005)
                return time.perf_counter() - began, spent_by(looked, cpu)
            finally:
                process.kill()
                process.wait()


def has_step(metrics: Path) -> bool:
    """Whether the first whole line of a step is there."""
    return metrics.exists() and any('"loss"' in line and line.endswith("\n") for line in metrics.open())


def spent_by(process: psutil.Process, before: float) -> float:
    """Processor seconds of a process and of its children, as far as they can still be read."""
    try:
        alive = [child.cpu_times() for child in process.children(recursive=True)]
        own = process.cpu_times()
    except psutil.Error:
        return before
    return own.user + own.system + own.children_user + own.children_system + sum(t.user + t.system for t in alive)


def summed_up(name: str, taken: list[tuple[float, float]], *, bound_s: float | None) -> dict[str, Any]:
    """A line of the result."""
    wall, cpu = [seconds for seconds, _ in taken], [seconds for _, seconds in taken]
    return {
        "what": name, "best_s": round(min(wall), 3), "median_s": round(statistics.median(wall), 3),
        "best_cpu_s": round(min(cpu), 3), "median_cpu_s": round(statistics.median(cpu), 3), "bound_s": bound_s,
    }  # fmt: skip


def measure(runs: int) -> dict[str, Any]:
    """`{machine, versions, rows}`; one run before the first warms the file cache."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "wrong.yaml").write_text("base: {name: x}\ntrain: {lerning_rate: fast}\n")
        parts: list[tuple[str, float | None, Callable[[], tuple[float, float]]]] = [
            ("--help", COLD_BOUND_S, lambda: cold(["--help"], folder=folder)),
            ("run, a wrong recipe", COLD_BOUND_S, lambda: cold(["run", "wrong.yaml"], folder=folder)),
            ("recipe check", COLD_BOUND_S, lambda: cold(["recipe", "check", str(QUICKSTART)], folder=folder)),
            ("first step, quantize: none", FIRST_STEP_BOUND_S,
             lambda: first_step(["base.quantize=none"], folder=folder)),
            ("first step, quantize: nf4", None, lambda: first_step(["base.quantize=nf4"], folder=folder)),
        ]  # fmt: skip
        found, rows = {"machine": machine(), "versions": versions(*LIBRARIES)}, []
        for name, bound, part in parts:
            taken = [part() for _ in range(runs + 1)][1:]
            rows.append(summed_up(name, taken, bound_s=bound))
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return {**found, "runs": runs, "threads": int(threads) if threads else os.cpu_count(), "rows": rows}


def main() -> int:
    """Measure and print; 1 where the best of something is over its bound."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--write", action="store_true", help="keep it as benchmarks/results/start.json")
    given = parser.parse_args()
    result = measure(given.runs)
    text = json.dumps(result, indent=1)
    if given.write:
        (RESULTS / "start.json").write_text(text + "\n", encoding="utf-8")
    for row in result["rows"]:
        if not given.json:
            bound = f", bound {row['bound_s']} s" if row["bound_s"] else ""
            print(f"{row['what']:28} {row['best_s']:6.2f} s ({row['best_cpu_s']:.2f} s of CPU){bound}")
    if given.json:
        print(text)
    return int(any(row["bound_s"] and row["best_s"] > row["bound_s"] for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())

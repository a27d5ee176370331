"""How long the cold commands take, from process start to exit:  python benchmarks/start.py [RUNS]

The bound is 0.4 s on a quiet machine for `--help`, a wrong recipe and `recipe check`; without torch being imported.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOUND_S = 0.4


def seconds(arguments: list[str], *, folder: Path) -> float:
    """Wall time of one `python -m lora_tune …`."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "lora_tune", *arguments]
    subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    return time.perf_counter() - started


def main(runs: int) -> int:
    """Prints one JSON object with the best and the median time in seconds; 1 where the best is over the bound."""
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "wrong.yaml").write_text("base: {name: x}\ntrain: {lerning_rate: fast}\n")
        commands = {
            "--help": ["--help"],
            "run, a wrong recipe": ["run", "wrong.yaml"],
            "recipe check": ["recipe", "check", str(ROOT / "recipes" / "quickstart.yaml")],
        }
        for name, arguments in commands.items():
            taken = [seconds(arguments, folder=folder) for _ in range(runs + 1)][1:]  # the first warms the file cache
            results[name] = {"best_s": round(min(taken), 3), "median_s": round(statistics.median(taken), 3)}
    print(json.dumps({"bound_s": BOUND_S, "python": platform.python_version(), "runs": runs, "commands": results}))
    return int(any(result["best_s"] > BOUND_S for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 7))

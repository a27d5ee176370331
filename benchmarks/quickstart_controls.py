"""Does the quickstart's score come from what it should come from? Three runs of the same recipe, side by side.

    python benchmarks/quickstart_controls.py

* plain: `recipes/quickstart.yaml` as it is;
* shuffled: every question, in training and in the held-out rows, gets the text of another row, so that the answer
  cannot be read anywhere: what is left is guessing;
* random: the base has the same shape and freshly drawn weights: what is left is what the adapter alone can learn.

Writes `benchmarks/results/quickstart_controls.json` (exact match of base and adapter, seconds, machine, versions).
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
DATA = ROOT / "recipes" / "quickstart"
BASE = ROOT / "lora_tune" / "builtin" / "quickstart"
RESULT = ROOT / "benchmarks" / "results" / "quickstart_controls.json"
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
SEED = 7


def shuffle_texts(source: Path, target: Path) -> None:
    """Write the rows of `source` to `target`, each question below the text of another row (no row keeps its own)."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    order = random.Random(SEED).sample(range(len(rows)), len(rows))
    parts = [row["input"].rpartition("\n\n") for row in rows]
    for place, index in enumerate(order):
        text = parts[order[place - 1]][0]
        rows[index]["input"] = f"{text}\n\n{parts[index][2]}"
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_random_base(folder: Path) -> None:
    """Write a base into `folder` that has the embedded base's shape, tokenizer and template and untrained weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(BASE, folder)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(BASE), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def run_tool(name: str, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Run the recipe with `overrides` into `folder` and return its scores and the seconds it took, wall and CPU."""
    output = folder / name
    command = [sys.executable, "-m", "lora_tune.run", str(RECIPE), f"output={output}", *overrides]
    before, started = os.times(), time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    after, wall_s = os.times(), time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"quickstart_controls: the {name} run ended with {done.returncode}:\n{done.stdout[-3000:]}")
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    scores = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["scores"]
    return {"scores": scores, "wall_s": round(wall_s, 1), "cpu_s": round(cpu_s, 1)}


def machine() -> dict[str, Any]:
    """Return the processor, its number of cores and the versions that the numbers belong to."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    versions = {package: version(package) for package in PACKAGES}
    return {"processor": model, "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def main() -> None:
    """Run the three, print the table, keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT, help="file to keep the table in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("train", "held_out"):
            shuffle_texts(DATA / f"{name}.jsonl", folder / f"{name}.jsonl")
        write_random_base(folder / "random_base")
        runs = {
            "plain": [],
            "shuffled": [f"data.0.source={folder / 'train.jsonl'}", f"eval.hold_out={folder / 'held_out.jsonl'}"],
            "random": [f"base.name={folder / 'random_base'}"],
        }
        results = {}
        for name, overrides in runs.items():
            results[name] = run_tool(name, folder, overrides)
            match = results[name]["scores"]["exact_match"]
            print(
                f"{name:9} exact match: base {match['base']:6.1%}, adapter {match['adapter']:6.1%} "
                f"[{match['low']:.1%}, {match['high']:.1%}] of {match['rows']} rows; "
                f"{results[name]['wall_s']} s, {results[name]['cpu_s']} CPU-s",
                flush=True,
            )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(), "runs": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

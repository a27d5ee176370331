"""Does a rehearsal go through, and in how long?   LORA_TUNE_CORPUS=… python benchmarks/rehearsals.py [NAME …]

The shipped recipes whose data is in this repository, and real configurations with real tokenizers from the corpus: a
Llama, a Qwen 2.5, a mixture of experts and a Phi-3, each over rows of its own. No weight of a real base is read.

Writes `benchmarks/results/rehearsals.json` (each step's state and seconds, machine, versions, load at the start).
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "rehearsals.json"
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
# name: (recipe, configuration of the base or None for the recipe's own, tokenizer, overrides)
CASES: dict[str, tuple[str, str | None, str, tuple[str, ...]]] = {
    "quickstart": ("quickstart.yaml", None, "", ()),
    "my_data on Llama-2-7B": ("my_data.yaml", "llama_h4096_l32_Llama-2-7b-hf", "tinyllama-1.1b-chat", ()),
    "my_data on Qwen2.5-7B": ("my_data.yaml", "qwen2_h3584_l28_Qwen2.5-7B", "qwen2.5-7b-unsloth_vision-pad", ()),
    "GSM8K on Mixtral-8x7B": (
        "alpaca.yaml",
        "mixtral_h4096_l32_Mixtral-8x7B-v0.1",
        "tinyllama-1.1b-chat",
        ("data.0.source={corpus}/data/datasets/gsm8k/train.jsonl", "data.0.format=auto"),
    ),
    "my_data, DoRA on Phi-3-mini": (
        "my_data.yaml",
        "phi3_h3072_l32_Chocolatine-3.8B",
        "phi-3-mini",
        ("lora.method=dora", "lora.targets=all-linear", "train.packing=false"),
    ),
}


def rehearse(name: str, corpus: Path | None, folder: Path) -> dict[str, Any]:
    """One case: what the command answered, CPU seconds and load."""
    recipe, config, tokenizer, overrides = CASES[name]
    arguments = [str(ROOT / "recipes" / recipe), *(one.format(corpus=corpus) for one in overrides)]
    if config is not None:
        if corpus is None:
            return {"skipped": "LORA_TUNE_CORPUS does not name the corpus"}
        base = folder / "base"
        shutil.copytree(corpus / "data" / "tokenizers" / tokenizer, base, copy_function=shutil.copyfile)
        shutil.copyfile(corpus / "data" / "configs" / config / "config.json", base / "config.json")
        arguments.append(f"base.name={base}")
    load = os.getloadavg()[0]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "lora_tune", "rehearse", *arguments, "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = json.loads(done.stdout)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    answer |= {"cpu_s": round(spent, 1), "load_before": round(load, 2)}
    for step in answer.get("steps", []):
        step["seconds"] = round(step["seconds"], 1)
        step["said"] = step["said"].replace(str(folder), "…")
    return answer


def main(names: list[str]) -> int:
    """Prints a line for each case and writes the result; 1 where one did not go through."""
    corpus = Path(os.environ["LORA_TUNE_CORPUS"]).resolve() if os.environ.get("LORA_TUNE_CORPUS") else None
    found: dict[str, Any] = {}
    for name in names or list(CASES):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = rehearse(name, corpus, Path(folder).resolve())
        answer = found[name]
        states = [f"{step['name']} {step['state']}" for step in answer.get("steps", []) if step["state"] != "ok"]
        print(
            f"{name}: exit code {answer.get('exit_code')}, {answer.get('seconds')} s, {answer.get('cpu_s')} CPU-s,",
            states,
        )
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "system": platform.system()}
    versions = {package: version(package) for package in PACKAGES} | {"python": platform.python_version()}
    RESULT.write_text(json.dumps({"cases": found, "machine": machine, "versions": versions}, indent=1) + "\n")
    return int(any(answer.get("exit_code") for answer in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

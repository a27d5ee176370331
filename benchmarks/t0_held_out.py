"""Train on some data sets of T0, ask others that were never trained, with every template of promptsource.

    python benchmarks/t0_held_out.py --corpus FOLDER

The cluster *paraphrase* (MRPC and PAWS) is held out; AG News, IMDB, SAMSum, XSum, CommonGen and CosmosQA are trained,
each row with one template drawn by the seed. `FOLDER/datasets` holds `t0/` and `promptsource/` as they were published;
the rows are read back by `t0_rows.py`. The base is the embedded one unless `--base` names another.

Scores are the rank of the right choice (summed log-probability, no length normalisation) and the loss of the answer,
base against adapter, for each template; below them median and quartiles. Writes `results/t0_held_out.json` and `.md`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.t0_rows import raw_rows  # noqa: E402  (needs the path)

RESULT = ROOT / "benchmarks" / "results" / "t0_held_out.json"
PACKAGES = ("torch", "transformers", "peft", "trl")
TRAINED = {
    "ag_news": "topic",
    "imdb": "sentiment",
    "samsum": "summary",
    "xsum": "summary",
    "common_gen": "struct-to-text",
    "cosmos_qa": "multiple-choice",
}
HELD_OUT = {"glue__mrpc": "paraphrase", "paws__labeled_final": "paraphrase"}


def write_recipe(folder: Path, corpus: Path, *, base: str, rows: int, steps: int) -> Path:
    """The rows as files, and the recipe over them; returns its path."""
    found = raw_rows(corpus / "datasets" / "t0")
    sources = []
    for name, task in {**TRAINED, **HELD_OUT}.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found[name]), encoding="utf-8")
        prompts = corpus / "datasets" / "promptsource" / f"{name}.yaml"
        sources.append({"source": str(path), "task": task, "prompts": str(prompts.resolve())})
    recipe = {
        "base": {"name": base, "quantize": "none"},
        "data": sources,
        "lora": {"rank": 16, "alpha": 32},
        "train": {"max_steps": steps, "batch_size": 8, "learning_rate": 1e-3, "max_length": 384, "too_long": "drop"},
        "limits": {"dropped_rows": "100%"},
        "eval": {
            "hold_out": 40, "hold_out_tasks": ["paraphrase"], "max_rows": rows, "metrics": ["loss", "accuracy"],
            "samples": 0,
        },
        "output": str(folder / "adapter"),
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


def run(recipe: Path) -> dict[str, Any]:
    """Run the command and return what it prints, with the seconds it took."""
    started = time.monotonic()
    command = [sys.executable, "-m", "lora_tune", "run", str(recipe), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"t0_held_out: the run ended with {done.returncode}:\n{done.stderr[-3000:]}{done.stdout[-500:]}"
        )
    return {**json.loads(done.stdout), "wall_s": round(time.monotonic() - started, 1)}


def machine() -> dict[str, Any]:
    """The processor, its cores and the versions that the numbers belong to."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    versions = {package: version(package) for package in PACKAGES}
    return {"processor": model, "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def table(found: dict[str, Any], *, base: str) -> str:
    """The result as Markdown."""
    training, task = found["training"], found["tasks"]["paraphrase"]
    lines = [
        "# Held-out tasks of T0, by template",
        "",
        f"`python benchmarks/t0_held_out.py`: base `{base}`, trained on {', '.join(TRAINED)} "
        f"({training['rows']} rows, {training['steps']} steps, {training['tokens']:,} tokens, {found['wall_s']} s); "
        "MRPC and PAWS were never trained. Accuracy by rank classification; loss in nats a token of the answer.",
        "",
        "| template | rows | accuracy, base | adapter | difference | 95 % interval | loss, base | adapter |",
        "|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    for name, scores in sorted(task["templates"].items()):
        loss, accuracy = scores["loss"], scores.get("accuracy")
        cells = ["", "", "", ""]
        if accuracy:
            cells = [f"{accuracy[key]:.3f}" for key in ("base", "adapter")]
            cells += [f"{accuracy['difference']:+.3f}", f"{accuracy['low']:+.3f} … {accuracy['high']:+.3f}"]
        lines.append(f"| {name} | {loss['rows']} | {' | '.join(cells)} | {loss['base']:.3f} | {loss['adapter']:.3f} |")
    accuracy, loss = (task["spread"][name] for name in ("accuracy", "loss"))
    lines.append(
        f"| **median of {loss['templates']}** ({accuracy['templates']} with choices) | | **{accuracy['base']:.3f}** | "
        f"**{accuracy['adapter']:.3f}** | {accuracy['adapter'] - accuracy['base']:+.3f} | "
        f"{accuracy['better']} better, {accuracy['worse']} worse | **{loss['base']:.3f}** | **{loss['adapter']:.3f}** |"
    )
    quartiles = [f"{accuracy[key][0]:.3f}–{accuracy[key][1]:.3f}" for key in ("base_quartiles", "adapter_quartiles")]
    lines.append(f"| quartiles | | {quartiles[0]} | {quartiles[1]} | | | | |")
    lines += ["", "Machine: " + ", ".join(f"{name} {value}" for name, value in machine().items()) + "."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run it, print the table, keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpus", type=Path, required=True, help="the folder with datasets/t0 and datasets/promptsource"
    )
    parser.add_argument("--base", default="builtin:quickstart")
    parser.add_argument("--rows", type=int, default=25, help="rows asked of each held-out data set")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        recipe = write_recipe(
            Path(temporary), arguments.corpus, base=arguments.base, rows=arguments.rows, steps=arguments.steps
        )
        found = run(recipe)
    text = table(found, base=arguments.base)
    print(text)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    kept = {"machine": machine(), **{key: found[key] for key in ("training", "scores", "tasks", "wall_s")}}
    arguments.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

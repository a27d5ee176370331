"""Tokens per second of `lora-tune run` on 1 and 2 processes, beside a bare DDP loop over the same rows.

`python -m benchmarks.scale` trains a random Llama of about 20 million parameters on random rows, on the CPU, each
process with one thread: as a run of ours and as the shortest loop that torch's DistributedDataParallel allows, PEFT
adapter, AdamW, clipping and a collator included. Rounds are interleaved, and of each the median is taken. On one
machine both processes share its memory and its cores: the ratio to the bare loop is what this measures, and the
speed-up from 1 to 2 processes only where two cores are free. On CUDA cards (`--device cuda`) the processes take one
each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "scale.json"
STEPS, BATCH, MICRO, LENGTH = 12, 8, 2, 256
WARM = 2  # steps that are not counted
CONFIG = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 6, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip
RECIPE = f"""\
base: {{name: base, quantize: none, compute_dtype: float32}}
data: [{{source: rows.jsonl, format: text}}]
loss_on: all
lora: {{rank: 8, alpha: 16}}
train: {{max_steps: {STEPS}, batch_size: {BATCH}, micro_batch_size: {MICRO}, max_length: {LENGTH}, packing: false,
        learning_rate: 1e-3, warmup: 0, gradient_checkpointing: none, too_long: truncate, save_every: 1000}}
eval: {{hold_out: 0, samples: 0}}
limits: {{lost_tokens: 100%, lost_end_tokens: 100%}}
output: out
"""


def main() -> None:
    """Measure in interleaved rounds, print, and write the result."""
    parser = argparse.ArgumentParser(description="Tokens/s of 1 and 2 processes, beside a bare DDP loop.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare:
        bare(given.bare)
        return
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        folder = Path(name)
        write_place(folder)
        found: dict[str, list[float]] = {}
        for number in range(given.rounds):
            for processes in (1, 2):
                for who, measure in (("lora_tune", run_ours), ("bare DDP", run_bare)):
                    speed = measure(folder, processes, number)
                    found.setdefault(f"{who}, {processes}", []).append(speed)
                    print(f"round {number + 1}: {who}, {processes} processes: {speed:,.0f} tokens/s", flush=True)
    middle = {name: statistics.median(values) for name, values in found.items()}
    pairs = {n: zip(found[f"lora_tune, {n}"], found[f"bare DDP, {n}"], strict=True) for n in (1, 2)}
    facts = {
        "tokens_per_s": {name: round(value, 1) for name, value in middle.items()},
        "ours_over_bare": {n: round(statistics.median(a / b for a, b in both), 3) for n, both in pairs.items()},
        "speed_up_of_2": {w: round(middle[f"{w}, 2"] / middle[f"{w}, 1"], 3) for w in ("lora_tune", "bare DDP")},
        "rounds": given.rounds,
        "load_average": os.getloadavg(),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate")},
    }
    RESULT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: facts[name] for name in ("tokens_per_s", "ours_over_bare", "speed_up_of_2")}, indent=1))


def write_place(folder: Path) -> None:
    """A random base, rows of exactly one length, and the recipe."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import tiny

    tiny.write_base(folder / "base", config=CONFIG)
    rows = [{"text": f"{number:05d} " + "abcdefgh " * 40} for number in range(STEPS * BATCH)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE)


def environment() -> dict[str, str]:
    """One thread a process, and this checkout."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "GLOO_SOCKET_IFNAME": "lo"}


def run_ours(folder: Path, processes: int, number: int) -> float:
    """Tokens per second of the steps of a run, from its `metrics.jsonl`."""
    output = folder / f"out-{processes}-{number}"
    words = ["run", "recipe.yaml", f"output={output.name}", f"hardware.processes={processes}", "--no-preflight"]
    command = [sys.executable, "-m", "lora_tune", *words]
    subprocess.run(command, cwd=folder, env=environment(), check=True, capture_output=True)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    counted = [row for row in rows if "loss" in row][WARM:]
    return sum(row["tokens"] for row in counted) / sum(row["step_s"] for row in counted)


def run_bare(folder: Path, processes: int, number: int) -> float:
    """Tokens per second of the bare loop under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "benchmarks.scale", "--bare", str(folder)]
    done = subprocess.run(command, cwd=HERE.parent, env=environment(), check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def bare(folder: Path) -> None:
    """The shortest loop over the same rows: no checks, no checkpoints, no log. Prints tokens per second."""
    import contextlib

    import torch
    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    texts = [json.loads(line)["text"] for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows = torch.tensor([tokenizer(text)["input_ids"][:LENGTH] for text in texts])
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model: Any = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model = torch.nn.parallel.DistributedDataParallel(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    each, began = BATCH // world, 0.0
    for step in range(STEPS):
        if step == WARM:
            began = time.perf_counter()
        own = rows[step * BATCH + rank * each : step * BATCH + (rank + 1) * each]
        parts = own.split(MICRO)
        for number, part in enumerate(parts):
            with contextlib.nullcontext() if number == len(parts) - 1 else model.no_sync():
                (model(input_ids=part, labels=part, use_cache=False).loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - began
    if rank == 0:
        print((STEPS - WARM) * BATCH * LENGTH / seconds)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Steps of several tools side by side: same model, rows, adapter and optimizer, interleaved in one run.

    python -m benchmarks.step [--shape small] [--method lora|qlora] [--against raw,trl] [--rounds 7] [--json FILE]

Each tool is a process of its own that waits for its turn: they take one step after the other, so that a busy machine
disturbs all alike, and the median of a tool's steps counts. On a CPU the figure is tokens per second of processor time
on one thread. `raw` is a bare PEFT loop in bfloat16, adapters too; `trl` is SFTTrainer as it is. Losses of all tools
are printed: the same base and rows must give curves that agree. Peers that need an environment of their own are not
here yet.
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
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import BATCH, LENGTH, ROOT

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2},
    "small": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
              "num_attention_heads": 8, "num_key_value_heads": 4},
    "8b": {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip
TOOLS = ("raw", "trl")
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")


def write_base(folder: Path, shape: str) -> None:
    """A random Llama of a shape in bfloat16, the same one every time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def write_rows(folder: Path, shape: str, *, steps: int) -> None:
    """Rows of 256 tokens, all trained: a slow walk over the vocabulary, so that the loss falls."""
    import random

    draw, vocabulary = random.Random(2), SHAPES[shape]["vocab_size"]
    rows = []
    for _ in range(BATCH * steps):
        token, row = draw.randrange(vocabulary), []
        for _ in range(LENGTH):
            token = (token + draw.choice((1, 1, 2, 7))) % vocabulary
            row.append(token)
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))


class Side:
    """One tool in its process, paused between its steps."""

    def __init__(self, name: str, folder: Path, *, method: str, steps: int) -> None:
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        self.name = name
        self.steps: list[dict[str, float]] = []
        self.began = time.monotonic()
        self._log = (folder / f"{name}.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers.here", name, "--folder", str(folder), "--method", method,
             "--steps", str(steps)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip
        self.first_step_s = 0.0

    def step(self) -> None:
        """Let it take one step; what it says of it is kept."""
        assert self.process.stdin and self.process.stdout
        print("go", file=self.process.stdin, flush=True)
        while line := self.process.stdout.readline():
            if line.startswith("STEP "):
                self.steps.append(json.loads(line.removeprefix("STEP ")))
                self.first_step_s = self.first_step_s or time.monotonic() - self.began
                return
        raise SystemExit(f"{self.name} ended: {Path(self._log.name).read_text()[-1500:]}")

    def end(self) -> None:
        """Close the process."""
        self.process.kill()
        self.process.wait()
        self._log.close()

    def row(self) -> dict[str, Any]:
        """Its line of the result; the first two steps warm up."""
        counted = self.steps[2:]
        return {
            "tool": self.name,
            "tokens_per_cpu_s": round(BATCH * LENGTH / statistics.median(step["cpu_s"] for step in counted), 1),
            "tokens_per_s": round(BATCH * LENGTH / statistics.median(step["wall_s"] for step in counted), 1),
            "peak_mib": round(max(step["peak_mib"] for step in self.steps), 1),
            "first_step_s": round(self.first_step_s, 1),
            "final_loss": round(self.steps[-1]["loss"], 4),
            "losses": [round(step["loss"], 4) for step in self.steps],
        }


def measure(names: Sequence[str], *, shape: str, method: str, rounds: int) -> list[dict[str, Any]]:
    """Start the tools one after the other (each alone up to its first step), then let them take turns."""
    with tempfile.TemporaryDirectory(prefix="step-") as name:
        folder = Path(name)
        write_base(folder / "base", shape)
        write_rows(folder, shape, steps=rounds + 2)
        sides: list[Side] = []
        try:
            for tool in names:
                side = Side(tool, folder, method=method, steps=rounds + 2)
                sides.append(side)
                side.step()
            for _ in range(rounds + 1):
                for side in sides:
                    side.step()
            return [side.row() for side in sides]
        finally:
            for side in sides:
                side.end()


def machine() -> dict[str, Any]:
    """What ran it."""
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gpu": card}


def versions() -> dict[str, str]:
    """Libraries of this environment."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Measure and print a table, or one JSON object to a file."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--method", choices=("lora", "qlora"), default="qlora")
    parser.add_argument("--against", default="raw,trl")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    names = ["lora_tune", "lora_tune, PEFT's path", *given.against.split(",")]
    if unknown := [name for name in given.against.split(",") if name not in TOOLS]:
        parser.error(f"--against knows {', '.join(TOOLS)}, got {', '.join(unknown)}")
    rows = measure(names, shape=given.shape, method=given.method, rounds=given.rounds)
    slowest = next((row["tokens_per_cpu_s"] for row in rows if row["tool"] == "raw"), rows[0]["tokens_per_cpu_s"])
    for row in rows:
        speed = row["tokens_per_cpu_s"]
        print(
            f"{row['tool']:24} {speed:8.0f} tokens/CPU-s {speed / slowest:5.2f} x raw {row['peak_mib']:7.0f} MiB"
            f" {row['first_step_s']:5.1f} s to the first step, loss {row['losses'][0]:.4f} … {row['final_loss']:.4f}"
        )
    if given.json:
        result = {"machine": machine(), "versions": versions(), "shape": given.shape, "method": given.method}
        given.json.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

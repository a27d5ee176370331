"""Peak memory of a training beside the plan and beside the minimum of the formulas.

    python -m benchmarks.memory [--shape small|8b] [--batch 4] [--length 1024] [--json [FILE]] [--write]

Every combination of LoRA and QLoRA, fused and PEFT's path, no layer and every layer recomputed trains three steps in a
process of its own. On a CPU the peak is what the process grew by: its resident high-water mark during the steps, less
what it held before the base was loaded and after a training of a tiny base had brought every library in; glibc's malloc
is told to give freed memory back at once, so that what is held counts and not what it keeps. On a GPU it is what torch
allocated at most. Neither holds the runtime's own memory, which is left out of the plan as well. Planned is what the
plan counts for a training step; the evaluation, which needs more where all layers are recomputed, is not made here.
Of several rows in a batch the plan counts attention with a mask, as rows of unequal length need it; those here are of
one length and need none, so that `--batch 1` is what the plan means. On a CPU the case is then trained once more under
PyTorch's profiler: `allocated` is the most that PyTorch itself held, without what its libraries and malloc add.

The minimum is what the algebra needs and no more: weights, 16-bit adapters and gradients with 32-bit moments, kept
activations of fused layers (12h + 4I + 4kv bytes per token), and the larger of a loss head in tiles and one layer's
backward pass.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, STDOUT, at_least_one, machine, result_alone, result_file, versions
from benchmarks.peers.protocol import ROOT, Job, stay_home
from benchmarks.step import SHAPES, write_base, write_rows

STEPS = 3
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
GIB = 2**30
NF4 = 0.5 + 1 / 64 + 4 / 16384
HEAD_TILE = (4096, 32_768)
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def minimum_gib(sizes: dict[str, int], job: Job, *, recomputed: int) -> float:
    """GiB that the formulas need for a Llama of these sizes, `recomputed` layers of which keep their inputs alone."""
    hidden, inner, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    kv = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    vocabulary, tokens = sizes["vocab_size"], job.batch * job.length
    linear = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    adapter = job.rank * layers * (2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + inner))
    quantized = job.method == "qlora"
    held = linear * (NF4 if quantized else 2) + 2 * vocabulary * hidden * 2 + adapter * (2 * 2 + 8)
    one_layer = tokens * (12 * hidden + 4 * inner + 4 * kv)
    kept = (layers - recomputed) * one_layer + recomputed * tokens * 2 * hidden
    head = min(tokens, HEAD_TILE[0]) * min(vocabulary, HEAD_TILE[1]) * 2 + tokens * hidden * 4
    backward = tokens * (4 * inner + 6 * hidden) + (2 * hidden * inner if quantized else 0)
    return float(held + kept + max(head, backward + (one_layer if recomputed else 0))) / GIB


def planned_gib(folder: Path, job: Job, *, kernels: str, checkpointing: str) -> tuple[float, float, dict[str, float]]:
    """GiB that the plan counts for a training step without the runtime, its uncertainty, and its parts."""
    import torch

    from benchmarks.peers.here import base_section, train_section
    from lora_tune.model import footprint
    from lora_tune.recipe import Lora

    config = json.loads((folder / "base" / "config.json").read_text())
    planned = footprint.job_of(
        config,
        base=base_section(folder, job),
        lora=Lora(rank=job.rank, alpha=job.alpha),
        train=train_section(job, kernels=kernels, checkpointing=checkpointing),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    layers = config["num_hidden_layers"] if checkpointing == "all" else 0
    found = footprint._training(planned, footprint.Choice(job.batch, layers, "adamw"))
    parts = {name: size / GIB for name, size in found.items() if name != "runtime"}
    return sum(parts.values()), footprint.uncertainty_gib(planned, parts), parts


def resident_mib(field: str) -> float:
    """A field of /proc/self/status: VmRSS, what is resident now, or VmHWM, the most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def trained(folder: Path, job: Job, *, kernels: str, checkpointing: str) -> float:
    """Train; returns the peak of the steps in MiB, as the process or the card has it."""
    import torch

    from benchmarks.peers.here import ours, train_section

    section = train_section(job, kernels=kernels, checkpointing=checkpointing)
    with tempfile.TemporaryDirectory() as out:
        trainer = ours(folder, job, Path(out), train=section)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        trainer.train()
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else resident_mib("VmHWM")


def allocated_gib(folder: Path, job: Job, *, kernels: str, checkpointing: str) -> float:
    """Train; returns the most that PyTorch held of parameters and all that the steps allocate, by its profiler."""
    from benchmarks.peers.here import ours, train_section
    from benchmarks.recompute import peak_bytes

    section = train_section(job, kernels=kernels, checkpointing=checkpointing)
    with tempfile.TemporaryDirectory() as out:
        trainer = ours(folder, job, Path(out), train=section)
        storages = [parameter.untyped_storage() for parameter in trainer.model.parameters()]
        held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        return (held + peak_bytes(trainer.train)) / GIB


def one_case(folder: Path, case: dict[str, str]) -> dict[str, Any]:
    """What a case took, in this process; `folder` holds the bases `tiny` and `real`, each with rows and job."""
    import torch

    from lora_tune.model.kernels.fuse import fuse  # noqa: F401  (nothing of ours is imported between the readings)

    jobs = {name: Job(**json.loads((folder / name / "job.json").read_text())) for name in ("tiny", "real")}
    torch.set_num_threads(jobs["real"].threads)
    how = {"kernels": case["kernels"], "checkpointing": case["checkpointing"]}
    jobs = {name: Job(**{**vars(job), "method": case["method"]}) for name, job in jobs.items()}
    trained(folder / "tiny", jobs["tiny"], **how)
    gc.collect()
    before = 0.0 if torch.cuda.is_available() else resident_mib("VmRSS")
    measured = (trained(folder / "real", jobs["real"], **how) - before) / 1024
    planned, uncertain, parts = planned_gib(folder / "real", jobs["real"], **how)
    sizes = json.loads((folder / "real" / "base" / "config.json").read_text())
    layers = sizes["num_hidden_layers"] if case["checkpointing"] == "all" else 0
    least = minimum_gib(sizes, jobs["real"], recomputed=layers)
    allocated = measured if torch.cuda.is_available() else allocated_gib(folder / "real", jobs["real"], **how)
    found = {
        "measured_gib": measured, "allocated_gib": allocated, "planned_gib": planned, "uncertain_gib": uncertain,
        "minimum_gib": least, "measured_over_planned": measured / planned,
        "allocated_over_planned": allocated / planned, "measured_over_minimum": measured / least,
    }  # fmt: skip
    return {
        **case,
        **{name: round(value, 3) for name, value in found.items()},
        "libraries_mib": round(before),
        "planned_parts_gib": {name: round(size, 4) for name, size in parts.items()},
    }


def cases() -> list[dict[str, str]]:
    """Method, path and checkpointing of every row."""
    return [
        {"method": method, "kernels": kernels, "checkpointing": checkpointing}
        for method in ("lora", "qlora")
        for kernels in ("auto", "off")
        for checkpointing in ("none", "all")
    ]


def measure(shape: str, *, batch: int, length: int) -> dict[str, Any]:
    """All cases; `{machine, versions, shape, …, rows}`."""
    found = {"machine": machine(), "versions": versions(*LIBRARIES)}
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        folder = Path(name)
        for place, of, job in (
            ("tiny", "tiny", Job("lora", STEPS, 1, batch=2, length=32)),
            ("real", shape, Job("lora", STEPS, 1, batch=batch, length=length)),
        ):
            write_base(folder / place / "base", of)
            write_rows(folder / place, of, rows=job.batch * STEPS, length=job.length)
            job.write(folder / place)
        environment = {**stay_home(), "PYTHONPATH": str(ROOT), "LORA_TUNE_CACHE": str(folder / "cache"), **GIVES_BACK}
        rows = []
        for case in cases():
            command = [sys.executable, "-m", "benchmarks.memory", "--case", json.dumps(case), "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
            if done.returncode:
                raise SystemExit(f"{case} failed: {done.stderr[-2000:]}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    return {**found, "shape": shape, "batch": batch, "length": length, "rows": rows}


def main() -> None:
    """Measure, print a table or the object, keep it."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch", type=at_least_one, default=4)
    parser.add_argument("--length", type=at_least_one, default=1024)
    kept = "print the result as one object, or keep it in a file"
    parser.add_argument("--json", nargs="?", type=result_file, const=STDOUT, help=kept)
    parser.add_argument("--write", action="store_true", help="keep it as benchmarks/results/memory_SHAPE.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        with result_alone():
            found = one_case(given.folder, json.loads(given.case))
        print(json.dumps(found))
        return
    with result_alone():
        result = measure(given.shape, batch=given.batch, length=given.length)
    text = json.dumps(result, indent=1)
    if given.json == STDOUT:
        print(text)
    else:
        for row in result["rows"]:
            name = f"{row['method']} kernels={row['kernels']} checkpointing={row['checkpointing']}"
            print(
                f"{name:42} {row['measured_gib']:6.2f} GiB, planned {row['planned_gib']:.2f}"
                f" ± {row['uncertain_gib']:.2f} (x {row['measured_over_planned']:.2f}),"
                f" minimum {row['minimum_gib']:.2f} (x {row['measured_over_minimum']:.2f})"
            )
    for path in ([given.json] if given.json not in (None, STDOUT) else []) + (
        [RESULTS / f"memory_{given.shape}.json"] if given.write else []
    ):
        path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

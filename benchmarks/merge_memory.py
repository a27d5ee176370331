"""Peak memory and time of a merge on a base of a given shape with random weights, on the CPU.

    python -m benchmarks.merge_memory --shape 1b

Makes a base of that shape and an adapter on all of its linear layers, then runs `lora-tune merge` on it
in a process of its own and prints its peak memory (resident, without mapped files, which can be dropped), its time, and
the divergences that it measured, which mean nothing on random weights. So it also merges the example adapter into the
embedded base, measured on its held-out rows: as trained against merged into the stored base, into what its 4-bit
weights stand for, and re-quantized. `--shape llama-8b` needs 34 GB of disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.shaped_run import SHAPES, write_base
from lora_tune.adapter.write import library_versions

RANK = 16


def make_adapter(base: Path, folder: Path) -> None:
    """A finished folder with a random adapter, as a run on this base would leave it."""
    import torch

    from lora_tune.adapter.folder import BaseRecord, ChatRecord, Manifest, TrainingRecord, write_manifest
    from lora_tune.adapter.write import write_adapter, write_tokenizer
    from lora_tune.data.chat_template import load_chat_template
    from lora_tune.model.methods import SavedAdapter
    from lora_tune.model.source import base_fingerprint, find_base, load_tokenizer
    from lora_tune.model.weights import tensor_infos
    from lora_tune.recipe import Base

    source = find_base(Base(name=str(base)))
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, info in tensor_infos(base).items():
        if "_proj." in name:
            outputs, inputs = info.shape
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            tensors[f"{key}A.weight"] = torch.randn(RANK, inputs, generator=draw) / inputs**0.5
            tensors[f"{key}B.weight"] = 0.05 * torch.randn(outputs, RANK, generator=draw)
    targets = sorted({key.split(".")[-3] for key in tensors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "target_modules": targets}
    folder.mkdir()
    write_adapter(folder, SavedAdapter(config, tensors), source=source)
    chat = load_chat_template(load_tokenizer(source))
    write_tokenizer(folder, chat.tokenizer)
    training = TrainingRecord(
        method="lora", steps=1, batch_size=1, micro_batch_size=1, accumulation=1, max_length=256, learning_rate=2e-4,
        optimizer="adamw", schedule="cosine",
    )  # fmt: skip
    held = BaseRecord(
        name=source.name, kind="local", fingerprint=base_fingerprint(source), quantize="nf4", compute_dtype="bfloat16"
    )
    template = hashlib.sha256((folder / "chat_template.jinja").read_bytes()).hexdigest()
    words = ChatRecord(
        template_sha256=template, origin="base", eos_id=chat.eos_id, pad_id=chat.pad_id, stop_ids=tuple(chat.stop_ids)
    )
    write_manifest(
        folder,
        Manifest(
            tool="benchmark", created="2026-01-01", files={}, base=held, chat=words, data=(), seed=0, ledger={},
            libraries=library_versions(), training=training,
        ),
    )  # fmt: skip


def watched(command: list[str]) -> tuple[float, float, str]:
    """Run a command; returns its seconds, its peak of memory that is its own (GiB), and what it printed."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = [0]

    def watch() -> None:
        looked = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                memory = looked.memory_info()
            except psutil.NoSuchProcess:
                return
            peak[0] = max(peak[0], memory.rss - getattr(memory, "shared", 0))
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()
    printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - began, peak[0] / 2**30, printed


def embedded(place: Path) -> dict[str, Any]:
    """KL, top-1 agreement and loss of the example adapter merged in each way, on its held-out rows."""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "lora_tune", "merge", str(root / "adapters" / "example"), "--output", str(place)]
    command += ["--data", str(root / "recipes" / "quickstart" / "held_out.jsonl"), "--json"]
    facts = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    kinds = {**facts["candidates"], "re-quantized": facts["requantized"]}
    kept = ("kl", "worst_kl", "top1", "loss")
    return {
        "positions": facts["candidates"]["stored"]["positions"],
        "loss_as_trained": facts["loss_as_trained"],
        "chosen": facts["chosen"],
        "merged into": {name: {key: one[key] for key in kept} for name, one in kinds.items()},
    }


def main() -> None:
    """Make base and adapter, merge, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", choices=["embedded", *sorted(SHAPES)], default="1b", help="embedded: that base alone"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where base and adapter are made and kept for another run; a temporary folder by default",
    )
    arguments = parser.parse_args()
    if arguments.shape == "embedded":
        with tempfile.TemporaryDirectory() as scratch:
            keep({**embedded(Path(scratch) / "example"), "versions": library_versions()}, shape="embedded")
        return
    with tempfile.TemporaryDirectory() as scratch:
        place = arguments.folder or Path(scratch)
        if not (place / "adapter").exists():
            write_base(place / "base", arguments.shape)
            make_adapter(place / "base", place / "adapter")
        for old in ("merged", "example"):  # of an earlier run in the same folder
            shutil.rmtree(place / old, ignore_errors=True)
        row = {
            "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I do not know. " * 8}]
        }
        (place / "rows.jsonl").write_text((json.dumps(row) + "\n") * 2, encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "lora_tune",
            "merge",
            str(place / "adapter"),
            "--output",
            str(place / "merged"),
        ]
        command += ["--base", str(place / "base"), "--data", str(place / "rows.jsonl"), "--max-kl", "1e9", "--json"]
        seconds, peak_gib, printed = watched(command)
        example = embedded(place / "example")
        stored = sum(path.stat().st_size for path in (place / "merged").glob("*.safetensors")) / 2**30
    facts = json.loads(printed)
    found: dict[str, Any] = {
        "shape": arguments.shape,
        "base_gib": round(stored, 2),
        "peak_gib": round(peak_gib, 2),
        "seconds": round(seconds),
        "positions": facts["candidates"]["stored"]["positions"],
        "kl": {name: one["kl"] for name, one in facts["candidates"].items()},
        "embedded base": example,
        "machine": platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "versions": library_versions(),
    }
    keep(found, shape=arguments.shape)


def keep(found: dict[str, Any], *, shape: str) -> None:
    """Print the numbers and keep them with the results."""
    text = json.dumps(found, indent=1)
    print(text)
    results = Path(__file__).resolve().parent / "results"
    (results / f"merge_memory_{shape}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

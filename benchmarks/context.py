"""The longest sequence that trains on a card of 8, 12, 16 or 24 GiB, on a larger card that is held to that much.

    python -m benchmarks.context [--shape 8b] [--gib 8,12,16,24] [--base FOLDER] [--json FILE]

QLoRA, rank 32 on all linear layers, one sequence a step, as in the published table that stands beside it: Unsloth's for
Llama-3.1-8B (unsloth.ai/docs/basics/unsloth-benchmarks). A length fits when forward, backward and the update of the
adapter went through; PyTorch is held to the size by `set_per_process_memory_fraction`, from which what the driver and
its libraries hold outside of it is taken off first. `recomputed` computes every layer again in the backward pass,
`offloaded` keeps the inputs of those layers and the embedding in the machine's memory besides, `kept` computes nothing
again. Memory grows by so much a token: two short lengths say where to look, and what is printed was tried.

Nothing can be held to a size on a CPU: there each length is tried once without a limit, and the result says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.context_by_plan import PUBLISHED
from benchmarks.machine import machine, result_file, versions
from benchmarks.peers.protocol import LIBRARIES
from benchmarks.step import SHAPES, write_base

GIB = 2**30
RANK = 32
ROUNDED = 64  # tokens
PROBES = {"8b": (1024, 4096), "small": (64, 256), "tiny": (32, 64)}
HOW = ("offloaded", "recomputed", "kept")


class DoesNotFit(Exception):
    """Memory did not suffice for a length."""


@dataclass(frozen=True)
class Found:
    """The longest length that fitted, its peak (GiB, what PyTorch reserved) and seconds; 0 where none did."""

    tokens: int
    peak_gib: float
    step_s: float
    tried: tuple[int, ...]


def longest(
    step: Callable[[int], tuple[float, float]], *, line: tuple[float, float], room_gib: float, most: int, tries: int = 5
) -> Found:
    """The longest length of a card with `room_gib`; `line` is GiB at no tokens and GiB a token.

    `step(tokens)` gives peak and seconds or raises DoesNotFit. The first try is what the line says; then as much more
    as its peak left room for, or a little less, until two neighbours are known, or nothing is left of `tries`.
    """
    rest, slope = line
    fits, fails, best, tried = 0, most + ROUNDED, Found(0, 0.0, 0.0, ()), []
    guess = (room_gib - rest) / slope
    while len(tried) < tries:
        tokens = _rounded(min(max(guess, ROUNDED), most))
        if tokens <= fits or tokens >= fails:
            tokens = _rounded((fits + fails) / 2)
        if tokens <= fits or tokens >= fails:
            break
        tried.append(tokens)
        try:
            peak_gib, step_s = step(tokens)
        except DoesNotFit:
            fails = tokens
            guess = tokens * 0.93
            continue
        fits, best = tokens, Found(tokens, round(peak_gib, 2), round(step_s, 2), ())
        guess = tokens + 0.9 * max(0.0, room_gib - peak_gib) / slope
        if guess < tokens * 1.02:  # 2 % more is not worth a step of a minute
            break
    return Found(best.tokens, best.peak_gib, best.step_s, tuple(tried))


def _rounded(tokens: float) -> int:
    return int(tokens // ROUNDED) * ROUNDED


class Bench:
    """The base in 4 bit with an adapter, as a run has it; one step at any length."""

    def __init__(self, folder: Path, *, how: str) -> None:
        import torch

        from lora_tune.model.attention import use_varlen
        from lora_tune.model.base import checkpoint_layers, load_base
        from lora_tune.model.kernels.fuse import fuse
        from lora_tune.model.kernels.loss_head import find_head
        from lora_tune.model.methods import attach
        from lora_tune.model.offload import offload_checkpoints
        from lora_tune.model.source import find_base
        from lora_tune.recipe import Base, Lora

        embeddings: Any = "cpu" if how == "offloaded" else "device"
        base = Base(name=str(folder), quantize="nf4", compute_dtype="bfloat16", embeddings=embeddings)
        source = find_base(base)
        self.model = attach(load_base(source, base), Lora(rank=RANK, alpha=RANK), source=source, base=base, seed=3)
        checkpoint_layers(self.model, "none" if how == "kept" else "all")
        if how == "offloaded":
            offload_checkpoints(self.model)
        self.attention_said = use_varlen(self.model, base)
        self.model.train()
        self.fused = fuse(self.model)
        self.head = find_head(self.model)
        self.vocabulary = self.model.config.vocab_size
        self.cuda = torch.cuda.is_available()
        adapter = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer: Any = torch.optim.AdamW(adapter)
        if self.cuda:
            from bitsandbytes.optim import AdamW8bit

            self.optimizer = AdamW8bit(adapter)

    def batch(self, tokens: int) -> dict[str, Any]:
        """One document of this length, all of it trained."""
        import torch

        device = self.model.device
        ids_BT = torch.randint(3, self.vocabulary, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)
        bounds_D = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        positions_BT = torch.arange(tokens, device=device)[None]
        bounds = {"cu_seq_lens_q": bounds_D, "cu_seq_lens_k": bounds_D, "max_length_q": tokens, "max_length_k": tokens}
        return {"input_ids": ids_BT, "labels": ids_BT, "position_ids": positions_BT} | bounds

    def step(self, tokens: int) -> tuple[float, float]:
        """Peak (GiB) and seconds of one step. Raises DoesNotFit."""
        import torch

        from lora_tune.training.loss import WithTargets, summed_loss

        self._fresh()
        began = time.perf_counter()
        try:
            batch = WithTargets(lambda rows: self.batch(tokens))([])
            layer = self.model.get_output_embeddings()
            with torch.autocast(self.model.device.type, torch.bfloat16):
                total, _ = summed_loss(self.model, batch, layer=layer, head=self.head)
            (total / tokens).backward()
            self.optimizer.step()
            if self.cuda:
                torch.cuda.synchronize()
        except torch.OutOfMemoryError as error:
            del error
            raise DoesNotFit from None
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        return self.peak_gib(), time.perf_counter() - began

    def _fresh(self) -> None:
        import torch

        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        """What PyTorch reserved at most since the step began; of a CPU the resident memory."""
        import psutil
        import torch

        if self.cuda:
            return torch.cuda.max_memory_reserved() / GIB
        return float(psutil.Process().memory_info().rss) / GIB


def outside_gib() -> float:
    """What the driver and its libraries hold of the card beside PyTorch's own memory; 0 on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    torch.zeros(1, device="cuda") @ torch.zeros(1, 1, device="cuda").T  # cuBLAS has its workspace
    free, total = torch.cuda.mem_get_info()
    return max(0.0, (total - free - torch.cuda.memory_reserved()) / GIB)


def table(bench: Bench, sizes: list[int], *, shape: str) -> list[dict[str, Any]]:
    """A row for each size of card."""
    import torch

    short, long = PROBES[shape]
    (low, _), (high, _) = bench.step(short), bench.step(long)
    slope = max((high - low) / (long - short), 1e-9)
    line, most, rows = (low - slope * short, slope), 16 * PUBLISHED[24], []
    outside = outside_gib()
    for gib in sizes:
        room = gib - outside
        if bench.cuda:
            total = torch.cuda.get_device_properties(0).total_memory / GIB
            if gib > total:
                rows.append({"gib": gib, "tokens": None, "why": f"the card has {total:.0f} GiB"})
                continue
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(1.0, room / total))
            found = longest(bench.step, line=line, room_gib=room, most=most)
        else:
            peak, seconds = bench.step(short)
            found = Found(short, round(peak, 2), round(seconds, 2), (short,))
        rows.append({"gib": gib, "tokens": found.tokens, "peak_gib": found.peak_gib, "step_s": found.step_s,
                     "tried": list(found.tried), "unsloth_published": PUBLISHED.get(gib)})  # fmt: skip
        print(f"{gib} GiB: {found.tokens:,} tokens, {found.peak_gib:.2f} GiB, {found.step_s:.1f} s", flush=True)
    if bench.cuda:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return rows


def main() -> int:
    """Measure both ways, print and keep the result after each."""
    assert __doc__
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--gib", default="8,12,16,24")
    parser.add_argument("--how", default=",".join(HOW))
    parser.add_argument("--base", type=Path, help="a folder for the random base, made if it is empty, and kept")
    parser.add_argument("--json", type=result_file)
    given = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "versions": versions("lora_tune", *LIBRARIES), "shape": given.shape,
                              "rank": RANK, "limited": bool(machine()["gpu"]), "rows": {}}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="context-") as scratch:
        folder = given.base or Path(scratch) / "base"
        if not (folder / "config.json").exists():
            write_base(folder, given.shape)
        for how in given.how.split(","):
            print(f"{how}:", flush=True)
            bench = Bench(folder, how=how)
            result["attention"] = bench.attention_said or bench.model.config.get_text_config()._attn_implementation
            result["rows"][how] = table(bench, [int(gib) for gib in given.gib.split(",")], shape=given.shape)
            del bench
            gc.collect()
            if given.json:
                given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Steps whose layers are all computed again in the backward pass, in turns, and the most memory that one takes:

    python -m benchmarks.recompute [--rounds 9] [--tokens 1024] [--long 8192] [--json FILE]

Three ways through the same model (`benchmarks.step`'s small shape, bfloat16): `peft`, with `train.kernels: off`;
`whole`, the fused functions as they are where nothing is computed again, gate and up kept; `pieces`, as a run has it:
the MLP keeps its input alone and works on some of the tokens at a time (`kernels/recomputed_mlp.py`). Seconds are
processor time on one thread. Memory is what PyTorch allocated at most during the step beyond what it had before, by its
profiler, for one document of `--long` tokens, the MLP's pieces made as small as an 8B model's are at that length.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch

from benchmarks.machine import machine, print_and_keep, result_file, versions
from benchmarks.peers.protocol import LIBRARIES
from benchmarks.step import SHAPES, write_base
from lora_tune.model import pieces
from lora_tune.model.attention import use_varlen
from lora_tune.model.base import checkpoint_layers, load_base
from lora_tune.model.kernels import fuse as fusing
from lora_tune.model.methods import attach
from lora_tune.model.source import find_base
from lora_tune.recipe import Base, Lora

SIDES = ("peft", "whole", "pieces")
WARM_UP = 1
WIDTH_8B, MIB = 14_336, 2**20


class Side:
    """One way through the model."""

    def __init__(self, name: str, folder: Path, quantize: Literal["none", "nf4"]) -> None:
        base = Base(name=str(folder), quantize=quantize, compute_dtype="bfloat16", attention="varlen")
        source = find_base(base)
        self.name = name
        self.model = attach(load_base(source, base), Lora(), source=source, base=base, seed=3)
        checkpoint_layers(self.model, "all")
        use_varlen(self.model, base)
        self.model.train()
        if name == "whole":
            with patch.object(fusing, "_blocks", return_value={}):
                fusing.fuse(self.model)
        elif name == "pieces":
            fusing.fuse(self.model)

    def step(self, tokens: int) -> tuple[float, float]:
        """Seconds of processor time of forward and backward pass, and the loss; one document."""
        draw = torch.Generator().manual_seed(1)
        ids_BT = torch.randint(3, self.model.config.vocab_size, (1, tokens), generator=draw)
        bounds_D = torch.tensor([0, tokens], dtype=torch.int32)
        lengths = {"cu_seq_lens_q": bounds_D, "cu_seq_lens_k": bounds_D, "max_length_q": tokens, "max_length_k": tokens}
        places = torch.arange(tokens)[None]
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = (
                self.model.get_base_model()
                .model(input_ids=ids_BT, position_ids=places, use_cache=False, **lengths)
                .last_hidden_state
            )
        loss = hidden[:, -1].float().square().mean()  # the head has a benchmark of its own
        loss.backward()
        seconds = time.process_time() - began
        self.model.zero_grad()
        return seconds, loss.item()

    def evaluate(self, tokens: int) -> None:
        """A pass without gradients over one document, as the held-out loss is computed."""
        model = self.model.eval()
        with torch.no_grad():
            model.get_base_model().model(input_ids=torch.full((1, tokens), 3), use_cache=False)
        model.train()


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that PyTorch allocated on the CPU at once during some work, beyond what was there before."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@contextmanager
def pieces_of_8b(shape: str) -> Iterator[None]:
    """As many tokens in a piece as those of an 8B Llama."""
    size = pieces.PIECE_BYTES * SHAPES[shape]["intermediate_size"] // WIDTH_8B
    with patch.object(pieces, "PIECE_BYTES", size):
        yield


def measure(folder: Path, quantize: Literal["none", "nf4"], *, tokens: int, long: int, rounds: int) -> dict[str, Any]:
    """Median seconds and peaks of all sides over one kind of base."""
    sides = [Side(name, folder, quantize) for name in SIDES]
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    losses = {}
    for _ in range(rounds + WARM_UP):
        for side in sides:
            took, losses[side.name] = side.step(tokens)
            seconds[side.name].append(took)
    medians = {name: round(statistics.median(found[WARM_UP:]), 3) for name, found in seconds.items()}
    with pieces_of_8b("small"):
        peaks = {side.name: peak_bytes(partial(side.step, long)) for side in sides}
        evaluations = {side.name: peak_bytes(partial(side.evaluate, long)) for side in sides}
    ratios = {f"pieces_over_{name}": round(medians[name] / medians["pieces"], 3) for name in SIDES[:2]}
    away = max(abs(losses[name] / losses["peft"] - 1) for name in SIDES)
    return {"quantize": quantize, "tokens": tokens, "cpu_s": medians, **ratios, "losses_differ_by": away,
            "long_tokens": long, "peak_mib": {name: round(peak / MIB, 1) for name, peak in peaks.items()},
            "bytes_a_token": {name: round(peak / long) for name, peak in peaks.items()},
            "bytes_a_token_evaluated": {name: round(peak / long) for name, peak in evaluations.items()}}  # fmt: skip


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=1024, help="of the steps that are timed")
    parser.add_argument("--long", type=int, default=8192, help="of the step whose memory is measured")
    parser.add_argument("--json", type=result_file)
    given = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": machine(), "versions": versions("lora_tune", *LIBRARIES), "shape": "small"}
    with tempfile.TemporaryDirectory(prefix="recompute-") as folder:
        write_base(Path(folder), "small")
        result["rows"] = [
            measure(Path(folder), quantize, tokens=given.tokens, long=given.long, rounds=given.rounds)
            for quantize in ("none", "nf4")
        ]
    print_and_keep(result, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

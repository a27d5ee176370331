"""A micro-step over packed rows with a mask and with attention by document, on the embedded base, taking turns:

    python -m benchmarks.attention [--rounds 9] [--json FILE]

Rows are packed from documents of random tokens whose lengths are log-normal; both sides get the same rows in the same
order through a run's own trainer, so that their losses must agree. On a CPU the figure is seconds of processor time on
one thread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from benchmarks.machine import machine, print_and_keep, result_file, versions
from benchmarks.peers.protocol import LIBRARIES
from lora_tune.data.packing import pack
from lora_tune.model.attention import use_varlen
from lora_tune.model.base import load_base
from lora_tune.model.methods import attach
from lora_tune.model.source import find_base, load_tokenizer
from lora_tune.recipe import Base, Lora, Train
from lora_tune.training.trainer import RunTrainer, build

WARM_UP = 2
CASES = ((60, 512, "float32"), (150, 1024, "bfloat16"))  # mean tokens of a document, of a row at most, dtype


def rows(*, mean: int, longest: int, vocabulary: int) -> Dataset:
    """Packed rows of 400 documents."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(mean), 0.5, 400).astype(int), 8, longest)
    made = []
    for sequence in pack(lengths, np.zeros(len(lengths), dtype=bool), max_length=longest, seed=0):
        ids = [int(token) for index in sequence for token in draw.integers(5, vocabulary, lengths[index])]
        sizes = [int(lengths[index]) for index in sequence]
        made.append({"input_ids": ids, "labels": ids, "seq_lengths": sizes, "rows": [[0, int(i)] for i in sequence]})
    return Dataset.from_list(made)


def trainer(attention: Any, data: Dataset, *, longest: int, dtype: Any, folder: Path) -> RunTrainer:
    """The trainer of a run over the embedded base."""
    base = Base(name="builtin:quickstart", quantize="none", compute_dtype=dtype, attention=attention)
    source = find_base(base)
    model = attach(load_base(source, base), Lora(), source=source, base=base, seed=3)
    if why := use_varlen(model, base):
        raise SystemExit(why)
    chat: Any = SimpleNamespace(tokenizer=load_tokenizer(source), align=lambda model: None)
    train = Train(batch_size=2, micro_batch_size=2, max_length=longest, gradient_checkpointing="none")
    return build(model, data, train=train, evaluation=None, seed=3, folder=folder, chat=chat)


def measure(mean: int, longest: int, dtype: str, *, rounds: int) -> dict[str, Any]:
    """Median seconds of both sides, and the largest difference of their losses."""
    vocabulary = int(find_base(Base(name="builtin:quickstart")).config["vocab_size"])
    data = rows(mean=mean, longest=longest, vocabulary=vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            name: trainer(name, data, longest=longest, dtype=dtype, folder=Path(folder)) for name in ("sdpa", "varlen")
        }
        batches = {name: iter(side.get_train_dataloader()) for name, side in sides.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        losses: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds + WARM_UP):
            for name, side in sides.items():
                side._micro_losses = []
                batch = next(batches[name])
                divisor = (batch["labels"] != -100).sum()
                began = time.process_time()
                with side.casts("autocast"):
                    loss = side.micro_step(side.model.train(), batch, divisor)
                side.model.zero_grad()
                seconds[name].append(time.process_time() - began)
                losses[name].append(float(loss))
    medians = {name: round(statistics.median(found[WARM_UP:]), 4) for name, found in seconds.items()}
    away = max(abs(one - two) for one, two in zip(losses["sdpa"], losses["varlen"], strict=True))
    gain = round(medians["sdpa"] / medians["varlen"], 3)
    case = {"document_tokens": mean, "row_tokens": longest, "dtype": dtype}
    return {**case, "cpu_s": medians, "by_document_over_mask": gain, "losses_differ_by": away}


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=result_file)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(*case, rounds=given.rounds) for case in CASES]
    result = {"machine": machine(), "versions": versions("lora_tune", *LIBRARIES), "rows": found}
    print_and_keep(result, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

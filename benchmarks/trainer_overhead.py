"""What the trainer costs over a bare loop on a CPU, and what each of its overrides gives back, in one run.

    python -m benchmarks.trainer_overhead [--steps 6] [--json FILE]

The same random base (4.9 M parameters, vocabulary 4,096), the same packed rows and the same optimizer steps go
through: a bare PyTorch loop over the padding-free batches, SFTTrainer as it is, ours without folded batches, ours. The
figure is trained tokens per second of CPU time (one thread), so that a busy machine does not change it much; the
ratios are what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import SFTTrainer

from benchmarks.machine import result_file
from lora_tune.recipe import Train
from lora_tune.training import trainer as ours

VOCABULARY, LENGTH = 4096, 512
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
)


def model(dtype: torch.dtype) -> Any:
    """The base with a rank-16 adapter in the dtype of the base."""
    torch.manual_seed(1)
    base = LlamaForCausalLM(CONFIG).to(dtype)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def packed_rows(count: int) -> Dataset:
    """Rows of up to 512 tokens in documents of 40 to 160; two thirds of the tokens are trained."""
    draw = random.Random(2)
    rows = []
    for _ in range(count):
        lengths: list[int] = []
        while sum(lengths) < LENGTH - 160:
            lengths.append(draw.randint(40, 160))
        ids = [draw.randrange(4, VOCABULARY) for _ in range(sum(lengths))]
        labels = [token if draw.random() < 0.66 else -100 for token in ids]
        rows.append({"input_ids": ids, "labels": labels, "seq_lengths": lengths})
    return Dataset.from_list(rows)


def chat() -> Any:
    """A stand-in for the chat template: the trainer asks it for the tokenizer, and to align the special tokens."""
    words = {f"t{number}": number for number in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)), pad_token="t0", eos_token="t1")
    return SimpleNamespace(tokenizer=tokenizer, align=lambda model: None)


def seconds_of_loop(rows: Dataset, train: Train, *, dtype: torch.dtype, folder: Path) -> float:
    """CPU seconds of a bare loop: forward with the model's own loss, backward, clip, fused AdamW."""
    trainer = ours.build(model(dtype), rows, train=train, evaluation=None, seed=3, folder=folder, chat=chat())
    trainer.data_collator = trainer.data_collator.flat
    net = trainer.model.train()
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, fused=True)
    began = time.process_time()
    for number, batch in enumerate(trainer.get_train_dataloader(), start=1):
        net(**batch, use_cache=False).loss.backward()
        if number % trainer.steps.accumulation == 0:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return time.process_time() - began


def seconds_of_trl(rows: Dataset, train: Train, *, dtype: torch.dtype, folder: Path) -> float:
    """CPU seconds of SFTTrainer.train() with the same arguments and nothing overridden."""
    net = model(dtype)
    steps = ours.plan_steps(len(rows), train)
    args = ours._sft_config(net, train=train, steps=steps, seed=3, folder=folder)
    trainer = SFTTrainer(net, args, train_dataset=rows, processing_class=chat().tokenizer)
    trainer.remove_callback(PrinterCallback)
    began = time.process_time()
    trainer.train()
    return time.process_time() - began


def seconds_of_ours(rows: Dataset, train: Train, *, dtype: torch.dtype, folder: Path, folded: str) -> float:
    """CPU seconds of our trainer; `folded` "no" keeps TRL's one long row a micro-batch."""
    trainer = ours.build(model(dtype), rows, train=train, evaluation=None, seed=3, folder=folder, chat=chat())
    if folded == "no":
        trainer.data_collator = trainer.data_collator.flat
    began = time.process_time()
    trainer.train()
    return time.process_time() - began


def main() -> None:
    """Measure the four loops in two dtypes and print tokens per CPU-second and the ratio to SFTTrainer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=result_file)
    given = parser.parse_args()
    torch.set_num_threads(1)
    train = Train(batch_size=16, micro_batch_size=8, max_length=LENGTH)
    rows = packed_rows(16 * given.steps)
    tokens = sum(map(sum, rows["seq_lengths"]))
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for dtype in (torch.float32, torch.bfloat16):
            common: dict[str, Any] = {"rows": rows, "train": train, "dtype": dtype, "folder": Path(name)}
            seconds = {
                "bare loop": seconds_of_loop(**common),
                "SFTTrainer": seconds_of_trl(**common),
                "ours, one long row": seconds_of_ours(**common, folded="no"),
                "ours": seconds_of_ours(**common, folded="yes"),
            }
            results[str(dtype)] = {name: tokens / spent for name, spent in seconds.items()}
    for kind, speeds in results.items():
        for name, speed in speeds.items():
            print(f"{kind:16} {name:20} {speed:8.0f} tokens/CPU-s  {speed / speeds['SFTTrainer']:.2f} x SFTTrainer")
    if given.json:
        given.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

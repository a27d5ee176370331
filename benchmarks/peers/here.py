"""The sides of `benchmarks.step` that run in this environment: a bare PEFT loop, TRL's SFTTrainer, and lora_tune."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

from benchmarks.peers.protocol import ALPHA, BATCH, LEARNING_RATE, LENGTH, RANK, Turns, arguments, rows_of
from lora_tune.training.batches import EpochSampler


class Waits(TrainerCallback):
    """Takes turns with the other tools around every step of a trainer."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Wait."""
        self.turns.begin()

    def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """The loss is logged right after every step."""
        if "loss" in rest["logs"]:
            self.turns.end(float(rest["logs"]["loss"]))


def plain_model(folder: Path, method: str) -> Any:
    """The base as transformers loads it, in bfloat16, with bfloat16 adapters: the fastest way that PEFT offers."""
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options = {"quantization_config": four_bit} if method == "qlora" else {}
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16, **options)
    for module in model.modules():  # or bitsandbytes may repack 4-bit weights on a CPU, and lose gradients
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    torch.manual_seed(3)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.cuda() if torch.cuda.is_available() else model


def raw(given: Any, turns: Turns) -> None:
    """Forward with the model's own loss, backward, clip, fused AdamW."""
    model = plain_model(given.folder, given.method).train()
    rows = torch.tensor(rows_of(given.folder), device=model.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    for number in range(given.steps):
        turns.begin()
        ids = rows[number * BATCH : (number + 1) * BATCH]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turns.end(loss.item())


def trl(given: Any, turns: Turns) -> None:
    """SFTTrainer with the same model and rows, in bfloat16, without recomputation."""
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows_of(given.folder)])
    with tempfile.TemporaryDirectory() as out:
        args = SFTConfig(
            output_dir=out, per_device_train_batch_size=BATCH, max_steps=given.steps, learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[], max_length=None,
            gradient_checkpointing=False, bf16=True, use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True}, dataloader_pin_memory=False, shuffle_dataset=False,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        model = plain_model(given.folder, given.method)
        trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer())
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Waits(turns))
        trainer.train()


class InOrder(EpochSampler):
    """The rows as they come, which is the order of the other tools."""

    def order(self, epoch: int) -> list[int]:
        """Row numbers of an epoch."""
        return list(range(self.rows))


def ours(given: Any, turns: Turns, *, kernels: str) -> None:
    """The trainer of `lora-tune run`, with all of its accounting; adapters in float32 as in a run."""
    from lora_tune.model.base import load_base
    from lora_tune.model.methods import attach
    from lora_tune.model.source import find_base
    from lora_tune.recipe import Base, Lora, Train
    from lora_tune.training import trainer as training

    quantize: Any = "nf4" if given.method == "qlora" else "none"
    base = Base(name=str(given.folder / "base"), quantize=quantize, compute_dtype="bfloat16")
    lora = Lora(rank=RANK, alpha=ALPHA)
    train = Train(
        max_steps=given.steps, batch_size=BATCH, micro_batch_size=BATCH, max_length=LENGTH, warmup=0, packing=False,
        learning_rate=LEARNING_RATE, schedule="constant", gradient_checkpointing="none", optimizer="adamw",
        kernels=kernels,
    )  # fmt: skip
    rows = rows_of(given.folder)
    dataset = Dataset.from_list([{"input_ids": row, "labels": row, "seq_lengths": [len(row)]} for row in rows])
    source = find_base(base)
    model = attach(load_base(source, base), lora, source=source, base=base, seed=3)
    chat: Any = SimpleNamespace(tokenizer=tokenizer(), align=lambda model: None)
    with tempfile.TemporaryDirectory() as out:
        trainer = training.build(model, dataset, train=train, evaluation=None, seed=3, folder=Path(out), chat=chat)
        trainer._sampler = InOrder(len(rows), seed=3)
        trainer.add_callback(Waits(turns))
        trainer.train()


def tokenizer() -> PreTrainedTokenizerFast:
    """A stand-in: the rows are tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"t{number}": number for number in range(16)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)), pad_token="t0", eos_token="t1")


SIDES: dict[str, Callable[[Any, Turns], None]] = {
    "raw": raw,
    "trl": trl,
    "lora_tune": lambda given, turns: ours(given, turns, kernels="auto"),
    "lora_tune, PEFT's path": lambda given, turns: ours(given, turns, kernels="off"),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = arguments()
    sys.exit(SIDES[asked.tool](asked, Turns()))

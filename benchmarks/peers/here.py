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
    AutoTokenizer,
    BitsAndBytesConfig,
    PrinterCallback,
    TrainerCallback,
)

from benchmarks.peers.protocol import Job, Turns, given, labelled, rows_of, same_start, waits
from lora_tune.model.base import checkpoint_layers
from lora_tune.recipe import Base, Lora, Train
from lora_tune.training.batches import EpochSampler


def plain_model(folder: Path, job: Job) -> Any:
    """The base as transformers loads it, in bfloat16, with bfloat16 adapters: the fastest way that PEFT offers."""
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options = {"quantization_config": four_bit} if job.method == "qlora" else {}
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16, **options)
    for module in model.modules():  # or bitsandbytes may repack 4-bit weights on a CPU, and lose gradients
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    config = LoraConfig(r=job.rank, lora_alpha=job.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    same_start(model, job.rank)
    checkpoint_layers(model, job.recompute)
    return model.cuda() if torch.cuda.is_available() else model


def raw(folder: Path, job: Job, turns: Turns) -> None:
    """Forward with the model's own loss, backward, clip, fused AdamW."""
    model = plain_model(folder, job).train()
    rows = torch.tensor(rows_of(folder), device=model.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0, fused=True)
    for number in range(job.steps):
        turns.begin()
        ids = rows[number * job.batch : (number + 1) * job.batch]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turns.loss(loss.item())
    turns.finish()


def floor(folder: Path, job: Job, turns: Turns) -> None:
    """The base alone: forward, and the gradient of the embeddings' output; no adapter, nothing is trained.

    What no training through this base can do without, in the base's own modules.
    """
    model = plain_model(folder, job).unload().train().requires_grad_(False)
    model.enable_input_require_grads()
    rows = torch.tensor(rows_of(folder), device=model.device)
    for number in range(job.steps):
        turns.begin()
        ids = rows[number * job.batch : (number + 1) * job.batch]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        turns.loss(loss.item())
    turns.finish()


def trl(folder: Path, job: Job, turns: Turns) -> None:
    """SFTTrainer with the same model and rows, in bfloat16, without recomputation."""
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list(labelled(folder)).remove_columns("attention_mask")
    args = SFTConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=job.batch, max_steps=job.steps,
        learning_rate=job.learning_rate, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
        optim="adamw_torch_fused", logging_steps=1, save_strategy="no", report_to=[], max_length=None,
        gradient_checkpointing=job.recompute == "all", bf16=True, use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True}, dataloader_pin_memory=False, shuffle_dataset=False,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    trainer = SFTTrainer(plain_model(folder, job), args, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(waits(turns, TrainerCallback))
    trainer.train()


class InOrder(EpochSampler):
    """The rows as they come, which is the order of the other tools."""

    def order(self, epoch: int) -> list[int]:
        """Row numbers of an epoch."""
        return list(range(self.rows))


def train_section(job: Job, *, kernels: str, checkpointing: str = "none", compiled: str = "off") -> Train:
    """The recipe's `train` section for this job."""
    return Train(
        max_steps=job.steps, batch_size=job.batch, micro_batch_size=job.batch, max_length=job.length, warmup=0,
        packing=False, learning_rate=job.learning_rate, schedule="constant", gradient_checkpointing=checkpointing,
        optimizer="adamw", kernels=kernels, compile=compiled,
    )  # fmt: skip


def base_section(folder: Path, job: Job, *, attention: str = "auto") -> Base:
    """The recipe's `base` section for this job."""
    quantize: Any = "nf4" if job.method == "qlora" else "none"
    return Base(name=str(folder / "base"), quantize=quantize, compute_dtype="bfloat16", attention=attention)


def ours(folder: Path, job: Job, out: Path, *, train: Train, attention: str = "auto") -> Any:
    """The trainer of `lora-tune run`, with all of its accounting; adapters in float32 as in a run."""
    from lora_tune.model.attention import use_varlen
    from lora_tune.model.base import load_base
    from lora_tune.model.methods import attach
    from lora_tune.model.source import find_base
    from lora_tune.training import trainer as training

    base, lora = base_section(folder, job, attention=attention), Lora(rank=job.rank, alpha=job.alpha)
    columns = [{**row, "seq_lengths": [len(row["labels"])]} for row in labelled(folder)]
    dataset = Dataset.from_list(columns).remove_columns("attention_mask")
    source = find_base(base)
    model = attach(load_base(source, base), lora, source=source, base=base, seed=3)
    checkpoint_layers(model, train.gradient_checkpointing)
    same_start(model, job.rank)
    use_varlen(model, base)
    chat: Any = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(folder / "base"), align=lambda model: None)
    trainer = training.build(model, dataset, train=train, evaluation=None, seed=3, folder=out, chat=chat)
    trainer._sampler = InOrder(len(dataset), seed=3)
    return trainer


def our_side(
    folder: Path, job: Job, turns: Turns, *, kernels: str = "auto", compiled: str = "off", attention: str = "auto"
) -> None:
    """Train in turns."""
    train = train_section(job, kernels=kernels, checkpointing=job.recompute, compiled=compiled)
    with tempfile.TemporaryDirectory() as out:
        trainer = ours(folder, job, Path(out), train=train, attention=attention)
        trainer.add_callback(waits(turns, TrainerCallback))
        trainer.train()


SIDES: dict[str, Callable[[Path, Job, Turns], None]] = {
    "raw": raw,
    "floor": floor,
    "trl": trl,
    "lora_tune": our_side,
    "unfused": lambda folder, job, turns: our_side(folder, job, turns, kernels="off"),
    "masked": lambda folder, job, turns: our_side(folder, job, turns, attention="sdpa"),
    "by_document": lambda folder, job, turns: our_side(folder, job, turns, attention="varlen"),
    "compiled": lambda folder, job, turns: our_side(folder, job, turns, compiled="layers"),
}

if __name__ == "__main__":
    name, place, work = given()
    torch.set_num_threads(work.threads)
    sys.exit(SIDES[name](place, work, Turns(("lora_tune", "trl"))))

"""Unsloth as a side of `benchmarks.step`; runs in an environment of its own (README.md beside this file)."""

from __future__ import annotations

from unsloth import FastLanguageModel  # isort: skip  (it patches the libraries below when it is imported first)

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.peers.protocol import TARGETS, Turns, given, labelled, same_start, waits


def main() -> None:
    """Its own loader, its own adapter, its SFTTrainer; rows that are tokens already; no recomputation."""
    _, folder, job = given()
    turns = Turns(("unsloth", "unsloth_zoo", "trl"))
    torch.set_num_threads(job.threads)
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder / "base"), max_seq_length=job.length, dtype=torch.bfloat16, load_in_4bit=job.method == "qlora"
    )
    model = FastLanguageModel.get_peft_model(
        model, r=job.rank, lora_alpha=job.alpha, target_modules=list(TARGETS), lora_dropout=0, bias="none",
        use_gradient_checkpointing="unsloth" if job.recompute == "all" else False, random_state=3,
    )  # fmt: skip
    same_start(model, job.rank)
    args = SFTConfig(
        output_dir=str(folder / "unsloth"), per_device_train_batch_size=job.batch, max_steps=job.steps,
        learning_rate=job.learning_rate, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
        optim="adamw_torch_fused", logging_steps=1, save_strategy="no", report_to="none", max_length=None,
        gradient_checkpointing=job.recompute == "all", bf16=True, use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True}, dataloader_pin_memory=False, shuffle_dataset=False,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    dataset = Dataset.from_list(labelled(folder))
    trainer = SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(waits(turns, TrainerCallback))
    trainer.train()


if __name__ == "__main__":
    main()

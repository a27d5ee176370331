"""LLaMA-Factory as a side of `benchmarks.step`; runs in an environment of its own (README.md beside this file)."""

from __future__ import annotations

import torch
from datasets import Dataset, DatasetDict
from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback

from benchmarks.peers.protocol import TARGETS, Job, Turns, given, labelled, same_start, waits


class Starts(TrainerCallback):
    """Puts the common start into the adapter that it has made."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_train_begin(self, args, state, control, **rest) -> None:  # type: ignore[no-untyped-def]
        """Before the first step."""
        same_start(rest["model"], self.job.rank)


def main() -> None:
    """Its own command as a dictionary, with rows that are tokens already; no recomputation."""
    _, folder, job = given()
    turns = Turns(("llamafactory", "trl"))
    torch.set_num_threads(job.threads)
    table = Dataset.from_list(labelled(folder))
    place = folder / "llamafactory"
    DatasetDict({"train": table}).save_to_disk(str(place / "rows"))
    four_bit = {"quantization_bit": 4, "quantization_type": "nf4", "double_quantization": True}
    asked = {
        "stage": "sft", "do_train": True, "model_name_or_path": str(folder / "base"), "finetuning_type": "lora",
        "template": "empty", "dataset": "rows", "tokenized_path": str(place / "rows"),
        "output_dir": str(place / "out"), "overwrite_output_dir": True,  # there is one for each number of threads
        "cutoff_len": job.length, "lora_rank": job.rank, "lora_alpha": job.alpha, "lora_dropout": 0.0,
        "lora_target": ",".join(TARGETS), "disable_gradient_checkpointing": job.recompute == "none",
        "disable_shuffling": True,
        "per_device_train_batch_size": job.batch, "gradient_accumulation_steps": 1, "max_steps": job.steps,
        "learning_rate": job.learning_rate, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "optim": "adamw_torch_fused", "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "bf16": True, "use_cpu": not torch.cuda.is_available(), "disable_tqdm": True,
        "dataloader_pin_memory": False, **(four_bit if job.method == "qlora" else {}),
    }  # fmt: skip
    run_exp(asked, callbacks=[Starts(job), waits(turns, TrainerCallback)])


if __name__ == "__main__":
    main()

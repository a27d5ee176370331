"""What a training did, for the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_tune.adapter.folder import ReplanRecord, TrainingRecord
from lora_tune.model.rate import rate_of
from lora_tune.recipe import Recipe
from lora_tune.training.progress import read_metrics

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_tune.data.pipeline import Prepared


def training_record(folder: Path, recipe: Recipe, *, model: PeftModel, prepared: Prepared) -> TrainingRecord:
    """Sum up the steps in `metrics.jsonl`, so that a resumed run counts all of them; seconds are those of the steps."""
    train, lines = recipe.train, read_metrics(folder / "metrics.jsonl")
    rows = [row for row in lines if "loss" in row]
    replans = tuple(ReplanRecord(**row["replan"]) for row in lines if "replan" in row)
    micro_batch_size = train.batch_size if train.micro_batch_size == "auto" else train.micro_batch_size
    micro_batch_size = min([micro_batch_size, *(found.micro_batch_size or micro_batch_size for found in replans)])
    return TrainingRecord(
        method=recipe.lora.method,
        steps=len(rows),
        epochs=rows[-1]["epoch"] if rows else None,
        rows=prepared.ledger.total("kept"),
        tokens=sum(row["tokens"] for row in rows),
        trained_tokens=sum(row["trained_tokens"] for row in rows),
        seconds=round(sum(row["step_s"] for row in rows), 3),
        final_loss=rows[-1]["loss"] if rows else None,
        batch_size=train.batch_size,
        micro_batch_size=micro_batch_size,
        accumulation=train.batch_size // micro_batch_size,
        max_length=train.max_length,
        learning_rate=rate_of(train),
        optimizer=train.optimizer,
        schedule=train.schedule,
        gradient_checkpointing=train.gradient_checkpointing,
        trainable_parameters=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        peak_gib=max((row["gib"] for row in rows), default=None),
        budget=train.budget,
        replans=replans,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    )

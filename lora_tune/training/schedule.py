"""How many steps, of how many sequences, with which optimizer, schedule and precision."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import nn

from lora_tune.errors import Problem, RecipeError
from lora_tune.model.strategy import uneven
from lora_tune.recipe import Train
from lora_tune.recipe_values import share_of

UNLIMITED = 2**31 - 1  # steps of a training that ends with its time
# recipe name -> name in transformers
OPTIMIZERS = {
    "auto": "adamw_torch_fused",
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "lion_8bit": "lion_8bit",
    "sgd": "sgd",
}
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
    "polynomial": "polynomial",
    "inverse_sqrt": "inverse_sqrt",
}


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of a training. An epoch shows every row once; its last step may hold fewer sequences.

    With a time budget `total_steps` is UNLIMITED. Each of the `processes` has `accumulation` micro-batches.
    """

    micro_batch_size: int
    accumulation: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    processes: int = 1

    def as_json(self) -> dict[str, int]:
        """The numbers by name, to be stored with the run."""
        return asdict(self)


def plan_steps(rows: int, train: Train, *, processes: int = 1) -> Steps:
    """The steps that `train` means for this many rows (packed sequences count as rows).

    Raises:
        RecipeError: `micro_batch_size` is still "auto", or does not divide what a process has of `batch_size`.
    """
    micro = train.micro_batch_size
    if micro == "auto":
        problem = Problem("must be a number by now, got 'auto'", "plan the memory first", key="train.micro_batch_size")
        raise RecipeError(problem)
    if unshared := uneven(train.batch_size, processes):
        raise RecipeError(unshared)
    each = train.batch_size // processes
    if each % micro:
        of = f"batch_size {train.batch_size}" + (f" / {processes} processes" if processes > 1 else "")
        reason = f"must divide {of} without a rest, got {micro}"
        raise RecipeError(Problem(reason, key="train.micro_batch_size"))
    accumulation = each // micro
    steps_per_epoch = math.ceil(rows / train.batch_size)
    if train.budget:  # training/budget.py says when it ends and where its warm-up does
        return Steps(micro, accumulation, steps_per_epoch, UNLIMITED, 0, processes)
    total = train.max_steps or math.ceil(train.epochs * steps_per_epoch)
    return Steps(micro, accumulation, steps_per_epoch, total, min(share_of(train.warmup, total), total), processes)


def optimizer_name(train: Train) -> str:
    """The optimizer under its name in transformers."""
    return OPTIMIZERS[train.optimizer]


def mixed_precision(model: nn.Module) -> Literal["none", "bf16", "fp16"]:
    """The autocast that fits the dtypes that the model already has.

    A float16 base on a GPU trains float32 adapters with loss scaling; a bfloat16 base with float32 adapters computes
    in bfloat16; where base and adapter share a dtype there is nothing to cast.
    """
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad and p.dtype.is_floating_point}
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    if torch.float16 in frozen:
        return "fp16" if torch.cuda.is_available() else "none"
    if torch.bfloat16 in frozen and torch.float32 in trained:
        return "bf16"
    return "none"

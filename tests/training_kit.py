"""Small trainings for tests: rows drawn by a seed, a tiny base with an adapter, and a trainer over both."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from lora_tune.data.chat_template import ChatTemplate, load_chat_template
from lora_tune.model.base import load_base
from lora_tune.model.methods import attach
from lora_tune.model.source import find_base, load_tokenizer
from lora_tune.recipe import Base, Lora, Train
from lora_tune.training.evaluations import Evaluation
from lora_tune.training.trainer import RunTrainer, build

gc.freeze()  # accelerate collects garbage at every start of a training, through all that was imported

Document = dict[str, Any]


def documents(count: int, *, seed: int = 0, longest: int = 24) -> list[Document]:
    """Documents of 3 to `longest` random bytes, of which a random share is trained; line n stands at (0, n)."""
    draw = random.Random(seed)
    made = []
    for line in range(1, count + 1):
        ids = [draw.randint(4, 259) for _ in range(draw.randint(3, longest))]
        share = draw.random()
        labels = [token if draw.random() < share else -100 for token in ids]
        labels[-1] = ids[-1]
        made.append({"input_ids": ids, "labels": labels, "seq_lengths": [len(ids)], "rows": [[0, line]]})
    return made


def packed(parts: Iterable[Sequence[Document]]) -> Dataset:
    """One row for each group of documents."""
    rows = [{key: [x for part in group for x in part[key]] for key in group[0]} for group in parts]
    return Dataset.from_list(rows)


def rows(count: int, *, seed: int = 0, pack: int = 1) -> Dataset:
    """`count` rows of `pack` documents each."""
    made = documents(count * pack, seed=seed)
    return packed(made[start : start + pack] for start in range(0, len(made), pack))


def adapter(
    folder: Path, *, base: Base | None = None, lora: Lora | None = None, seed: int = 5, spread: float = 0.0
) -> Any:
    """The base in `folder` with an adapter; `spread` > 0 moves B away from zero so that every gradient has a size."""
    base = base or Base(name=str(folder), quantize="none", compute_dtype="float32")
    source = find_base(base)
    model = attach(load_base(source, base), lora or Lora(rank=4, alpha=8.0), source=source, base=base, seed=seed)
    if spread:
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                torch.nn.init.normal_(parameter, std=spread)
    return model


@cache
def chat_of(base_folder: Path) -> ChatTemplate:
    """The chat template of a base; probing it takes longer than a small training."""
    return load_chat_template(load_tokenizer(find_base(Base(name=str(base_folder)))))


def trainer(
    folder: Path,
    base_folder: Path,
    data: Dataset,
    *,
    train: Train,
    model: Any = None,
    evaluation: Evaluation | None = None,
    seed: int = 3,
) -> RunTrainer:
    """A trainer over `data` that keeps its checkpoints in `folder`."""
    chat = chat_of(base_folder)
    model = model if model is not None else adapter(base_folder)
    return build(model, data, train=train, evaluation=evaluation, seed=seed, folder=folder, chat=chat)


def losses(trained: RunTrainer) -> list[str]:
    """The loss of every step, exactly."""
    return [float(row["loss"]).hex() for row in trained.state.log_history if "loss" in row]


def weights(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the trainable parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether names, dtypes and every bit agree."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )

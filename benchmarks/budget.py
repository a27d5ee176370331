"""Does a training end with its time budget? Every schedule, with a slow stretch in the middle, by the wall clock.

    python -m benchmarks.budget [--seconds 60] [--json FILE]

A random base (1.1 M parameters) trains under `train.budget` with an evaluation every 50 steps and checkpoints every
100. Between one and two thirds of the time every step sleeps as long again as it should take. Printed for each
schedule: seconds of the loop over the budget, the learning rate over its peak in the last step and after it, the steps,
the plans that were told, and the largest move of the schedule in one step times the number of steps (1 is even).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from benchmarks.machine import result_file
from lora_tune.recipe import Train
from lora_tune.training.evaluations import Evaluation
from lora_tune.training.resume import RunFacts
from lora_tune.training.schedule import SCHEDULES
from lora_tune.training.trainer import build

VOCABULARY, LENGTH, PEAK = 1024, 128, 1e-3
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LENGTH,
)


class Slow(TrainerCallback):
    """Sleeps in every step of the middle third, and keeps when the loop began and ended."""

    def __init__(self, budget_s: float, *, extra_s: float) -> None:
        self.budget_s, self.extra_s = budget_s, extra_s
        self.began = self.ended = self.slept = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The loop begins."""
        self.began = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step of the middle third takes longer."""
        if self.budget_s / 3 <= time.perf_counter() - self.began < 2 * self.budget_s / 3:
            time.sleep(self.extra_s)
            self.slept += self.extra_s

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The loop ended."""
        self.ended = time.perf_counter()


def rows(count: int) -> Dataset:
    """Rows of one document of up to 128 tokens, of which half are trained."""
    draw = random.Random(2)
    made = []
    for _ in range(count):
        ids = [draw.randrange(4, VOCABULARY) for _ in range(draw.randint(LENGTH // 2, LENGTH))]
        labels = [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]
        made.append({"input_ids": ids, "labels": labels, "seq_lengths": [len(ids)]})
    return Dataset.from_list(made)


def measured(schedule: str, seconds: int, folder: Path) -> dict[str, Any]:
    """One training under the budget."""
    torch.manual_seed(1)
    model: Any = get_peft_model(
        LlamaForCausalLM(CONFIG), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    words = {f"t{number}": number for number in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)), pad_token="t0", eos_token="t1")
    chat: Any = SimpleNamespace(tokenizer=tokenizer, align=lambda model: None)
    probe = torch.arange(4, 4 + LENGTH)[None].repeat(16, 1)
    settings = {"schedule": schedule, "learning_rate": PEAK, "batch_size": 8, "micro_batch_size": 8, "save_every": 100}
    train = Train.model_validate({"budget": f"{seconds}s"} | settings)
    evaluation = Evaluation(every=50, measure=lambda model: {"loss": float(model(probe, labels=probe).loss)})
    trainer = build(model, rows(400), train=train, evaluation=evaluation, seed=3, folder=folder, chat=chat)
    slow = Slow(seconds, extra_s=0.1)
    trainer.for_run(RunFacts(report=print)).add_callback(slow)
    trainer.train()
    if trainer.budget is None:
        raise SystemExit("the trainer has no budget")
    spent = trainer.budget.spent
    moves = [after - before for before, after in zip(spent.points[:-1], spent.points[1:], strict=True)]
    return {
        "seconds": round(slow.ended - slow.began, 3),
        "over_budget_percent": round(100 * ((slow.ended - slow.began) / seconds - 1), 2),
        "steps": trainer.state.global_step,
        "slept_s": round(slow.slept, 1),
        "rate_of_last_step": [row["learning_rate"] for row in trainer.state.log_history if "loss" in row][-1] / PEAK,
        "rate_at_end": trainer.lr_scheduler.get_last_lr()[0] / PEAK,
        "largest_move": round(max(moves) * len(moves), 2),
        "plans": [[plan.step, plan.steps, round(plan.step_s, 4)] for plan in spent.plans],
    }


def main() -> None:
    """Measure every schedule and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--json", type=result_file)
    given = parser.parse_args()
    torch.set_num_threads(1)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "peft")}
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, one thread"
    results: dict[str, Any] = {"machine": machine, "versions": versions, "budget_s": given.seconds, "schedules": {}}
    for schedule in SCHEDULES:
        with tempfile.TemporaryDirectory() as name:
            found = measured(schedule, given.seconds, Path(name))
        results["schedules"][schedule] = found
        print(
            f"{schedule:12} {found['seconds']:7.2f} s ({found['over_budget_percent']:+.2f} %)  {found['steps']} steps  "
            f"rate {found['rate_of_last_step']:.4f} in the last step, {found['rate_at_end']:.4f} after it  "
            f"largest move {found['largest_move']}"
        )
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

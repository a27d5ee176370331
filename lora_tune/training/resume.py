"""Saving and resuming a training: which files a checkpoint has, and how the trainer gets its state back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback

from lora_tune.disk import disk_text
from lora_tune.errors import Problem, UsageError
from lora_tune.model.divided import whole
from lora_tune.model.methods import adapter_state, load_adapter_state
from lora_tune.training import checkpoint, state
from lora_tune.training.evaluations import Evaluations, Standing
from lora_tune.training.guard import StepGuard, require_finite
from lora_tune.training.identity import check_identity
from lora_tune.training.progress import METRICS, TrainingDisplay
from lora_tune.training.schedule import Steps
from lora_tune.training.team import ALONE, Team

TRAINER_STATE = "trainer_state.json"  # the name that transformers reads
_BEST = "best.safetensors"


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a run knows besides how to train; all of it may be left out.

    `identity` is compared field by field at resume, and `allowed` names the fields that may have changed
    (`--allow-change`); `resolved` holds values fixed at the start of the run; it and the identity stand in every
    checkpoint. `groups` makes the optimizer's parameter groups (LoRA+). `sources` names the data sources by number for
    messages about rows; `report` gets lines worth reading, such as a checkpoint that was not written.
    `clock` gives the seconds that a time budget counts. `short` is told of memory that did not suffice: the GiB that
    were wanted at least, the micro-batch, and the tokens in its longest one.
    """

    identity: Mapping[str, Any] = field(default_factory=dict)
    resolved: Mapping[str, Any] = field(default_factory=dict)
    allowed: Collection[str] = ()
    groups: Callable[[], list[dict[str, Any]]] | None = None
    sources: Sequence[str] = ()
    display: TrainingDisplay | None = None
    trackers: Sequence[TrainerCallback] = ()
    report: Callable[[str], None] = print
    clock: Callable[[], float] = time.monotonic
    short: Callable[[float, int, int], None] | None = None


class ResumableTrainer(Trainer):
    """The part of a trainer that saves and restores checkpoints of our own instead of transformers' pickles.

    The overridden methods are those by which transformers 5 resumes; all of them get the folder of a checkpoint.
    """

    facts: RunFacts
    steps: Steps
    evaluations: Evaluations | None
    guard: StepGuard
    keep_checkpoints: int
    team: Team = ALONE
    saved_step: int | None = None
    rescheduled = False  # the run goes on with another number of steps

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        if self.saved_step == step:
            return
        require_finite(self.model, step=step)
        folder = Path(self.args.output_dir)
        files = self._files()
        if not self.team.first:  # which has given its parts
            return
        try:
            checkpoint.save(folder, step, files, keep=self.keep_checkpoints)
        except OSError as error:
            needed = state.training_bytes(self.model, self.optimizer)
            reason = disk_text(error, folder / checkpoint.FOLDER, needed=needed)
            kept = f"a resumed run would start at step {self.saved_step or 0}"
            self.facts.report(f"checkpoint of step {step} was not written, training goes on: {reason}; {kept}")
            return
        self.saved_step = step

    def _files(self) -> dict[str, checkpoint.Writer]:
        """What a checkpoint consists of, as functions that write it."""
        tensors = {name: whole(tensor) for name, tensor in adapter_state(self.model).items()}
        held = state.optimizer_state(self.optimizer)
        scaler = self.accelerator.scaler
        run = self.run_state()
        schedule = {"schedule": self.lr_scheduler.state_dict(), "scaler": scaler.state_dict() if scaler else None}
        best = self.evaluations.best_tensors if self.evaluations else {}

        def write_optimizer(path: Path) -> None:
            state.write_optimizer(held, tensors=path, text=path.with_suffix(".json"))

        def write_random(path: Path) -> None:
            state.write_random_state(state.random_state(), tensors=path, text=path.with_suffix(".json"))

        files: dict[str, checkpoint.Writer] = {
            "adapter.safetensors": partial(state.write_tensors, tensors),
            "optimizer.safetensors": write_optimizer,
            "random.safetensors": write_random,
            "schedule.json": lambda path: _write_json(path, schedule),
            checkpoint.RUN: lambda path: _write_json(path, run),
            TRAINER_STATE: lambda path: replace(self.state, log_history=[]).save_to_json(str(path)),
        }
        if self.facts.display is not None:
            lines = self.facts.display.text()
            files[METRICS] = lambda path: _write_text(path, lines)
        return files | ({_BEST: partial(state.write_tensors, best)} if best else {})

    def resolved(self) -> dict[str, Any]:
        """Every value that was decided at run time."""
        return dict(self.facts.resolved)

    def run_state(self) -> dict[str, Any]:
        """What the run knows besides tensors, for `run.json`; `go_on` gets it back."""
        return {
            "identity": dict(self.facts.identity),
            "resolved": self.resolved(),
            "steps": self.steps.as_json(),
            "evaluations": self.evaluations.as_json() if self.evaluations else None,
            "guard": self.guard.as_json(),
        }

    def go_on(self, run: Mapping[str, Any]) -> None:
        """Take up what the run to resume had come to."""
        self.guard.go_on(run["guard"])

    def checkpoint_to_resume(self, asked: str | bool | None) -> checkpoint.Checkpoint | None:
        if not asked:
            return None
        folder = Path(self.args.output_dir)
        found = checkpoint.newest(folder, report=self.facts.report) if asked is True else checkpoint.read(Path(asked))
        if found is None:
            self.facts.report("there is no checkpoint yet: training starts at step 0")
            return None
        check_identity(found.run["identity"], self.facts.identity, allowed=self.facts.allowed)
        self._check_steps(found)
        self.go_on(found.run)
        if self.evaluations:
            self.evaluations.standing = self.standing_in(found)
            self.evaluations.best_tensors = load_file(found.folder / _BEST) if _BEST in found.files else {}
        if self.facts.display is not None and METRICS in found.files:
            self.facts.display.take_up((found.folder / METRICS).read_text(encoding="utf-8"))
        return found

    def _check_steps(self, found: checkpoint.Checkpoint) -> None:
        """Refuse a resumed run of other steps, unless it was asked for. Raises: UsageError."""
        allowed, total = self.facts.allowed, self.steps.total_steps
        before, now = dict(found.run["steps"]), self.steps.as_json()
        if {"train.max_steps", "train.epochs"} & set(allowed):
            if total < found.step:
                reason = f"{total} steps are asked for, but the checkpoint has {found.step} behind it"
                raise UsageError(Problem(reason, "ask for more, or start a new run", key="train.max_steps"))
            for name in ("total_steps", "warmup_steps"):
                self.rescheduled |= before.pop(name) != now.pop(name)
        others = before.setdefault("processes", 1) != now["processes"]
        if "train.micro_batch_size" in allowed or others:
            for name in ("micro_batch_size", "accumulation", "processes"):
                del before[name], now[name]
        check_identity({"steps": before}, {"steps": now})

    def evaluations_stopped(self) -> bool:
        """Whether the evaluations so far have ended the training."""
        return self.evaluations is not None and self.evaluations.standing.stopped

    @staticmethod
    def standing_in(found: checkpoint.Checkpoint) -> Standing:
        return Standing(**(found.run["evaluations"] or {}))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter_state(self.model, load_file(Path(resume_from_checkpoint) / "adapter.safetensors"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            path = Path(checkpoint) / "optimizer.safetensors"
            state.read_optimizer(self.optimizer, tensors=path, text=path.with_suffix(".json"))
            self.lr_scheduler.load_state_dict(_read_json(Path(checkpoint) / "schedule.json")["schedule"])
            if self.rescheduled:  # the stored learning rate is that of the old number of steps
                schedule = self.lr_scheduler
                pairs = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
                schedule._last_lr = [base * factor(schedule.last_epoch) for base, factor in pairs]
                for group, rate in zip(self.optimizer.param_groups, schedule._last_lr, strict=True):
                    group["lr"] = rate

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(_read_json(Path(checkpoint) / "schedule.json")["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            path = Path(checkpoint) / "random.safetensors"
            state.set_random_state(state.read_random_state(tensors=path, text=path.with_suffix(".json")))


def _write_json(path: Path, value: Any) -> None:
    _write_text(path, json.dumps(value))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

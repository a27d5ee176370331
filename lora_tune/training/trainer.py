"""Training through TRL's SFTTrainer, which is called here and nowhere else.

`build` is the Python door: it returns an ordinary `SFTTrainer` over rows that are already tokens, labels and packed
documents. What is overridden, and why: the loss (exact and fast on a CPU), the order of rows (a function of seed and
epoch), the guard against numbers that are not finite, evaluations that leave no trace, and checkpoints of our own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # read by huggingface_hub when it is first imported
os.environ["DISABLE_TELEMETRY"] = "1"

import psutil
import torch
from torch import nn
from transformers import PrinterCallback, TrainerState, set_seed
from transformers.trainer_utils import TrainOutput
from trl import SFTConfig, SFTTrainer

from lora_tune.errors import DataError
from lora_tune.interrupts import Stop
from lora_tune.model.kernels.compiled import compile_layers
from lora_tune.model.kernels.fuse import fuse, left_divided
from lora_tune.model.kernels.loss_head import find_head
from lora_tune.model.methods import cast_inputs
from lora_tune.model.rate import learning_rate, rate_of
from lora_tune.recipe import Train
from lora_tune.training import state
from lora_tune.training.batches import IGNORED, EpochSampler, collator_for
from lora_tune.training.budget import plan_budget
from lora_tune.training.checkpoint import Checkpoint
from lora_tune.training.evaluations import Evaluation, Evaluations
from lora_tune.training.gradients import trained_parameters
from lora_tune.training.guard import StepGuard, StepNumbers, largest_weight, places
from lora_tune.training.loss import WithTargets, summed_loss
from lora_tune.training.moments import Moments
from lora_tune.training.resume import TRAINER_STATE, RunFacts
from lora_tune.training.schedule import SCHEDULES, Steps, mixed_precision, optimizer_name, plan_steps
from lora_tune.training.shared import SharedTrainer
from lora_tune.training.signals import SignalWatch
from lora_tune.training.team import here

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

    from lora_tune.data.chat_template import ChatTemplate

# transformers 5.23 renamed the argument; older releases (constraints/gpu.txt) have the first name only
_CHECKPOINTING_ARGUMENTS = {"gradient_checkpointing", "activation_checkpointing"} & {f.name for f in fields(SFTConfig)}


def build(
    model: PeftModel,
    rows: Dataset,
    *,
    train: Train,
    evaluation: Evaluation | None,
    seed: int,
    folder: Path,
    chat: ChatTemplate,
) -> RunTrainer:
    """The trainer of one run: an `SFTTrainer` whose `train(resume_from_checkpoint=True)` goes on where it stopped.

    `model` has its adapter attached and its dtypes and checkpointed layers set. `rows` has the columns `input_ids`,
    `labels` (-100 is not trained), `seq_lengths` (tokens of each document in the row) and, for messages, `rows`
    (`[[source, line], ...]`). `train.micro_batch_size` is a number. Checkpoints go to `folder/checkpoints`.

    Raises:
        DataError: there are no rows.
        RecipeError: the optimizer does not run on this machine.
    """
    if len(rows) == 0:
        raise DataError("there are no rows to train on", "look at the ledger: lora-tune preview")
    steps = plan_steps(len(rows), train, processes=here().world)
    rate = learning_rate(train, model.config.get_text_config().to_dict())
    train = train.model_copy(update={"learning_rate": rate})
    args = _sft_config(model, train=train, steps=steps, seed=seed, folder=folder)
    trainer = RunTrainer(model, args, rows, chat=chat, train=train, steps=steps, evaluation=evaluation)
    if train.compile == "layers":  # refused where layers are divided
        compile_layers(trainer.model)
    elif train.kernels == "auto":  # a divided layer has its weights only while it computes
        trainer.left_unfused = left_divided(trainer.model) if trainer.team.divided else fuse(trainer.model).left
    return trainer


def _sft_config(model: PeftModel, *, train: Train, steps: Steps, seed: int, folder: Path) -> SFTConfig:
    """The one place where SFTConfig is filled in."""
    precision = mixed_precision(model)
    return SFTConfig(
        output_dir=str(folder),
        seed=seed,
        # our rows are tokens, labels and packed documents already: TRL neither tokenises, truncates nor packs
        packing=False,
        padding_free=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        per_device_train_batch_size=steps.micro_batch_size,
        gradient_accumulation_steps=steps.accumulation,
        num_train_epochs=train.epochs,
        max_steps=steps.total_steps if train.budget else train.max_steps or -1,
        optim=optimizer_name(train),
        learning_rate=rate_of(train),
        lr_scheduler_type=SCHEDULES[train.schedule],
        warmup_steps=steps.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        neftune_noise_alpha=train.neftune_alpha,
        use_cpu=not torch.cuda.is_available(),
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        dataloader_pin_memory=torch.cuda.is_available(),
        # a mixture's balancing loss is a mean over each micro-batch: with it the loss would depend on its size
        router_aux_loss_coef=0.0,
        # layers are checkpointed by model/base.py, checkpoints and display are ours
        **dict.fromkeys(_CHECKPOINTING_ARGUMENTS, False),
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        push_to_hub=False,
    )


class RunTrainer(SharedTrainer, SFTTrainer):
    """The `SFTTrainer` that `build` returns; `for_run` tells it what else a run wants recorded."""

    model: Any
    train_dataset: Any
    data_collator: Any
    optimizer: Any
    loss_is_scaled_for_ga = True  # `compute_loss` divides by the trained tokens of the whole batch

    def __init__(
        self,
        model: PeftModel,
        args: SFTConfig,
        rows: Dataset,
        *,
        chat: ChatTemplate,
        train: Train,
        steps: Steps,
        evaluation: Evaluation | None,
    ) -> None:
        dtypes = {name: tensor.clone() for name, tensor in state.trainable_tensors(model).items()}
        self.team = here()
        super().__init__(model, args, train_dataset=rows, processing_class=chat.tokenizer)
        state.set_trainable_tensors(self.model, dtypes)  # TRL casts the adapter of a 4-bit base to bfloat16
        self.divide_model()
        self.remove_callback(PrinterCallback)
        self.add_callback(Moments(self))
        self.steps = steps
        self.left_unfused: Mapping[str, int] = {}
        self.facts = RunFacts()
        self.evaluations = Evaluations(evaluation) if evaluation else None
        self.keep_checkpoints = train.keep_checkpoints
        self.save_every = train.save_every
        self._sampler = EpochSampler(len(rows), seed=args.seed)
        self.row_tokens = [sum(lengths) for lengths in rows["seq_lengths"]]
        self._trained = trained_parameters(self.model)
        self._head = self.model.get_output_embeddings()
        self._loss_head = None if self.team.divided else find_head(self.model, kernels=train.kernels)
        self.signals = SignalWatch()
        self.guard = StepGuard(self.model, max_skipped=train.max_skipped_steps, report=self.facts.report)
        self._chat = chat
        self.replans = []
        self.budget = None
        if train.budget:
            every, keep = (evaluation.every, evaluation.keep) if evaluation else (0, "last")
            self.keep_to(plan_budget(train, steps_per_epoch=steps.steps_per_epoch, evaluate_every=every, keep=keep))
        self._step_began, self._step_tokens = 0.0, 0
        self._step_trained_tokens = torch.zeros(())
        self.data_collator = WithTargets(collator_for(self.model, self.data_collator, train))

    def for_run(self, facts: RunFacts) -> RunTrainer:
        """Tell the trainer what to record and compare; returns the trainer itself."""
        self.facts = facts
        self.guard.report = facts.report
        for reason, count in self.left_unfused.items():
            facts.report(f"train.kernels: {count} layers keep PEFT's path ({reason})")
        for callback in (*([facts.display] if facts.display else []), *facts.trackers):
            self.add_callback(callback)
        return self

    # -- the loop ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:  # type: ignore[override]
        """Train, or go on from a checkpoint: its folder, or True for the newest valid one of this run.

        Raises:
            CheckFailed: a loss or gradient is not finite, or no checkpoint is valid.
            UsageError: the run to resume was started with another recipe, data or base.
            Interrupted: a signal came; a checkpoint holds everything up to the step that was running.
            ResourceError: memory does not suffice for a micro-batch of 1, or outside of micro-batches.
        """
        start = self.checkpoint_to_resume(resume_from_checkpoint)
        set_seed(self.args.seed)
        self.model.train()  # a base comes loaded in evaluation mode, in which NEFTune adds no noise
        self.saved_step = start.step if start else None
        if start:
            self._catch_up(start)
        if start and (self.ended(start) or self.evaluations_stopped()):
            self._load_from_checkpoint(str(start.folder))
            self.state.global_step = start.step
            result = TrainOutput(start.step, 0.0, {})
        else:
            display = closing(self.facts.display) if self.facts.display else nullcontext()
            with (
                self.signals,
                display,
                self.peers_named(),
                self.team.in_step(),
                self.shortages_named(),
                self.casts("autocast"),
            ):
                result = super().train(resume_from_checkpoint=str(start.folder) if start else None)
        self.model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self._chat.align(self.model)  # transformers puts the tokenizer's special tokens in when it starts
        self.raise_signal()
        if self.evaluations and self.evaluations.best_tensors:
            state.set_trainable_tensors(self.model, self.evaluations.best_tensors)
        return result

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """The micro-batches of one step and the number of trained tokens in all of them."""
        self._step_began = time.perf_counter()
        batches = list(islice(epoch_iterator, num_batches))
        rows = self._rows_of_step()
        self.begin_step(self.own_rows(rows))
        self.draw_anew()
        self._step_tokens = sum(self.row_tokens[number] for number in rows)
        trained = torch.stack([(batch["labels"] != IGNORED).sum() for batch in batches]).sum()
        self._step_trained_tokens = torch.tensor(self.team.sum(int(trained))) if self.team.several else trained
        return batches, self._step_trained_tokens.to(device)

    def micro_step(self, model: nn.Module, inputs: dict[str, Any], divisor: torch.Tensor | None) -> torch.Tensor:
        """One micro-batch forward and backward; returns its share of the step's loss.

        The parent walks all modules for `model.train()` at every micro-batch; here once after an evaluation.
        """
        if not model.training:
            model.train()
        inputs = self._prepare_inputs(inputs)
        self.begin_micro_batch()
        loss = self.compute_loss(model, inputs, num_items_in_batch=divisor)
        self.backward(loss)
        self._micro_losses.append(loss.detach())
        return loss.detach()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy summed over the trained tokens of the micro-batch, divided by those of the whole step.

        TRL's entropy and accuracy, three host syncs in every micro-batch, are left out.
        """
        divisor = (inputs["labels"] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        total, outputs = summed_loss(model, inputs, layer=self._head, head=self._loss_head)
        loss = total / torch.as_tensor(divisor).clamp(min=1)
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        self.add_up()
        return self.clipped_norm()

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> float:
        """The norm as a number, after the check that this step may be taken: the one host sync of a step."""
        measured = self._clip_grad_norm(model) if grad_norm is None else grad_norm
        numbers = torch.stack([self._tr_loss.float(), measured.float(), largest_weight(self._trained).float()])
        loss, norm, weight = numbers.tolist()
        scaler = self.accelerator.scaler
        scaled = scaler is not None and scaler.get_scale() >= 1
        step = StepNumbers(self.state.global_step + 1, loss, norm, weight, scaled)
        if not self.guard.admits(step, rows=self._rows_to_blame):
            self._tr_loss.zero_()
            self.leave_out_step()
        return norm

    def _rows_to_blame(self) -> str:
        """Where the rows of the micro-batches stand whose loss is not finite, or all rows of the step."""
        rows, size = self.own_rows(self._rows_of_step()), self.micro_batch_size
        micro_batches = range(len(self._micro_losses))
        bad = [index for index in micro_batches if not bool(torch.isfinite(self._micro_losses[index]))]
        own = [number for index in bad for number in rows[index * size : (index + 1) * size]]
        numbers = [number for found in self.team.gather(own) for number in found] or self._rows_of_step()
        return places(self.train_dataset, numbers, self.facts.sources)

    def _rows_of_step(self) -> list[int]:
        """The numbers of the rows of the step that is running."""
        epoch, position = divmod(self.state.global_step, self.steps.steps_per_epoch)
        size = self.steps.micro_batch_size * self.steps.accumulation * self.steps.processes
        return self._sampler.order(epoch)[position * size : (position + 1) * size]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing: the parent walks all parameters for a number that is shown nowhere."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens, seconds and GiB to the numbers of a step, then hand them to the display and the trackers."""
        if "loss" in logs:
            logs["tokens"] = self._step_tokens
            logs["trained_tokens"] = int(self._step_trained_tokens)
            logs["step_s"] = time.perf_counter() - self._step_began
            logs["gib"] = memory_gib()
            logs["micro_batch_size"] = self.micro_batch_size
            if self.budget is not None:
                logs["progress"] = self.budget.spent.points[-1]
            if self.guard.skipping:
                logs["skipped"] = 1.0
                del logs["loss"], logs["grad_norm"]
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The numbers of the run's own evaluation; with a data set, what `SFTTrainer.evaluate` gives."""
        if eval_dataset is not None or self.evaluations is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        try:
            with self.casts("adapter dtype"), self.evaluations.whole_or_pending(), self.cut_short():
                scores, answers = self.evaluations.run(self.model, step=self.state.global_step)
        except Stop:  # the evaluation is repeated by the resumed run
            self.control.should_evaluate = False
            self.control.should_save = self.control.should_training_stop = True
            return {}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(dict(metrics))
        self.control.should_training_stop |= self.evaluations.standing.stopped
        if self.team.several and self.agree() is not None:
            self.control.should_save = self.control.should_training_stop = True
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.facts.display is not None:
            self.facts.display.on_answers(self.state.global_step, answers)
        return metrics

    def _catch_up(self, start: Checkpoint) -> None:
        """The evaluation that a signal cut short at the step to resume, from the same weights."""
        if self.evaluations is None or not self.evaluations.standing.pending:
            return
        self._load_from_checkpoint(str(start.folder))
        self.state = TrainerState.load_from_json(str(start.folder / TRAINER_STATE))
        display = closing(self.facts.display) if self.facts.display else nullcontext()
        with self.signals, display as shown, self.casts("autocast"):
            if shown is not None:
                shown.on_train_begin(self.args, self.state, self.control)
            self.evaluate()
        self.raise_signal()

    @contextmanager
    def casts(self, to: Literal["adapter dtype", "autocast"]) -> Iterator[None]:
        """Under autocast, inside: who casts the input of an adapter. An evaluation runs the model without autocast."""
        if not (self.args.bf16 or self.args.fp16):
            yield
            return
        cast_inputs(self.model, to=to)
        try:
            yield
        finally:
            cast_inputs(self.model, to="autocast" if to == "adapter dtype" else "adapter dtype")

    # -- order of rows, optimizer -----------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self._sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer over the run's own parameter groups where `for_run` gave some."""
        if self.optimizer is None and self.facts.groups is not None:
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(self.facts.groups(), **arguments)
            return self.optimizer
        return super().create_optimizer(model)

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine."""


def memory_gib() -> float:
    """The most GPU memory that was allocated, or the resident memory of this process on a CPU, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30

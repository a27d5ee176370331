"""Out of memory in mid-training: the part is named, and the same step is repeated in smaller micro-batches.

The data loader goes on giving micro-batches of the size that the run started with; after a re-plan each of them goes
through the model in pieces. Order of the rows, steps of an epoch and the numbers in a checkpoint stay what they were.
The loss is summed over tokens and divided by the tokens of the whole step, so it is the same to rounding. Dropout and
NEFTune draw numbers in the shape of a micro-batch: a repeated step starts from the random state that it had and draws
other numbers of the same distribution.
"""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_tune.errors import Problem, ResourceError
from lora_tune.model.kernels.choice import free_buffers
from lora_tune.training import state
from lora_tune.training.resume import ResumableTrainer

Part = Literal["activations", "loss_head", "buffers", "gradients", "optimizer", "evaluation"]  # as in a memory plan
WORDS: dict[Part, str] = {
    "activations": "activations of the layers",
    "loss_head": "logits of the loss head",
    "buffers": "dequantized weights",
    "gradients": "gradients",
    "optimizer": "states of the optimizer",
    "evaluation": "evaluation",
}
FIXES: dict[Part, str] = {
    "activations": "set train.gradient_checkpointing: all, or lower train.max_length",
    "loss_head": "lower train.max_length",
    "buffers": "lower train.max_length, or take a smaller base",
    "gradients": "lower lora.rank",
    "optimizer": "set train.optimizer: adamw_8bit, or lower lora.rank",
    "evaluation": "leave eval.every out, or lower eval.max_rows",
}
# What torch, cuBLAS and the CPU's allocator say where they raise a plain RuntimeError.
_SAID = re.compile(r"out of memory|not enough memory|can't allocate memory|_ALLOC_FAILED", re.IGNORECASE)
_ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)", re.IGNORECASE)
_UNITS_GIB = {"bytes": 2**-30, "kib": 2**-20, "mib": 2**-10, "gib": 1.0}


@dataclass(frozen=True, slots=True)
class Shortage:
    """Memory that was not there: for which part, and how much was asked for (0 where the message does not say)."""

    part: Part
    asked_gib: float = 0.0

    def __str__(self) -> str:
        if not self.asked_gib:
            return WORDS[self.part]
        mib = 1024 * self.asked_gib
        return f"{WORDS[self.part]}, {f'{self.asked_gib:.2f} GiB' if mib >= 1024 else f'{mib:.3g} MiB'} more"


@dataclass(frozen=True, slots=True)
class Replan:
    """A smaller micro-batch from `step` on (counted from 1; 0: before the first), and why."""

    step: int
    micro_batch_size: int
    accumulation: int
    reason: str


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on a GPU or on a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None


def shortage_of(error: BaseException, *, head: nn.Module) -> Shortage:
    """Which part asked for too much, read from where the error comes from, innermost call first."""
    asked = _ASKED.search(str(error))
    parts = (_part_of_frame(frame, head) for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))))
    part: Part = next((part for part in parts if part is not None), "activations")
    return Shortage(part, float(asked[1]) * _UNITS_GIB[asked[2].lower()] if asked else 0.0)


def _part_of_frame(frame: Any, head: nn.Module) -> Part | None:
    name, file, owner = frame.f_code.co_name, frame.f_code.co_filename.replace("\\", "/"), frame.f_locals.get("self")
    if owner is head or name in ("cross_entropy", "summed_loss") or file.endswith(("loss_head.py", "loss_tile.py")):
        return "loss_head"
    if "dequantize" in name:
        return "buffers"
    if "/optim/" in file:
        return "optimizer"
    if "clip_grad" in name or file.endswith("clip_grad.py"):
        return "gradients"
    if name == "_evaluate":
        return "evaluation"
    return "activations" if isinstance(owner, nn.Module) or name == "_engine_run_backward" else None


def next_smaller(micro_batch_size: int) -> int:
    """The largest proper divisor: half of an even micro-batch, so that it divides whatever the larger one divided."""
    return max(size for size in range(1, micro_batch_size // 2 + 1) if micro_batch_size % size == 0)


class ReplanningTrainer(ResumableTrainer):
    """The part of a trainer that runs the micro-batches of a step, and repeats the step where memory falls short.

    A subclass calls `begin_step` with the numbers of the step's rows before its first micro-batch, and has
    `micro_step`, one micro-batch forward and backward.
    """

    model: Any
    train_dataset: Any
    data_collator: Any
    replans: list[Replan]
    row_tokens: list[int]
    _micro_losses: list[Tensor]
    _loaded: Any = None  # the training rows, with the columns that the loader reads
    _step_rows: Sequence[int] = ()
    _done = 0  # micro-batches of the loader that this step has behind it
    _step_random: state.RandomState

    @property
    def micro_batch_size(self) -> int:
        """Sequences that go through the model at once: as planned, or less after a re-plan."""
        return self.replans[-1].micro_batch_size if self.replans else self.steps.micro_batch_size

    def micro_step(self, model: nn.Module, inputs: dict[str, Any], divisor: Tensor | None) -> Tensor:
        """One micro-batch forward and backward; returns its share of the step's loss."""
        raise NotImplementedError

    def begin_step(self, rows: Sequence[int]) -> None:
        """A step over these rows begins."""
        self._step_rows = rows
        self._done = 0
        self._micro_losses = []

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """One micro-batch of the loader forward and backward, in pieces after a re-plan.

        Raises:
            ResourceError: memory does not suffice for a micro-batch of 1; the state before this step is saved.
        """
        if self._done == 0:
            self._step_random = state.random_state()
        first = self._done
        while True:
            try:
                loss = self._run(model, self._micro_batches(inputs, first=first), num_items_in_batch)
                self._done += 1
                return loss
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                shortage = shortage_of(error, head=self.model.get_output_embeddings())
                traceback.clear_frames(error.__traceback__)
            self._undo_step()  # behind the handler, which holds the tensors of the failed attempt
            self.shrink(shortage, step=self.state.global_step + 1)
            first = 0

    def _run(self, model: nn.Module, batches: Iterator[dict[str, Any]], divisor: Tensor | None) -> Tensor:
        """These micro-batches; the last one's loss is returned, as the caller adds it to those of the step."""
        loss = self.micro_step(model, next(batches), divisor)
        for batch in batches:
            self._tr_loss += loss
            loss = self.micro_step(model, batch, divisor)
        return loss

    def _micro_batches(self, inputs: dict[str, Any], *, first: int) -> Iterator[dict[str, Any]]:
        """The loader's micro-batches from number `first` of this step to the present one, as large as they may be."""
        loaded, size = self.steps.micro_batch_size, self.micro_batch_size
        if size == loaded:
            yield inputs
            return
        numbers = self._step_rows[first * loaded : (self._done + 1) * loaded]
        if not numbers:  # of several processes one that has nothing left to do in this step
            yield inputs
        for start in range(0, len(numbers), size):
            yield self.collated(numbers[start : start + size])

    def collated(self, numbers: Sequence[int]) -> dict[str, Any]:
        """These training rows as the loader would give them in one micro-batch."""
        if self._loaded is None:
            self._loaded = self._remove_unused_columns(self.train_dataset, description="Training")
        batch: dict[str, Any] = self.data_collator([self._loaded[number] for number in numbers])
        return batch

    def _undo_step(self) -> None:
        """Gradients, losses and random numbers are as they were before the step, and its memory is free."""
        self._tr_loss.zero_()
        self._micro_losses = []
        self.forget_gradients()
        state.set_random_state(self._step_random)

    def forget_gradients(self) -> None:
        """No parameter has a gradient, and what the allocator and the kernels keep in hand is given back."""
        self.model.zero_grad(set_to_none=True)
        free_buffers()
        gc.collect()
        torch.cuda.empty_cache()

    def shrink(self, shortage: Shortage, *, step: int) -> None:
        """Go on with half the micro-batch and twice the accumulation; from `step` on, which is repeated.

        Raises:
            ResourceError: the micro-batch is 1, or it was the optimizer; the state before the step is saved.
        """
        before = self.micro_batch_size
        if before == 1 or shortage.part == "optimizer":
            raise ResourceError(self._short(shortage, step=step))
        size = next_smaller(before)
        accumulation = self.steps.micro_batch_size * self.steps.accumulation // size
        self.replans.append(Replan(step, size, accumulation, f"out of memory at micro-batch {before}: {shortage}"))
        where = f"step {step} is repeated" if step else "the training starts"
        self.facts.report(
            f"out of memory at micro-batch {before} ({shortage}): {where} with micro-batch {size} and accumulation \
{accumulation}, the same batch"
        )
        if self.facts.display is not None:
            self.facts.display.on_replan(asdict(self.replans[-1]))
        if self.facts.short is not None:
            tokens = sum(sorted(self.row_tokens)[-before:])
            allocated = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
            self.facts.short(allocated + shortage.asked_gib, before, tokens)

    def _short(self, shortage: Shortage, *, step: int) -> Problem:
        """What to say where nothing smaller is left, with what of the run is saved."""
        size = f" at micro-batch {self.micro_batch_size}" if shortage.part != "evaluation" else ""
        reason = f"{f'step {step}: ' if step else ''}out of memory{size} ({shortage})"
        if (
            self.state.global_step and shortage.part != "optimizer" and not self.team.several
        ):  # which may have changed some of the weights
            self._save_checkpoint(self.model, None)
        kept = f"; the checkpoint of step {self.saved_step} stays" if self.saved_step else ""
        return Problem(reason, FIXES[shortage.part] + kept)

    @contextmanager
    def shortages_named(self) -> Iterator[None]:
        """Inside, memory that falls short outside of a micro-batch (optimizer, evaluation) is a ResourceError."""
        try:
            yield
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            shortage = shortage_of(error, head=self.model.get_output_embeddings())
            traceback.clear_frames(error.__traceback__)
        if shortage.part == "gradients":  # clipping: the step is not taken yet
            self._undo_step()
        raise ResourceError(self._short(shortage, step=self.state.global_step + (shortage.part != "evaluation")))

    # -- what of it a checkpoint holds --------------------------------------------------------------------------------

    def resolved(self) -> dict[str, Any]:
        """Every value that was decided at run time, re-plans included; `micro_batch_size` is that of the start."""
        started = {"micro_batch_size": self.steps.micro_batch_size, "accumulation": self.steps.accumulation}
        started["steps"] = self.steps.total_steps
        return started | super().resolved() | {"replans": [asdict(replan) for replan in self.replans]}

    def go_on(self, run: Mapping[str, Any]) -> None:
        """Take the micro-batch that the run to resume had come to, unless another one was asked for and allowed."""
        super().go_on(run)
        if run["steps"]["micro_batch_size"] == self.steps.micro_batch_size:
            self.replans = [Replan(**replan) for replan in run["resolved"]["replans"]]

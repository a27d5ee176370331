"""Steps that several processes share: each has its micro-batches of the global batch, gradients are added up once.

Rows, their order, the tokens by which the loss is divided and the learning rate are those of one process, so that the
losses are as well, to rounding. Under ddp a process adds its gradients up over its own micro-batches first: they are
sent once a step, and memory that falls short in one process is its own affair (`replan.py`). Random numbers (dropout,
NEFTune) come from seed, step and rank, not from a generator that goes on: a checkpoint is the same for any number of
processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import other
from torch import nn
from torch.utils.data import DataLoader

from lora_tune.errors import CheckFailed, Interrupted, Problem, ResourceError
from lora_tune.interrupts import signal_name
from lora_tune.model import zero3
from lora_tune.model.divided import divide, move_buffers, whole
from lora_tune.terminal import messages
from lora_tune.training.batches import EpochSampler, ShareSampler, empty_batch, share_of_step
from lora_tune.training.budget import Budget, BudgetedTrainer
from lora_tune.training.guard import require_finite
from lora_tune.training.replan import Shortage
from lora_tune.training.signals import SignalWatch
from lora_tune.training.team import here

other.is_deepspeed_available = lambda: False  # else accelerate imports all of it, a second, in runs without it too


class SharedTrainer(BudgetedTrainer):
    """The part of a trainer that shares its steps with the other processes of its team, where it has some."""

    signals: SignalWatch
    lr_scheduler: Any
    _sampler: EpochSampler
    _trained: list[nn.Parameter]
    _tr_loss: torch.Tensor
    _agreed: int | None = None
    parts: zero3.PartsOptimizer | None = None  # under zero3

    # -- rows ---------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """The micro-batches of this process."""
        if not self.team.several:
            return super().get_train_dataloader()
        rows = self._remove_unused_columns(self.train_dataset, description="Training")

        def collate(batch: list[dict[str, Any]]) -> Any:
            return self.data_collator(batch or [empty_batch(rows[0])])

        pinned = self.args.dataloader_pin_memory
        loader: DataLoader = DataLoader(rows, batch_sampler=self._shares(), collate_fn=collate, pin_memory=pinned)
        prepared: DataLoader = self.accelerator.prepare(loader)
        return prepared

    def _shares(self) -> ShareSampler:
        return ShareSampler(
            self._sampler,
            micro=self.steps.micro_batch_size,
            accumulation=self.steps.accumulation,
            rank=self.team.rank,
            world=self.team.world,
        )

    def own_rows(self, rows: Sequence[int]) -> list[int]:
        """Of the rows of a step those that this process trains on, in its order."""
        micro, team = self.steps.micro_batch_size, self.team
        parts = share_of_step(rows, micro=micro, rank=team.rank, world=team.world)
        return [number for part in parts for number in part]

    def rows_of_processes(self) -> tuple[int, ...]:
        """How many rows of an epoch each process trains on, as its own loader gives them.

        Raises:
            CheckFailed: a row would be left out or trained twice.
        """
        own = [row for part in self._shares() for row in part]
        shares = self.team.gather(own)
        if sorted(row for share in shares for row in share) != list(range(self._sampler.rows)):
            counted = f"{sum(map(len, shares))} of {self._sampler.rows}"
            raise CheckFailed(f"rows are lost or repeated between the processes: {counted}", "please report it")
        return tuple(map(len, shares))

    def draw_anew(self) -> None:
        """Random numbers of this step and process alone."""
        if self.team.several:
            step = self.state.global_step
            torch.manual_seed((self.args.seed << 24) + step * self.team.world + self.team.rank)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if not self.team.several:
            super()._load_rng_state(checkpoint)

    def divide_model(self) -> None:
        """Each process holds its part of the model, where the strategy divides it."""
        if not self.team.divided:
            return
        if self.team.strategy == "zero3":
            if self.args.fp16:  # what compute_dtype: auto is on a card without bfloat16
                raise ResourceError("the loss scaling of float16 does not work under zero3", "take fsdp2, or ddp")
            plain = super().create_optimizer()
            move_buffers(self.model, self.args.device)
            self.parts = zero3.divide(self.model, plain, max_grad_norm=self.args.max_grad_norm)
            count = sum(1 for _ in self.model.parameters())
        else:
            count = divide(self.model, device=self.args.device)
        self.model.hf_device_map = {"": self.args.device}
        self.report_first(f"{self.team.strategy}: all {count} weights are divided over {self.team.world} processes")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the divided adapter, which was made with its parts; else transformers' own."""
        if self.parts is None:
            return super().create_optimizer(model)
        self.optimizer = self.parts
        return self.parts

    def report_first(self, line: str) -> None:
        """A line from the first process."""
        if self.team.first:
            messages().print(line)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not here().divided:
            super()._move_model_to_device(model, device)

    # -- one step -----------------------------------------------------------------------------------------------------

    def begin_micro_batch(self) -> None:
        """To be called before every forward pass of the training."""
        self.team.reached("a micro-batch")
        if self.parts is not None:
            self.parts.begin_micro_batch()

    def backward(self, loss: torch.Tensor) -> None:
        """The backward pass of a micro-batch; engines that divide take the mean over the processes, not the sum."""
        if self.parts is not None:
            self.parts.backward(loss * self.team.world)
        else:
            self.accelerator.backward(loss * self.team.world if self.team.divided else loss)

    def clipped_norm(self) -> torch.Tensor:
        """The norm of the step's gradient, which is clipped then; zero3 clips it within the optimizer's step."""
        if self.parts is not None:
            return self.parts.gradient_norm()
        return whole(self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm))

    def leave_out_step(self) -> None:
        """The optimizer will step over this step."""
        for parameter in self._trained:
            parameter.grad = None
        if self.parts is not None:
            self.parts.leaves_out = True

    def forget_gradients(self) -> None:
        """No parameter has a gradient, nor has any part of one."""
        if self.parts is not None:
            self.parts.zero_grad()
        super().forget_gradients()

    def add_up(self) -> None:
        """The gradients and the loss of the step are those of all processes; what each has heard is agreed on."""
        if not self.team.several:
            return
        self.agree()
        if self.team.divided:  # the engine has added the gradients up itself
            self.team.add([self._tr_loss])
            return
        absent = [number for number, parameter in enumerate(self._trained) if parameter.grad is None]
        present = torch.ones(len(self._trained), device=self._tr_loss.device)
        for number in absent:  # experts that no token of this process went to
            self._trained[number].grad = torch.zeros_like(self._trained[number])
            present[number] = 0
        self.team.add([*(parameter.grad for parameter in self._trained), self._tr_loss, present])  # type: ignore[list-item]
        for number in absent:
            if not bool(present[number]):
                self._trained[number].grad = None

    def agree(self) -> int | None:
        """The signal that came to any of the processes, which all ask for at the same moment."""
        if self.team.several:
            self._agreed = self.team.most(self.signals.caught or 0) or None
        return self.stop_signal

    @property
    def stop_signal(self) -> int | None:
        """The signal by which the training stops; of several processes the one that all know of."""
        return self._agreed if self.team.several else self.signals.caught

    def raise_signal(self) -> None:
        """Leave where a signal came to any of the processes. Raises: Interrupted."""
        number = self.agree()
        if number is not None:
            raise Interrupted(number, self._stopped_by(number))

    def _stopped_by(self, number: int) -> str:
        """What to say after a signal: up to which step the work is saved."""
        step, saved = self.state.global_step, self.saved_step
        name = signal_name(number)
        if saved == step:
            return f"stopped by {name} after step {step}; the same command with --resume goes on from there"
        return f"stopped by {name} after step {step}, but its checkpoint could not be written; --resume goes on from \
step {saved or 0}"

    def cut_short(self) -> AbstractContextManager[None]:
        """What a signal may end at once: an evaluation, where no others are in the middle of it."""
        return nullcontext() if self.team.several else self.signals.cut_short()

    @contextmanager
    def peers_named(self) -> Iterator[None]:
        """Inside, what torch says of a process that is gone is a PeerLost that names it."""
        try:
            yield
        except RuntimeError as error:
            found = self.team.lost(error)
            if found is None:
                raise
            raise found from None

    def shrink(self, shortage: Shortage, *, step: int) -> None:
        """Go on with half the micro-batch. Raises: ResourceError; always where the base is divided, as the others wait
        for this process in every layer.
        """
        if self.team.divided:
            fix = "set train.micro_batch_size lower, or train.gradient_checkpointing: all"
            reason = f"process {self.team.rank}: out of memory at micro-batch {self.micro_batch_size} ({shortage})"
            raise ResourceError(Problem(reason, fix, key="train.micro_batch_size"))
        super().shrink(shortage, step=step)

    # -- what the first process decides -------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not self.team.several:
            super()._save_checkpoint(model, trial)
            return
        if self.saved_step == self.state.global_step:
            return
        if self.team.first or self.team.divided:
            super()._save_checkpoint(model, trial)
        else:
            require_finite(self.model, step=self.state.global_step)
        self.saved_step = self.team.share(self.saved_step)
        self.agree()

    def _rate_factor(self, budget: Budget, step: int) -> float:
        if not self.team.several or step == 0:
            return super()._rate_factor(budget, step)
        if self.team.first:
            factor = super()._rate_factor(budget, step)
            self.team.share((budget.spent.points[step], budget.spent.left))
            return factor
        position, left = self.team.share((0.0, 0))
        budget.replay = {**budget.replay, step: position}
        factor = budget.factor(step)
        budget.spent.left = left
        self.state.max_steps = self.state.global_step + 1 + left
        return factor

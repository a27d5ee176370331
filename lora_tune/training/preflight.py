"""Before the first step: the largest things that the run will do, done once, with their memory and time measured.

The longest micro-batch goes forward and backward, the optimizer makes its states and takes a step, a batch is
evaluated, a few tokens are generated, a checkpoint is written. Then all of it is taken back: weights, gradients, random
numbers and files are to the last bit what they were. Memory that does not suffice is found here, and the training
starts with half the micro-batch.
"""

from __future__ import annotations

import shutil
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch

from lora_tune.errors import Problem, ResourceError
from lora_tune.evaluation.losses import BATCH_TOKENS, row_losses
from lora_tune.model.device import this_machine
from lora_tune.model.divided import gathered, kept, put_back
from lora_tune.model.generation import generate
from lora_tune.training import checkpoint, state
from lora_tune.training.batches import IGNORED
from lora_tune.training.planned import Planned
from lora_tune.training.replan import Shortage, is_out_of_memory, shortage_of

if TYPE_CHECKING:
    from lora_tune.data.chat_template import ChatTemplate, TokenRow
    from lora_tune.training.trainer import RunTrainer

GIB = 2**30
_SCRATCH = ".writing-preflight"  # below checkpoints/, where the next save removes what a kill left of it
_SAMPLED_S = 0.005  # between two looks at the resident memory
_PROMPTS = {"cuda": 16, "cpu": 1}
_NEW_TOKENS = {"cuda": 16, "cpu": 4}
_EVALUATION_TOKENS = {"cuda": BATCH_TOKENS, "cpu": 1024}
How = Literal["GPU memory allocated", "resident memory, sampled"]


@dataclass(frozen=True, slots=True)
class Measured:
    """What the preflight found: peaks in GiB by what was done, seconds, and the bytes of a checkpoint.

    `weights_gib` is what lay on the device before (of a CPU: the resident process). `step_s`: seconds of one
    optimizer step, from the micro-batch that was timed last.
    """

    how: How
    micro_batch_size: int
    tokens: int
    peaks_gib: Mapping[str, float]
    weights_gib: float
    step_s: float
    checkpoint_bytes: int
    checkpoint_s: float
    seconds: float

    def lines(self, planned_gib: float | None) -> list[str]:
        """The measurements as text, the plan of the training's peak beside them. `planned_gib` leaves nothing out."""
        peak = self.peaks_gib["training"]
        beside = ""
        if planned_gib is not None:
            beside = f", planned {planned_gib:.2f} GiB (measured / planned {peak / max(planned_gib, 1e-9):.2f})"
        others = ", ".join(f"{name} {gib:.2f}" for name, gib in self.peaks_gib.items() if name != "training")
        mib = self.checkpoint_bytes / 2**20
        return [
            f"preflight, {self.seconds:.1f} s: peak {peak:.2f} GiB at micro-batch {self.micro_batch_size} \
({self.tokens:,} tokens){beside}; {self.how}",
            f"  {others} GiB; a step takes about {self.step_s:.2g} s, a checkpoint {mib:,.1f} MiB and \
{self.checkpoint_s:.2f} s",
        ]


@dataclass(slots=True)
class _Peak:
    """The most memory in use inside a `with` block, in GiB; on a CPU a thread looks at it meanwhile."""

    gib: float = 0.0
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> _Peak:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            self.gib = torch.cuda.max_memory_allocated() / GIB
            return
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.gib = max(self.gib, process.memory_info().rss / GIB)
            if self._over.wait(_SAMPLED_S):
                return


def try_out(trainer: RunTrainer, *, chat: ChatTemplate, held_out: Sequence[TokenRow]) -> Measured:
    """Do once what the run will do, measure it, and leave the trainer as it was but for a smaller micro-batch.

    Raises:
        ResourceError: memory does not suffice at micro-batch 1, for the optimizer or for an evaluation of one row, or
            the disk does not take a checkpoint.
    """
    began, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    resting = _in_use_gib()
    peaks: dict[str, float] = {}
    with _untouched(trainer), _scratch_optimizer(trainer):
        with _Peak() as peak:
            numbers, micro_s = _fitting_micro_batch(trainer)
        peaks["training"] = peak.gib
        size, written_s = _try_checkpoint(trainer)
        trainer.forget_gradients()
        with _named_evaluation(trainer), gathered(trainer.model):
            if held_out:
                with _Peak() as peak:
                    row_losses(trainer.model, _longest(held_out, _EVALUATION_TOKENS[device]), pad_id=chat.pad_id)
                peaks["evaluation"] = peak.gib
            with _Peak() as peak:
                prompts = _prompts(trainer, _PROMPTS[device])
                generate(trainer.model, chat, prompts, max_new_tokens=_NEW_TOKENS[device])
            peaks["generation"] = peak.gib
    return Measured(
        how="GPU memory allocated" if device == "cuda" else "resident memory, sampled",
        micro_batch_size=trainer.micro_batch_size,
        tokens=sum(trainer.row_tokens[number] for number in numbers),
        peaks_gib=peaks,
        weights_gib=resting,
        step_s=micro_s * trainer.steps.micro_batch_size * trainer.steps.accumulation / trainer.micro_batch_size,
        checkpoint_bytes=size,
        checkpoint_s=written_s,
        seconds=time.perf_counter() - began,
    )


def check_before_training(
    trainer: RunTrainer, planned: Planned, *, chat: ChatTemplate, held_out: Sequence[TokenRow]
) -> Measured:
    """Try the run out, report what was measured beside what was planned, and remember it. Raises: ResourceError."""
    found = try_out(trainer, chat=chat, held_out=held_out)
    machine = this_machine()
    plan = planned.at(found.micro_batch_size, tokens=found.tokens, machine=machine)
    runtime_gib = plan.parts_gib["runtime"] if machine.device == "cuda" else 0.0  # torch does not count it
    for line in found.lines(plan.peak_gib - runtime_gib):
        trainer.facts.report(line)
    planned.remember(
        found.peaks_gib["training"],  # an evaluation takes what is free, and is halved where that is less
        micro_batch_size=found.micro_batch_size,
        tokens=found.tokens,
        step_s=found.step_s,
        machine=machine,
    )
    return found


def _in_use_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / GIB
    return float(psutil.Process().memory_info().rss / GIB)


@contextmanager
def _untouched(trainer: RunTrainer) -> Iterator[None]:
    """Afterwards weights, gradients, buffers, modes and random numbers are as before, and the memory is free."""
    model = trainer.model
    before = state.random_state()
    weights = {name: kept(tensor) for name, tensor in state.trainable_tensors(model).items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.numel() < 2**20}
    cached = [
        (module, module.max_seq_len_cached) for module in model.modules() if hasattr(module, "max_seq_len_cached")
    ]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        trainer.forget_gradients()
        with torch.no_grad():
            for name, tensor in state.trainable_tensors(model).items():
                put_back(tensor, weights[name])
            for name, buffer in model.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])
        for module, length in cached:
            module.max_seq_len_cached = length
        for module, training in modes:
            module.training = training
        state.set_random_state(before)


@contextmanager
def _scratch_optimizer(trainer: RunTrainer) -> Iterator[None]:
    """Inside, the trainer has an optimizer and a schedule; the run's own are made when it starts."""
    trainer.create_optimizer()
    trainer.create_scheduler(num_training_steps=2)
    try:
        yield
    finally:
        trainer.optimizer.state.clear()
        trainer.optimizer = trainer.lr_scheduler = None
        trainer._created_lr_scheduler = False


def _fitting_micro_batch(trainer: RunTrainer) -> tuple[list[int], float]:
    """Train on the longest micro-batch, at half its size until it fits; its row numbers, and seconds at the last."""
    rows = sorted(range(len(trainer.row_tokens)), key=lambda row: (-trainer.row_tokens[row], row))
    while True:
        numbers = rows[: trainer.micro_batch_size]
        try:
            return numbers, _train(trainer, numbers)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            shortage = shortage_of(error, head=trainer.model.get_output_embeddings())
            traceback.clear_frames(error.__traceback__)
        trainer.forget_gradients()
        trainer.optimizer.state.clear()
        trainer.shrink(shortage, step=0)


def _train(trainer: RunTrainer, numbers: Sequence[int]) -> float:
    """Forward, backward and the optimizer's step; on a GPU once more, with the optimizer's states in place."""
    seconds = _forward_backward(trainer, numbers)
    if "paged" not in str(trainer.args.optim):  # bitsandbytes never forgets a paged state
        trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    return _forward_backward(trainer, numbers) if torch.cuda.is_available() else seconds


def _forward_backward(trainer: RunTrainer, numbers: Sequence[int]) -> float:
    began = time.perf_counter()
    batch = trainer.collated(numbers)
    trainer.begin_step(numbers)
    with trainer.casts("autocast"), trainer.accelerator.autocast():
        trainer.micro_step(trainer.model, batch, (batch["labels"] != IGNORED).sum().to(trainer.args.device))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _try_checkpoint(trainer: RunTrainer) -> tuple[int, float]:
    """Write a checkpoint beside those of the run and remove it; its bytes, and the seconds that it took."""
    checkpoints = Path(trainer.args.output_dir) / checkpoint.FOLDER
    files = trainer._files()
    if not trainer.team.first:
        return 0, 0.0
    scratch, began, before = checkpoints / _SCRATCH, time.perf_counter(), checkpoints.is_dir()
    try:
        folder = checkpoint.save(scratch, 0, files, keep=1)
        return sum(path.stat().st_size for path in folder.iterdir()), time.perf_counter() - began
    except OSError as error:
        free = shutil.disk_usage(_existing(checkpoints)).free / 2**20
        raise ResourceError(
            Problem(
                f"a checkpoint cannot be written: {error.strerror or error} ({free:,.0f} MiB free)",
                "free some disk, or choose another output",
                str(checkpoints),
                key="output",
            )
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if not before and checkpoints.is_dir() and not any(checkpoints.iterdir()):
            checkpoints.rmdir()


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


@contextmanager
def _named_evaluation(trainer: RunTrainer) -> Iterator[None]:
    """Inside, memory that does not suffice for a single row is a ResourceError."""
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        asked_gib = shortage_of(error, head=trainer.model.get_output_embeddings()).asked_gib
    reason = f"the longest row does not fit into memory ({Shortage('evaluation', asked_gib)})"
    raise ResourceError(Problem(reason, "lower train.max_length, or hold out shorter rows", key="eval.hold_out"))


def _longest(rows: Sequence[TokenRow], tokens: int) -> list[TokenRow]:
    """The longest rows, as many as one batch of so many tokens holds, at least one."""
    ordered = sorted(rows, key=lambda row: -len(row.input_ids))
    return ordered[: max(1, tokens // len(ordered[0].input_ids))]


def _prompts(trainer: RunTrainer, count: int) -> list[list[int]]:
    """What stands before the first trained token of the longest training rows, in their first documents."""
    rows = sorted(range(len(trainer.row_tokens)), key=lambda row: (-trainer.row_tokens[row], row))[:count]
    prompts = []
    for number in rows:
        row: Mapping[str, Any] = trainer.train_dataset[number]
        length = row["seq_lengths"][0]
        first = next((place for place, label in enumerate(row["labels"][:length]) if label != IGNORED), length)
        prompts.append(row["input_ids"][: max(1, first)])
    return prompts

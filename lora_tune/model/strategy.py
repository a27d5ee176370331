"""How several processes share a run: what each of them holds, what it sends, and what does not work together (cold).

| strategy | rows | base | gradients and optimizer of the adapter | through |
|---|---|---|---|---|
| single | one process has all | whole | whole | |
| ddp | divided | whole on every card | whole; gradients are summed once a step | torch.distributed |
| fsdp2 | divided | divided, one layer gathered at a time | divided | torch's `fully_shard` |
| zero3 | divided | divided, one layer gathered at a time | divided | DeepSpeed |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from lora_tune.errors import Problem, RecipeError
from lora_tune.recipe import Base, Hardware, Lora, Train
from lora_tune.recipe_values import seconds_of

Name = Literal["single", "ddp", "fsdp2", "zero3"]
# parts of a memory plan (footprint.py) of which each process holds its share only
_DIVIDED = ("weights", "adapters", "gradients", "optimizer")


@dataclass(frozen=True, slots=True)
class Strategy:
    """What a strategy means for one process. `divided`: parts of a memory plan that are divided by the processes.

    `gathers`: how often in a micro-batch the base is put together, layer by layer. `optimizers` and `quantize` are the
    values that it works with.
    """

    name: Name
    divided: tuple[str, ...]
    gathers: int
    optimizers: tuple[str, ...]
    quantize: tuple[str, ...]
    methods: tuple[str, ...]

    def bytes_per_step(self, *, weights: float, adapters: float, accumulation: int, world: int) -> float:
        """What each process sends in one step, in bytes: `weights` is the whole base as it is held, `adapters` the
        gradients of the adapter (float32), both of one copy. A ring sends (world - 1) / world of a gathered or divided
        tensor, and twice that of a sum that everybody gets.
        """
        if self.name == "single" or world == 1:
            return 0.0
        ring = (world - 1) / world
        if not self.divided:
            return 2 * ring * adapters
        gathered = self.gathers * accumulation * ring * (weights + adapters)
        return gathered + accumulation * ring * adapters


_ALL_OPTIMIZERS = ("auto", "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "lion_8bit", "sgd")
_ALL_METHODS = ("lora", "rslora", "dora", "pissa", "olora", "loftq", "eva")
_PLAIN_LORA = ("lora", "rslora", "loftq", "eva")
_ALL_WIDTHS = ("nf4", "fp4", "int8", "none")
STRATEGIES: dict[Name, Strategy] = {
    "single": Strategy("single", (), 0, _ALL_OPTIMIZERS, _ALL_WIDTHS, _ALL_METHODS),
    "ddp": Strategy("ddp", (), 0, _ALL_OPTIMIZERS, _ALL_WIDTHS, _ALL_METHODS),
    # torch's own optimizers know divided tensors; the int8 of bitsandbytes keeps its scales beside the weight
    "fsdp2": Strategy("fsdp2", _DIVIDED, 2, ("auto", "adamw", "sgd"), ("nf4", "fp4", "none"), _PLAIN_LORA),
    "zero3": Strategy("zero3", _DIVIDED, 2, ("auto", "adamw", "sgd"), ("nf4", "fp4", "none"), _PLAIN_LORA),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """How many processes, on how many machines, share the run in which way; `reason` says why."""

    strategy: Name = "single"
    processes: int = 1
    nodes: int = 1
    timeout_s: float = 600.0
    reason: str = ""

    @property
    def world(self) -> int:
        """All processes of the run."""
        return self.processes * self.nodes

    def share(self, train: Train) -> Train:
        """`train` as one process sees it: its share of `batch_size`. Raises RecipeError where it cannot be shared."""
        problem = uneven(train.batch_size, self.world)
        if problem:
            raise RecipeError(problem)
        return train.model_copy(update={"batch_size": train.batch_size // self.world})


def uneven(batch_size: int, world: int) -> Problem | None:
    """Why a global batch cannot be shared by so many processes, with the nearest batch sizes that can."""
    if batch_size % world == 0:
        return None
    below, above = batch_size // world * world, (batch_size // world + 1) * world
    near = f"{below} or {above}" if below else str(above)
    fewer = max(number for number in range(1, world) if batch_size % number == 0)
    reason = f"is the batch of all processes together, got {batch_size} for {world}"
    fix = f"write {near}, or hardware.processes for {fewer} in all"
    return Problem(reason, fix, key="train.batch_size")


def layout_of(
    hardware: Hardware, *, cards: int, batch_size: int, fits_one_card: Literal["yes", "no"], world: int | None = None
) -> Layout:
    """Decide what the recipe leaves at `auto`. `cards` are the visible GPUs of this machine, 0 for a CPU.

    `world` is given where another launcher has started the processes already. `auto` takes as many of the cards as
    divide `batch_size`, shares the rows where one card holds the base, and divides the base where it does not.

    Raises:
        RecipeError: one process is asked for by `single` and several by `processes`, or more than there are cards.
    """
    if world is not None:
        nodes = hardware.nodes if world % hardware.nodes == 0 else 1
        processes, said = world // nodes, f"{world} processes of the launcher"
    else:
        nodes = hardware.nodes
        processes, said = _processes(hardware, cards=cards, batch_size=batch_size), ""
    several = processes * nodes > 1
    if hardware.strategy == "single" and several:
        reason = f"means one process, got {processes * nodes}"
        raise RecipeError(Problem(reason, "write auto, or hardware.processes: 1", key="hardware.strategy"))
    strategy: Name = "single"
    if several and hardware.strategy in ("auto", "single"):
        strategy = "ddp" if fits_one_card == "yes" else "fsdp2"
        said = said or f"{processes * nodes} processes"
        why = "one card holds the base" if strategy == "ddp" else "one card does not hold the base"
        said = f"{said}, {strategy}: {why}"
    elif several:
        strategy = hardware.strategy  # type: ignore[assignment]
        said = f"{said or f'{processes * nodes} processes'}, {strategy}: as the recipe says"
    return Layout(strategy, processes, nodes, seconds_of(hardware.timeout), said)


def _processes(hardware: Hardware, *, cards: int, batch_size: int) -> int:
    if hardware.processes != "auto":
        if cards and hardware.processes > cards:
            reason = f"asks for {hardware.processes} cards, got {cards}"
            raise RecipeError(Problem(reason, f"write auto, or at most {cards}", key="hardware.processes"))
        return int(hardware.processes)
    if hardware.strategy == "single":
        return 1
    each = batch_size // hardware.nodes if batch_size % hardware.nodes == 0 else batch_size
    return max(number for number in range(1, max(cards, 1) + 1) if each % number == 0)


def conflicts(name: Name, *, base: Base, lora: Lora, train: Train) -> list[Problem]:
    """What does not work with this strategy, each with what does; to be asked before any weight is read."""
    return list(_conflicts(STRATEGIES[name], base, lora, train))


def _conflicts(strategy: Strategy, base: Base, lora: Lora, train: Train) -> Iterator[Problem]:
    name, other = strategy.name, "or hardware.strategy: ddp where one card holds the base"
    if base.quantize not in strategy.quantize:
        fix = f"write {' or '.join(strategy.quantize)}, {other}"
        yield Problem(f"{base.quantize} cannot be divided by {name}", fix, key="base.quantize")
    if train.optimizer not in strategy.optimizers:
        fix = f"write {' or '.join(strategy.optimizers)}, {other}"
        yield Problem(f"{train.optimizer} does not know the divided tensors of {name}", fix, key="train.optimizer")
    if lora.method not in strategy.methods:
        fix = f"write {' or '.join(strategy.methods[:2])}, {other}"
        yield Problem(f"{lora.method} reads whole weights, which {name} divides", fix, key="lora.method")
    if strategy.divided:
        for key, asked in {"modules_to_save": lora.modules_to_save, "new_tokens": lora.new_tokens}.items():
            if asked:
                yield Problem(f"cannot be trained under {name}", f"remove it, {other}", key=f"lora.{key}")
        if base.embeddings == "cpu":
            yield Problem(f"{name} divides the embedding already", f"set it to device, {other}", key="base.embeddings")
        if train.offload == "checkpoints":
            yield Problem(f"does not work under {name}", f"write none, {other}", key="train.offload")
        if train.compile == "layers":
            yield Problem(f"does not work under {name}", f"write off, {other}", key="train.compile")
        if lora.plus_ratio:
            yield Problem(f"cannot be used under {name}", f"remove it, {other}", key="lora.plus_ratio")
    if name == "zero3":
        if base.compute_dtype == "float16":
            fix = f"write bfloat16, {other}"
            yield Problem("the loss scaling of float16 does not work under zero3", fix, key="base.compute_dtype")
        if find_spec("deepspeed") is None:
            fix = "pip install 'lora_tune[zero3]', or write fsdp2, which divides the same through torch itself"
            yield Problem("zero3 needs DeepSpeed, which is not installed", fix, key="hardware.strategy")

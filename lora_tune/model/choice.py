"""The choice: the fastest micro-batch, checkpointed layers and optimizer that fit; else what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any, Literal

from lora_tune.model.cards import CARDS, Card, usable_gib
from lora_tune.model.footprint import Choice, Job, parts_gib, uncertainty_gib
from lora_tune.model.speed import flop_per_token, step_seconds
from lora_tune.model.strategy import STRATEGIES
from lora_tune.recipe import EMBEDDING_NAMES

MARGIN = 0.95  # share of the free memory that a plan may use, its uncertainty included
MOST_TOKENS = 8_192  # of a packed micro-batch chosen here: dequantizing is 2 % of a step then, and masks stay small
_SHORTEST = 64  # tokens of a sequence below which no change is offered
_LOWEST_RANK = 4


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the recipe that makes it fit: in words, GiB at the peak, and seconds per token over those before.

    `time_ratio` is None for a larger card than one whose speed is not known.
    """

    words: str
    peak_gib: float
    time_ratio: float | None
    alters: int

    def __str__(self) -> str:
        time = "" if self.time_ratio is None else f", {slower(self.time_ratio)}"
        return f"{self.words} ({self.peak_gib:.1f} GiB{time})"


def slower(time_ratio: float) -> str:
    """`+38 % time`, `as fast`, or `12 % faster`, each for one token."""
    per_cent = round(100 * (time_ratio - 1))
    return "as fast" if per_cent == 0 else f"+{per_cent} % time" if per_cent > 0 else f"{-per_cent} % faster"


def needed_gib(job: Job, choice: Choice) -> float:
    """Peak and its uncertainty together: what must fit into 95 % of the free memory."""
    parts = parts_gib(job, choice)
    return sum(parts.values()) + uncertainty_gib(job, parts)


def choose(job: Job, budget_gib: float, *, card: Card | None) -> Choice | None:
    """The fastest combination that fits; None where none does.

    Inputs of checkpointed layers leave the GPU (`offload: auto`) only where nothing fits with all of them there.

    `micro_batch_size: auto` tries the powers of two that divide `batch_size` (packed: up to 8,192 tokens),
    `gradient_checkpointing: auto` takes for each just as many layers as memory needs, and `optimizer: auto` an 8-bit
    AdamW only where nothing fits with AdamW (on a GPU). What the recipe fixes stays.
    """
    for offload, optimizer in product(offloads(job), optimizers(job)):
        fitting = []
        for micro in micro_batches(job):
            choice = _fewest_layers(job, Choice(micro, 0, optimizer, offload), budget_gib)
            if choice is not None:
                fitting.append((step_seconds(job, choice, card), -micro, choice))
        if fitting:
            return min(fitting, key=lambda option: option[:2])[2]
    return None


def offloads(job: Job) -> tuple[Literal["none", "checkpoints"], ...]:
    """Where the inputs of checkpointed layers may wait, in the order to try: on a CPU they are there already."""
    train = job.train
    if job.device == "cpu" or STRATEGIES[job.layout.strategy].divided or train.compile == "layers":
        return ("none",)
    if train.offload != "auto":
        return (train.offload,)
    return ("none",) if train.gradient_checkpointing == "none" else ("none", "checkpoints")


def optimizers(job: Job) -> tuple[str, ...]:
    """The optimizers to try, in this order."""
    if job.train.optimizer != "auto":
        return (job.train.optimizer,)
    if "adamw_8bit" not in STRATEGIES[job.layout.strategy].optimizers:
        return ("adamw",)
    return ("adamw", "adamw_8bit") if job.device == "cuda" else ("adamw",)


def micro_batches(job: Job) -> list[int]:
    """The micro-batches to try, largest first."""
    train = job.train
    if train.micro_batch_size != "auto":
        return [train.micro_batch_size]
    powers = [2**power for power in range(train.batch_size.bit_length()) if train.batch_size % 2**power == 0]
    few = [size for size in powers if not train.packing or size * train.max_length <= MOST_TOKENS]
    return sorted(few or [1], reverse=True)


def least(job: Job) -> Choice:
    """The combination that needs the least memory of those that the recipe allows."""
    _, most = _layers(job)
    return Choice(micro_batches(job)[-1], most, optimizers(job)[-1], offloads(job)[-1])


def _layers(job: Job) -> tuple[int, int]:
    """The fewest and the most layers that may be checkpointed."""
    asked, layers = job.train.gradient_checkpointing, job.shape.layers
    if asked == "auto":
        return 0, layers
    count = {"all": layers, "none": 0}[asked] if isinstance(asked, str) else min(asked, layers)
    return count, count


def _fewest_layers(job: Job, choice: Choice, budget_gib: float) -> Choice | None:
    """The choice with the fewest checkpointed layers that fit: by halving, since each one more saves memory."""
    low, high = _layers(job)
    if not fits(job, replace(choice, checkpointed=high), budget_gib):
        high -= 1  # with all of them, the last one's input stands beside what it is computed again into
        if high < low or not fits(job, replace(choice, checkpointed=high), budget_gib):
            return None
    while low < high:
        middle = (low + high) // 2
        if fits(job, replace(choice, checkpointed=middle), budget_gib):
            high = middle
        else:
            low = middle + 1
    return replace(choice, checkpointed=high)


def fits(job: Job, choice: Choice, budget_gib: float) -> bool:
    """Whether peak and uncertainty stay within 95 % of the free memory."""
    return needed_gib(job, choice) <= MARGIN * budget_gib


def cheapest_changes(job: Job, budget_gib: float, *, card: Card | None, most: int = 3) -> list[Change]:
    """Up to three changes after which the run fits: those that leave what is trained as it is first, then by time.

    A change is offered with as few others as it needs: nothing is named that is not necessary.
    """
    before = _seconds_per_token(job, _unlimited(job, card), card)
    found: list[tuple[frozenset[str], Change]] = []
    steps = list(_steps(job))
    for count in (1, 2, 3):
        for chosen in combinations(steps, count):
            names = frozenset(step.key for step in chosen)
            if len(names) < count or any(fewer <= names for fewer, _ in found):
                continue
            changed = job
            for step in chosen:
                changed = step.on(changed)
            choice = choose(changed, budget_gib, card=card)
            if choice is not None:
                words = " and ".join(step.words for step in chosen)
                peak = sum(parts_gib(changed, choice).values())
                ratio = _seconds_per_token(changed, choice, card) / before
                found.append((names, Change(f"set {words}", peak, ratio, sum(step.alters for step in chosen))))
        if len(found) >= most:
            break
    changes = sorted((change for _, change in found), key=lambda change: (change.alters, change.time_ratio or 0))[:most]
    return changes + list(_larger_cards(job, budget_gib, card=card))[: most - len(changes)]


@dataclass(frozen=True, slots=True)
class _Step:
    """One value of the recipe changed; `alters` is how much that changes what is trained (0: nothing)."""

    key: str
    value: Any
    alters: int

    @property
    def words(self) -> str:
        return f"{self.key}: {str(self.value).lower() if isinstance(self.value, bool) else self.value}"

    def on(self, job: Job) -> Job:
        section, _, name = self.key.partition(".")
        value = () if self.value == "[]" else self.value
        return replace(job, **{section: getattr(job, section).model_copy(update={name: value})})


def _steps(job: Job) -> Iterator[_Step]:
    """Values that save memory, of several for one key the mildest first."""
    train, lora, base = job.train, job.lora, job.base
    if train.micro_batch_size not in ("auto", 1):
        yield _Step("train.micro_batch_size", "auto", 0)
    if train.gradient_checkpointing != "auto":
        yield _Step("train.gradient_checkpointing", "auto", 0)
    if train.offload == "none" and job.device == "cuda" and "checkpoints" in offloads(_asking(job, "checkpoints")):
        yield _Step("train.offload", "auto", 0)
    if base.embeddings == "device" and job.device == "cuda" and _embedding_is_free(job):
        yield _Step("base.embeddings", "cpu", 0)
    known = STRATEGIES[job.layout.strategy].optimizers
    if job.device == "cuda" and train.optimizer in ("adamw", "paged_adamw") and "adamw_8bit" in known:
        yield _Step("train.optimizer", "adamw_8bit", 0)
    if base.compute_dtype == "float32" and job.device == "cuda":
        yield _Step("base.compute_dtype", "auto", 1)
    if base.quantize in ("none", "int8") and not lora.modules_to_save:
        yield _Step("base.quantize", "nf4", 1)
    if base.quantize in ("nf4", "fp4") and not base.double_quant:
        yield _Step("base.double_quant", True, 0)
    if lora.dropout:
        yield _Step("lora.dropout", 0.0, 1)
    if lora.method in ("dora", "pissa", "olora"):
        yield _Step("lora.method", "lora", 1)
    if lora.modules_to_save:
        yield _Step("lora.modules_to_save", "[]", 2)
    rank = lora.rank // 2
    while rank >= _LOWEST_RANK:
        yield _Step("lora.rank", rank, 2)
        rank //= 2
    length = train.max_length // 2
    while length >= _SHORTEST:
        yield _Step("train.max_length", length, 2)
        length //= 2


def _asking(job: Job, offload: Literal["none", "checkpoints"]) -> Job:
    return replace(job, train=job.train.model_copy(update={"offload": offload}))


def _embedding_is_free(job: Job) -> bool:
    """Whether the input embedding can leave the card: it is not the head as well, not trained, not divided."""
    lora = job.lora
    named = [*lora.modules_to_save, *(() if lora.targets == "all-linear" else lora.targets)]
    trained = lora.new_tokens or any(name.rpartition(".")[2] in EMBEDDING_NAMES for name in named)
    return not (job.shape.tied or trained or STRATEGIES[job.layout.strategy].divided)


def _larger_cards(job: Job, budget_gib: float, *, card: Card | None) -> Iterator[Change]:
    """Cards of the table, smallest first, on which the run fits as it is; each with more memory than the last."""
    if job.device == "cpu":
        return
    size = budget_gib
    for larger in sorted(CARDS.values(), key=lambda card: (card.memory_gib, -card.tflops)):
        there = replace(job, card=larger)
        choice = choose(there, usable_gib(larger), card=larger) if larger.memory_gib > size else None
        if choice is not None:
            ratio = None
            if card and card.tflops:
                before = _seconds_per_token(job, _unlimited(job, card), card)
                ratio = _seconds_per_token(there, choice, larger) / before
            peak = sum(parts_gib(there, choice).values())
            yield Change(f"take a card of {larger.memory_gib:g} GiB such as {larger.name}", peak, ratio, 3)
            size = larger.memory_gib * 1.25


def _unlimited(job: Job, card: Card | None) -> Choice:
    return choose(job, 1e9, card=card) or least(job)


def _seconds_per_token(job: Job, choice: Choice, card: Card | None) -> float:
    return step_seconds(job, choice, card) / (job.train.batch_size * job.train.max_length)


def flop_per_step(job: Job, choice: Choice) -> float:
    """FLOP of one optimizer step."""
    return flop_per_token(job, choice) * job.train.batch_size * job.train.max_length

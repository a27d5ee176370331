"""A run on several cards: memory of each, bytes and seconds between them, and how far more of them still pay.

Rows are divided by all strategies, so that a step of the whole batch takes each card its share of the computing. `ddp`
sums the adapter's gradients once a step, after the last micro-batch; it is counted as not hidden behind anything.
Divided strategies gather each layer twice in every micro-batch, for the forward and for the backward pass, while the
layer before computes: a step takes whichever of computing and gathering is longer, and the first layer's gathering.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from lora_tune.errors import Problem
from lora_tune.model import calibration
from lora_tune.model.cards import Card
from lora_tune.model.device import Device
from lora_tune.model.footprint import Job, job_of
from lora_tune.model.links import Link
from lora_tune.model.memory import MemoryPlan, plan_job
from lora_tune.model.sharding import ADAPTER_BYTES, divided_base, divided_root, held_adapter
from lora_tune.model.strategy import STRATEGIES, Layout, Name, conflicts, uneven
from lora_tune.recipe import Recipe

MOST_CARDS = 64
CARDS_OF_A_MACHINE = 8
PAYS = 1.5  # times as fast that twice as many cards must be
_BUCKET_BYTES = 25 * 2**20  # in which torch's DistributedDataParallel sums gradients


@dataclass(frozen=True, slots=True)
class Place:
    """Where it would run: one card's free memory and speed, what joins the cards of a machine, and the machines.

    `cards` are those of this machine that a run would see, 1 where another machine is planned for.
    """

    budget_gib: float
    device: Device
    card: Card | None
    link: Link
    network: Link
    cards: int = 1


@dataclass(frozen=True, slots=True)
class CardsPlan:
    """One strategy on so many cards: the plan of each card, what it sends, and what all of them do together.

    `sent_bytes` leave each card in one step, in `exchange_s` seconds; `step_s` and `tokens_per_s` are of all cards
    together. `problems` say why the strategy cannot be used; `memory` is None then. Seconds are None where the speed
    of the card is not known.
    """

    layout: Layout
    problems: tuple[Problem, ...] = ()
    memory: MemoryPlan | None = None
    sent_bytes: float = 0.0
    link: Link | None = None
    exchange_s: float | None = None
    step_s: float | None = None
    tokens_per_s: float | None = None

    @property
    def fits(self) -> bool:
        """Whether each card can hold its part."""
        return self.memory is not None and self.memory.fits

    def as_json(self) -> dict[str, Any]:
        """What `plan --json` says of it."""
        plan = self.memory
        return {
            "strategy": self.layout.strategy,
            "cards": self.layout.world,
            "nodes": self.layout.nodes,
            "fits": self.fits,
            "peak_gib": plan and round(plan.peak_gib, 4),
            "micro_batch_size": plan and plan.micro_batch_size,
            "accumulation": plan and plan.accumulation,
            "sent_gb_per_step": round(self.sent_bytes / 1e9, 6),
            "link": self.link and self.link.name,
            "exchange_s": _rounded(self.exchange_s),
            "step_s": _rounded(self.step_s),
            "tokens_per_s": _rounded(self.tokens_per_s),
            "problems": [str(problem) for problem in self.problems],
        }


def plan_layout(
    config: Mapping[str, Any],
    recipe: Recipe,
    layout: Layout,
    *,
    place: Place,
    changes_are: Literal["looked for", "left out"] = "left out",
) -> CardsPlan:
    """The plan of a layout, whose batch is the recipe's whatever the number of cards.

    Raises: UsageError for a config that cannot be read.
    """
    found = [] if layout.strategy == "single" else conflicts_known(layout.strategy, recipe)
    if problem := uneven(recipe.train.batch_size, layout.world):
        found.append(problem)
    if found:
        return CardsPlan(layout, tuple(found))
    measured = calibration.read(place.card.name if place.card else place.device)
    train = layout.share(recipe.train)
    job = job_of(config, base=recipe.base, lora=recipe.lora, train=train, device=place.device, calibration=measured)
    job = replace(job, layout=layout)
    memory = plan_job(job, place.budget_gib, card=place.card, changes_are=changes_are)
    link = place.network if layout.nodes > 1 and place.network.gbs < place.link.gbs else place.link
    sent, collectives, hops = exchanged(job, accumulation=memory.accumulation)
    exchange_s = link.seconds(sent, collectives=collectives, hops=hops) if layout.world > 1 else 0.0
    plan = CardsPlan(layout, (), memory, sent, link if layout.world > 1 else None, exchange_s)
    if memory.step_s is None:
        return plan
    step_s = joined_seconds(job, memory.step_s, exchange_s)
    tokens = recipe.train.batch_size * recipe.train.max_length
    return replace(plan, step_s=step_s, tokens_per_s=tokens / step_s)


def conflicts_known(name: Name, recipe: Recipe) -> list[Problem]:
    """What of the recipe does not work with a strategy, wherever it will run: what is installed here does not count."""
    found = conflicts(name, base=recipe.base, lora=recipe.lora, train=recipe.train)
    return [problem for problem in found if problem.key != "hardware.strategy"]


def exchanged(job: Job, *, accumulation: int) -> tuple[float, int, int]:
    """Bytes that each card sends in one step, in how many collectives, and hops of each."""
    cards, strategy = job.layout.world, STRATEGIES[job.layout.strategy]
    adapters = held_adapter(job.shape, job.lora, cards=1) * ADAPTER_BYTES
    if cards == 1:
        return 0.0, 0, 0
    if not strategy.divided:
        sent = strategy.bytes_per_step(weights=0.0, adapters=adapters, accumulation=accumulation, world=cards)
        return sent, max(1, round(adapters / _BUCKET_BYTES)), 2 * (cards - 1)
    root = divided_root(job.shape, element=job.element, cards=cards)
    layers = divided_base(job.shape, job.base, element=job.element, cards=cards) - root
    filled = held_adapter(job.shape, job.lora, cards=cards) * cards * ADAPTER_BYTES
    gathered = root + strategy.gathers * (layers + filled)
    sent = accumulation * (cards - 1) / cards * (gathered + filled)  # a ring sends all parts but one's own
    collectives = accumulation * (1 + (strategy.gathers + 1) * job.shape.layers)
    return sent, collectives, cards - 1


def joined_seconds(job: Job, computing_s: float, exchange_s: float) -> float:
    """Seconds of a step from both parts: one behind the other, or at the same time, as the strategy does it."""
    if not STRATEGIES[job.layout.strategy].divided:
        return computing_s + exchange_s
    return max(computing_s, exchange_s) + exchange_s / (job.shape.layers + 1)


@dataclass(frozen=True, slots=True)
class Several:
    """A run on several cards: the strategy it takes, the others beside it, and the same on 1 to 64 cards.

    `of_one_card` are the tokens/s of a single card that holds everything, None where none does.
    """

    chosen: CardsPlan
    strategies: tuple[CardsPlan, ...]
    scaling: tuple[CardsPlan, ...]
    pays_until: int | None

    @property
    def of_one_card(self) -> float | None:
        """Tokens/s of one card; None where the run does not fit on one."""
        first = self.scaling[0] if self.scaling else None
        return first.tokens_per_s if first and first.layout.world == 1 else None

    def as_json(self) -> dict[str, Any]:
        """What `plan --json` adds: the speeds are those of all cards together."""
        return {
            "step_s": _rounded(self.chosen.step_s),
            "tokens_per_s": _rounded(self.chosen.tokens_per_s),
            "cards": self.chosen.as_json(),
            "strategies": [plan.as_json() for plan in self.strategies],
            "scaling": [plan.as_json() for plan in self.scaling],
            "pays_until": self.pays_until,
        }


def on_cards(config: Mapping[str, Any], recipe: Recipe, *, cards: int | None, place: Place) -> Several | None:
    """The plans for `cards`, or for as many as `hardware` names; None where that is one.

    The processes of a machine without cards share its memory. Raises: UsageError for a config that cannot be read.
    """
    hardware = recipe.hardware
    if cards is None:
        here = 1 if hardware.strategy == "single" else place.cards
        share = recipe.train.batch_size // hardware.nodes or 1
        auto = max(number for number in range(1, here + 1) if share % number == 0)
        each = hardware.processes if hardware.processes != "auto" else auto
        cards, nodes = each * hardware.nodes, hardware.nodes
    else:
        nodes = hardware.nodes if cards % hardware.nodes == 0 and hardware.nodes > 1 else layout_on(cards, "ddp").nodes
    if cards == 1:
        return None
    if place.device == "cpu":
        place = replace(place, budget_gib=place.budget_gib * nodes / cards)
    names: tuple[Name, ...] = ("ddp", "fsdp2", "zero3")
    plans = [plan_layout(config, recipe, Layout(name, cards // nodes, nodes), place=place) for name in names]
    asked = hardware.strategy
    if asked in ("auto", "single"):
        chosen = plans[0] if plans[0].fits or plans[1].memory is None else plans[1]
    else:
        chosen = next(plan for plan in plans if plan.layout.strategy == asked)
    if chosen.memory is not None and not chosen.fits:
        chosen = plan_layout(config, recipe, chosen.layout, place=place, changes_are="looked for")
    more = tuple(scaling(config, recipe, place=place, asked="auto" if asked == "single" else asked))
    return Several(chosen, tuple(plans), more, pays_until(more))


def largest_paying(several: Several, *, batch_size: int) -> str:
    """Where more cards stop paying, in words; nothing where speeds are not known."""
    if several.pays_until is None:
        return ""
    last = several.scaling[-1].layout.world
    if several.pays_until < last:
        return f"beyond {several.pays_until} cards twice as many are less than {PAYS:g} times as fast"
    if last < MOST_CARDS and batch_size % (2 * last):
        return f"more than {last} cards cannot share a batch of {batch_size} evenly: raise train.batch_size"
    return f"up to {last} cards twice as many are at least {PAYS:g} times as fast"


def layout_on(cards: int, strategy: Name) -> Layout:
    """So many cards, eight to a machine."""
    nodes = -(-cards // CARDS_OF_A_MACHINE)
    return Layout(strategy if cards > 1 else "single", cards // nodes, nodes)


def best_layout(
    config: Mapping[str, Any], recipe: Recipe, *, cards: int, place: Place, asked: Name | Literal["auto"] = "auto"
) -> CardsPlan:
    """What `auto` takes on so many cards: rows divided where one card holds the base, else the base divided as well."""
    if cards == 1 or asked != "auto":
        return plan_layout(config, recipe, layout_on(cards, "single" if asked == "auto" else asked), place=place)
    whole = plan_layout(config, recipe, layout_on(cards, "ddp"), place=place)
    return whole if whole.fits else plan_layout(config, recipe, layout_on(cards, "fsdp2"), place=place)


def scaling(
    config: Mapping[str, Any], recipe: Recipe, *, place: Place, asked: Name | Literal["auto"] = "auto"
) -> list[CardsPlan]:
    """The plan for 1, 2, 4 … 64 cards that can share the batch and hold their part."""
    found = []
    cards = 1
    while cards <= MOST_CARDS and recipe.train.batch_size % cards == 0:
        plan = best_layout(config, recipe, cards=cards, place=place, asked=asked if cards > 1 else "auto")
        if plan.fits:
            found.append(plan)
        cards *= 2
    return found


def pays_until(plans: Sequence[CardsPlan]) -> int | None:
    """The number of cards from which twice as many would be less than PAYS times as fast; None without speeds."""
    known = [plan for plan in plans if plan.tokens_per_s]
    for fewer, more in pairwise(known):
        if (more.tokens_per_s or 0) < PAYS * (fewer.tokens_per_s or 0):
            return fewer.layout.world
    return known[-1].layout.world if known else None


def _rounded(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.6g}")

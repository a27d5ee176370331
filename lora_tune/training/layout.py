"""How many processes a run gets, and what of it each one trains: decided from the recipe and the plan (cold)."""

from __future__ import annotations

from dataclasses import replace

from lora_tune.errors import RecipeError, ResourceError
from lora_tune.model import calibration
from lora_tune.model.device import this_machine, visible_cards
from lora_tune.model.footprint import job_of
from lora_tune.model.memory import MemoryPlan, plan_here, plan_job, too_large
from lora_tune.model.source import BaseSource, find_base
from lora_tune.model.strategy import Layout, conflicts, layout_of
from lora_tune.recipe import Recipe
from lora_tune.training.place import Place


def layout_here(recipe: Recipe, place: Place | None, *, trust_remote_code: str | None = None) -> Layout:
    """The layout of a run on this machine, or of the processes that a launcher has started.

    The base's config is read only where there are several processes.

    Raises:
        RecipeError: the batch cannot be shared, or something of the recipe does not work with the strategy.
    """
    hardware, batch, world = recipe.hardware, recipe.train.batch_size, place.world if place else None
    cards = len(visible_cards()) if place is None else 0
    first = layout_of(hardware, cards=cards, batch_size=batch, fits_one_card="yes", world=world)
    if first.world == 1:
        return first
    first.share(recipe.train)
    source = find_base(recipe.base, trust_remote_code=trust_remote_code)
    layout = first
    if hardware.strategy == "auto" and not _plan(recipe, source, first).fits:
        layout = layout_of(hardware, cards=cards, batch_size=batch, fits_one_card="no", world=world)
    found = conflicts(layout.strategy, base=recipe.base, lora=recipe.lora, train=recipe.train)
    if found:
        raise RecipeError(found)
    return layout


def plan_of_process(recipe: Recipe, source: BaseSource, layout: Layout) -> MemoryPlan:
    """The plan of one process: its share of the batch, and of the base where that is divided.

    Raises: ResourceError where nothing fits.
    """
    if layout.world == 1:
        return plan_here(source.config, base=recipe.base, lora=recipe.lora, train=recipe.train)
    plan = _plan(recipe, source, layout)
    if not plan.fits:
        raise ResourceError(too_large(plan, layout.share(recipe.train)))
    return plan


def _plan(recipe: Recipe, source: BaseSource, layout: Layout) -> MemoryPlan:
    machine = this_machine()
    free = machine.free_gib
    if layout.world > 1 and machine.device == "cpu":
        free /= layout.processes  # which share this memory
    measured = calibration.read(machine.card.name if machine.card else machine.device)
    job = job_of(
        source.config,
        base=recipe.base,
        lora=recipe.lora,
        train=layout.share(recipe.train),
        device=machine.device,
        calibration=measured,
    )
    return plan_job(replace(job, layout=layout), free, card=machine.card)


def fitting_micro_batch(stored: int, each: int) -> int:
    """The largest micro-batch of at most `stored` sequences that divides the `each` that a process has of a batch."""
    return max(size for size in range(1, min(stored, each) + 1) if each % size == 0)

"""`lora-tune plan RECIPE`: will it fit, how long will it take, what should be changed? Before anything is downloaded.

From the base's config.json alone, in under half a second and without torch; nothing is loaded or written. What does
not fit ends with exit code 4 and the three cheapest changes that would make it fit.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lora_tune.data.amount import Amount, estimate
from lora_tune.errors import Problem, RecipeError, UsageError
from lora_tune.model import base_fit
from lora_tune.model.base_config import stored_bits
from lora_tune.model.cards import Card, find_card, usable_gib
from lora_tune.model.device import Device, this_machine, visible_cards
from lora_tune.model.links import find_link, link_of
from lora_tune.model.memory import MemoryPlan, too_large, try_plan
from lora_tune.model.scaling import Place, Several, largest_paying, on_cards
from lora_tune.model.shape import read_shape
from lora_tune.model.source import BaseSource, find_config, stored_bytes
from lora_tune.model.speed import SPEED_ERROR
from lora_tune.recipe import Recipe, Train
from lora_tune.recipe_file import RecipeFile, read_recipe
from lora_tune.recipe_values import seconds_of
from lora_tune.terminal import print_json, print_problems, print_table, results, run_app

app = typer.Typer(help="Will it fit, how long will it take, what should change?", add_completion=False)
_OPTIONS = {  # shorter names of keys, for a plan without a recipe
    "--method": "lora.method", "--rank": "lora.rank", "--quantize": "base.quantize", "--revision": "base.revision",
    "--max-length": "train.max_length", "--batch-size": "train.batch_size", "--epochs": "train.epochs",
    "--max-steps": "train.max_steps",
}  # fmt: skip
_WITHOUT_RECIPE = "base: {name: none/none}\ndata: [{source: none/none}]\noutput: adapters/plan\n"
_INDEX_TOLERANCE = 0.02  # share by which an index may differ from the count before it is said
_PARTS = {
    "adapters": "adapters", "gradients": "gradients", "optimizer": "optimizer states",
    "activations": "kept activations", "loss_head": "loss head",
    "buffers": "buffers (recomputing, temporaries, dequantizing, masks)",
    "exchange": "gathered from other cards, or summed up with them", "runtime": "runtime (context, fragmentation)",
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """What a plan is made for: memory that is free, the card where there is one, and a line that says so."""

    device: Device
    budget_gib: float
    card: Card | None
    text: str


@dataclass(frozen=True)
class Duration:
    """How long the whole run takes; `text` says what that rests on. Unknown numbers are None."""

    steps: int | None
    hours: float | None
    text: str


@app.command(context_settings={"ignore_unknown_options": True})
def command(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="The recipe; section.key=value.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Instead of a recipe: a base; keys follow as for a recipe.")
    ] = None,
    gpu: Annotated[
        str, typer.Option(metavar="CARD", help="rtx4090, a100-80 …, its memory (24GiB), or auto: the one in here.")
    ] = "auto",
    cards: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Cards that share the run; without it, what hardware: says.")
    ] = None,
    link: Annotated[
        str | None, typer.Option(metavar="LINK", help="Between the cards of a machine: pcie4, nvlink, 25 (GB/s) …")
    ] = None,
    network: Annotated[
        str, typer.Option(metavar="LINK", help="Between machines of 8 cards: 10gbe, 100gbe, ndr …")
    ] = "100gbe",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Plan a run: bytes by part, the fastest combination that fits, time; nothing is loaded.

    Shorter for keys: --method, --rank, --quantize, --max-length, --batch-size, --epochs, --max-steps, --revision.
    """
    file = _recipe(arguments or [], model)
    target = _target(gpu)
    with nullcontext() if model else file.locating():
        place = _place(target, link=link, network=network, here="yes" if gpu.strip().lower() == "auto" else "no")
        plan, source, problems, several = look(file.recipe, target, place=place, cards=cards)
    step_s = several.chosen.step_s if several else plan.step_s
    duration = _duration(file.recipe, step_s, amount=_amount(file.recipe, source, model))
    if model is None:
        problems = [*file.warnings, *(file.locate(problem) if problem.key else problem for problem in problems)]
    code = 0 if plan.fits else 4
    if as_json:
        facts = _facts(plan, duration) | (several.as_json() if several else {})
        print_json({"exit_code": code, **facts}, problems)
    else:
        _print(file.recipe, source, plan, target=target, duration=duration)
        if several:
            _print_several(several, file.recipe)
        elif not plan.fits and place.device == "cuda" and (words := _on_more(source, file.recipe, place)):
            results().print(words)
        print_problems(problems)
    return code


def look(
    recipe: Recipe, target: Target, *, place: Place | None = None, cards: int | None = None
) -> tuple[MemoryPlan, BaseSource, list[Problem], Several | None]:
    """The plan of a recipe on a target, the base it is for, and what should be said of it; of several cards the plan of
    each, and what they do together.

    Raises:
        UsageError, RecipeError: the base cannot be found or read, or the adapter or the strategy does not fit it.
    """
    source = find_config(recipe.base)
    several = on_cards(source.config, recipe, cards=cards, place=place) if place else None
    if several is not None and several.chosen.problems:
        raise RecipeError(list(several.chosen.problems))
    plan = several.chosen.memory if several else None
    if plan is None:
        plan = try_plan(
            source.config,
            base=recipe.base,
            lora=recipe.lora,
            train=recipe.train,
            budget_gib=target.budget_gib,
            device=target.device,
            card=target.card,
        )
    problems = list(_notes(recipe, source, plan, target.card))
    if errors := [problem for problem in problems if problem.severity == "error"]:
        raise RecipeError(errors)
    if not plan.fits:
        problems.append(too_large(plan, recipe.train))
    return plan, source, problems, several


def _on_more(source: BaseSource, recipe: Recipe, place: Place) -> str | None:
    """On how many cards it would fit, in words."""
    for cards in (2, 4, 8):
        found = on_cards(source.config, recipe, cards=cards, place=place)
        if found is not None and found.chosen.memory is not None and found.chosen.fits:
            said = f"{found.chosen.layout.strategy}, {found.chosen.memory.peak_gib:.1f} GiB each"
            return f"on {cards} such cards it fits ({said}): see --cards {cards}"
    return None


def _place(target: Target, *, link: str | None, network: str, here: Literal["yes", "no"]) -> Place:
    """The cards of the target and what joins them. Raises: UsageError."""
    between = link_of(target.card) if link is None else find_link(link)
    visible = max(1, len(visible_cards())) if here == "yes" else 1
    across = find_link(network, option="--network")
    return Place(target.budget_gib, target.device, target.card, between, across, visible)


def _recipe(arguments: Sequence[str], model: str | None) -> RecipeFile:
    """The recipe that is named, or one made of `--model` and the keys that follow."""
    plain, overrides = _split(arguments)
    if model is None:
        if len(plain) != 1:
            got = f"got {' '.join(plain)!r}" if plain else "got none"
            raise UsageError(f"one recipe is planned, {got}", "give a recipe, or --model NAME")
        return read_recipe(Path(plain[0]), overrides=overrides)
    if plain:
        raise UsageError(f"--model is a plan without a recipe, got {plain[0]!r} as well", "give one of them")
    with tempfile.TemporaryDirectory(prefix="lora_tune_plan_") as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(_WITHOUT_RECIPE, encoding="utf-8")
        file = read_recipe(path, overrides=[f"base.name={model}", *overrides])
    return file


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is no option, and the overrides: `section.key=value`, `--rank 8`, `--rank=8`."""
    plain: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word.startswith("-") and len(word) > 1:
            if name not in _OPTIONS:
                raise UsageError(f"no such option, got {name!r}", "see lora-tune plan --help")
            if not equals and not rest:
                raise UsageError(f"{name} needs a value, got none", f"such as {name}=…")
            overrides.append(f"{_OPTIONS[name]}={value if equals else rest.pop(0)}")
        else:
            (overrides if equals and not Path(word).exists() else plain).append(word)
    return plain, overrides


def _target(gpu: str) -> Target:
    """The card that is named, or the one in this machine; a machine without one is planned for its memory."""
    if gpu.strip().lower() != "auto":
        card = find_card(gpu)
        known = f", {card.tflops:g} TFLOP/s {card.sixteen_bit}, {card.bandwidth_gbs:g} GB/s" if card.tflops else ""
        text = f"{card.name}: {usable_gib(card):.1f} of {card.memory_gib:g} GiB usable{known}"
        return Target("cuda", usable_gib(card), card, text if known else f"{text}; its speed is not known")
    machine = this_machine()
    if machine.card is not None:
        known = "" if machine.card.tflops else "; its speed is not known"
        held = f", {machine.held_gib:.1f} held by the driver and others"
        text = f"{machine.name}: {machine.free_gib:.1f} of {machine.total_gib:.1f} GiB free{held}{known}"
        return Target("cuda", machine.free_gib, machine.card, text)
    text = (
        f"no GPU here: planned for the memory of this machine, {machine.free_gib:.1f} GiB free; its speed is not known"
    )
    return Target("cpu", machine.free_gib, None, f"{text} (for a card: --gpu rtx4090)")


def _notes(recipe: Recipe, source: BaseSource, plan: MemoryPlan, card: Card | None) -> Iterator[Problem]:
    """What should be said of the adapter, the base and the card; errors among it."""
    stored = f"{stored_bits(source.config)} bit" if source.quantization is not None else None
    yield from base_fit.combination_problems(recipe.lora, quantize=recipe.base.quantize, stored=stored)
    if not plan.trainable_parameters:
        names = ", ".join(recipe.lora.targets)
        yield Problem(f"no layer of the base has that name, got {names}", "write all-linear", key="lora.targets")
    yield from base_fit.length_problems(source.config, recipe.train)
    yield from base_fit.layer_count_problems(source.config, recipe.train)
    yield from base_fit.expert_notes(recipe.lora, experts=source.experts, quantize=recipe.base.quantize)
    if card is not None and card.sixteen_bit == "float16" and recipe.base.compute_dtype == "bfloat16":
        yield Problem(
            f"{card.name} has no bfloat16", "write auto: float16", key="base.compute_dtype", severity="warning"
        )
    if plan.known != "in our table":
        reason = f"model type {source.config.get('model_type')!r} is not in our table"
        fix = "parameters were counted on the meta device; what is kept for the backward pass is taken as a Llama's"
        yield Problem(reason, fix, severity="note")
    index = stored_bytes(source)
    if index is not None and source.quantization is None:
        share = index / (2 * plan.parameters)
        whole = min(abs(share - 1), abs(share / 2 - 1))  # stored in 16 or 32 bit
        if whole > _INDEX_TOLERANCE:
            counted = 2 * plan.parameters / 1e9
            reason = f"the index of the weights names {index / 1e9:.2f} GB, config.json gives {counted:.2f} GB"
            yield Problem(reason, "take both from the same repository", key="base.name", severity="warning")


def _amount(recipe: Recipe, source: BaseSource, model: str | None) -> Amount | None:
    """Rows and tokens of the data where it lies on this machine."""
    if model is not None or any(data.format == "sni" or getattr(data, "prompts", None) for data in recipe.data):
        return None
    vocabulary = read_shape(source.config).vocabulary if source.config.get("vocab_size") else 32_000
    return estimate(
        recipe.data, hold_out=recipe.eval.hold_out, max_length=recipe.train.max_length, vocabulary=vocabulary
    )


def _duration(recipe: Recipe, step_s: float | None, *, amount: Amount | None) -> Duration:
    """Steps and hours of the whole run, as far as they are known."""
    train = recipe.train
    share = 1.0 if train.packing or amount is None else min(1.0, amount.tokens_per_row / train.max_length)
    step_s = step_s * share if step_s else None
    steps, why = train.max_steps, "train.max_steps"
    if steps is None and amount is not None:
        steps, why = (
            _steps(train, amount),
            f"{amount.rows:,} rows of about {amount.tokens_per_row:,.0f} tokens, estimated",
        )
    if train.budget:
        seconds = seconds_of(train.budget)
        steps = max(1, int(seconds / step_s)) if step_s else None
        after = f", after about {steps:,} steps" if steps else ""
        return Duration(steps, seconds / 3600, f"train.budget {train.budget} ends it{after}")
    if steps is None:
        return Duration(None, None, "how many steps is not known: the data is not on this machine")
    hours = steps * step_s / 3600 if step_s else None
    time = "" if hours is None else f": about {_clock(hours)}"
    return Duration(steps, hours, f"{steps:,} steps ({why}){time}")


def _steps(train: Train, amount: Amount) -> int:
    """Optimizer steps of the run: packed sequences are full."""
    rows = math.ceil(amount.tokens / train.max_length) if train.packing else amount.rows
    return max(1, math.ceil(train.epochs * math.ceil(rows / train.batch_size)))


def _facts(plan: MemoryPlan, duration: Duration) -> dict[str, Any]:
    """What `--json` prints beside `exit_code` and `problems`."""
    return {
        "parts_gib": {name: round(size, 4) for name, size in plan.parts_gib.items()},
        "peak_gib": round(plan.peak_gib, 4),
        "uncertainty_gib": round(plan.uncertainty_gib, 4),
        "fits": plan.fits,
        "micro_batch_size": plan.micro_batch_size,
        "accumulation": plan.accumulation,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "optimizer": plan.optimizer,
        "offload": plan.offload,
        "tokens_per_s": plan.tokens_per_s and round(plan.tokens_per_s, 1),
        "step_s": plan.step_s and round(plan.step_s, 4),
        "hours": duration.hours and round(duration.hours, 4),
        "parameters": plan.parameters,
        "trainable_parameters": plan.trainable_parameters,
    }


def _print(recipe: Recipe, source: BaseSource, plan: MemoryPlan, *, target: Target, duration: Duration) -> None:
    """The plan as a person reads it."""
    console = results()
    trained = f"{_count(plan.trainable_parameters)} trained ({recipe.lora.method}, rank {recipe.lora.rank})"
    console.print(f"{source.name}: {_count(plan.parameters)} parameters, {trained}")
    console.print(target.text)
    quantize = recipe.base.quantize
    unit, factor, digits = ("GiB", 1, 2) if plan.peak_gib >= 1 else ("MiB", 1024, 1)
    sizes = {
        "weights of linear layers" + ("" if quantize == "none" else f" ({quantize})"): (
            plan.parts_gib["weights"] - plan.unquantized_gib
        ),
        "embeddings, head, norms, experts": plan.unquantized_gib,
        **{words: plan.parts_gib[name] for name, words in _PARTS.items() if name in plan.parts_gib},
    }
    rows = [[words, f"{factor * gib:.{digits}f}"] for words, gib in sizes.items()]
    peak = "at the peak" if plan.parts_gib["gradients"] else "at the peak, in an evaluation"
    rows.append([peak, f"{factor * plan.peak_gib:.{digits}f} ± {factor * plan.uncertainty_gib:.{digits}f}"])
    print_table("", ["part", unit], rows)
    console.print(plan.reason)
    for change in plan.changes:
        console.print(f"  it would fit: {change}")
    if plan.calibrated:
        console.print(f"corrected by {plan.calibrated} measurements of this card")
    flop = plan.flop_per_step
    work = f"{flop / 1e12:,.1f} TFLOP" if flop >= 1e12 else f"{flop / 1e9:,.1f} GFLOP"
    console.print(f"{work} a step of {plan.tokens_per_step:,} tokens; {_speed(plan)}")
    console.print(duration.text)


def _print_several(several: Several, recipe: Recipe) -> None:
    """The strategies on so many cards, and what more cards would bring."""
    console, chosen = results(), several.chosen
    join = f"{chosen.link.name}, {chosen.link.gbs:g} GB/s each way" if chosen.link else ""
    console.print(
        f"{chosen.layout.world} cards ({join})): {chosen.layout.strategy} of these, the table above is of each card"
    )
    columns = ["strategy", "GiB", "micro", "GB/step", "in s", "step s", "tokens/s", "speed-up"]
    one = several.of_one_card
    rows: list[list[object]] = []
    for plan in several.strategies:
        if plan.memory is None:
            rows.append([plan.layout.strategy, "–", "–", "–", "–", "–", "–", plan.problems[0].reason])
            continue
        gib = f"{plan.memory.peak_gib:.1f}" + ("" if plan.fits else " does not fit")
        times = plan.tokens_per_s / one if plan.tokens_per_s and one else None
        rows.append([plan.layout.strategy, gib, plan.memory.micro_batch_size, plan.sent_bytes / 1e9, plan.exchange_s,
                     plan.step_s, plan.tokens_per_s and round(plan.tokens_per_s), times])  # fmt: skip
    print_table("", columns, rows)
    if len(several.scaling) > 1 and several.scaling[-1].tokens_per_s:
        first = several.scaling[0]
        rows = [[plan.layout.world, plan.layout.strategy, f"{plan.memory.peak_gib:.1f}" if plan.memory else "–",
                 plan.link.name if plan.link else "–", round(plan.tokens_per_s or 0),
                 (plan.tokens_per_s or 0) / (first.tokens_per_s or 1)] for plan in several.scaling]  # fmt: skip
        print_table("", ["cards", "strategy", "GiB a card", "link", "tokens/s", "speed-up"], rows)
    if words := largest_paying(several, batch_size=recipe.train.batch_size):
        console.print(words)


def _speed(plan: MemoryPlan) -> str:
    if plan.step_s is None or plan.tokens_per_s is None:
        return "seconds unknown"
    error = "" if plan.calibrated else f" (± {SPEED_ERROR:.0%})"
    return f"{plan.step_s:,.2f} s, {plan.tokens_per_s:,.0f} tokens/s{error}"


def _count(number: int) -> str:
    return f"{number / 1e9:,.2f} B" if number >= 1e9 else f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number:,}"


def _clock(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.1f} minutes"


if __name__ == "__main__":
    sys.exit(run_app(app, name="python -m lora_tune.plan"))

"""The choice: the fastest combination that fits, and the cheapest changes where none does."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory import LLAMA_2, LLAMA_3, plan

from lora_tune.errors import ResourceError
from lora_tune.model import calibration
from lora_tune.model.cards import CARDS, Card, usable_gib
from lora_tune.model.choice import MARGIN, MOST_TOKENS, choose, fits
from lora_tune.model.footprint import Choice, Job, job_of
from lora_tune.model.memory import MemoryPlan, try_plan
from lora_tune.model.speed import step_seconds
from lora_tune.recipe import Base, Lora, Train

SMALL = LLAMA_2 | {"num_hidden_layers": 6}
CARD = CARDS["rtx4090"]


def job(train: Train, *, config: dict[str, Any] = SMALL, device: Any = "cuda") -> Job:
    return job_of(config, base=Base(name="x"), lora=Lora(), train=train, device=device)


@given(
    batch=st.sampled_from([1, 2, 6, 8, 16, 48]),
    length=st.sampled_from([128, 2048, 8192]),
    gib=st.sampled_from([2.0, 2.5, 3, 4, 8, 24]),
    packing=st.booleans(),
    optimizer=st.sampled_from(["auto", "adamw", "sgd"]),
    device=st.sampled_from(["cuda", "cpu"]),
)
@settings(max_examples=60, deadline=None)
def test_nothing_that_fits_is_faster(batch: int, length: int, gib: float, packing: bool, optimizer: Any,
                                     device: Any) -> None:  # fmt: skip
    """Against all combinations one by one; the 8-bit optimizer counts only where nothing fits without it, and inputs in
    the machine's memory only where nothing fits at all."""
    train = Train(batch_size=batch, max_length=length, packing=packing, optimizer=optimizer)
    asked = job(train, device=device)
    found = choose(asked, gib, card=CARD)
    sizes = [2**n for n in range(7) if batch % 2**n == 0 and (n == 0 or not packing or 2**n * length <= MOST_TOKENS)]
    names = [optimizer] if optimizer != "auto" else ["adamw", "adamw_8bit"] if device == "cuda" else ["adamw"]
    places: list[Any] = ["none", "checkpoints"] if device == "cuda" else ["none"]
    for place, name in product(places, names):
        every = [Choice(micro, layers, name, place) for micro, layers in product(sizes, range(7))]
        fitting = [choice for choice in every if fits(asked, choice, gib)]
        if fitting:
            assert found in fitting
            fastest = min(step_seconds(asked, choice, CARD) for choice in fitting)
            assert step_seconds(asked, found, CARD) == pytest.approx(fastest)
            return
    assert found is None


def test_layers_are_recomputed_only_as_far_as_memory_needs() -> None:
    counts = []
    for gib in (10.0, 12.0, 16.0, 24.0, 48.0):
        found = plan(LLAMA_3, train=Train(micro_batch_size=1), gib=gib)
        count = {"all": 32, "none": 0}.get(str(found.gradient_checkpointing), found.gradient_checkpointing)
        assert isinstance(count, int) and found.peak_gib + found.uncertainty_gib <= MARGIN * gib
        if count:
            fewer = Train(micro_batch_size=1, gradient_checkpointing=count - 1, optimizer="adamw", offload="none")
            with pytest.raises(ResourceError):
                plan(LLAMA_3, train=fewer, gib=gib)
        counts.append(count)
    assert counts == sorted(counts, reverse=True) and counts[-1] == 0 < counts[1] < 32


def test_the_8_bit_optimizer_comes_only_where_nothing_else_fits() -> None:
    def optimizer(gib: float, asked: Any = "auto") -> str:
        lora = Lora(rank=256)
        return plan(LLAMA_2, lora=lora, train=Train(optimizer=asked), gib=gib).optimizer

    assert optimizer(24.0) == "adamw"
    assert optimizer(14.5) == "adamw_8bit"
    assert optimizer(24.0, "sgd") == "sgd"
    assert plan(LLAMA_2, lora=Lora(rank=256), device="cpu", gib=400.0).optimizer == "adamw"


def test_what_the_recipe_fixes_stays() -> None:
    train = Train(micro_batch_size=4, gradient_checkpointing=7, optimizer="lion_8bit")
    found = plan(LLAMA_2, train=train)
    assert (found.micro_batch_size, found.gradient_checkpointing, found.optimizer) == (4, 7, "lion_8bit")
    assert found.reason.endswith("as the recipe says")
    assert plan(LLAMA_2, device="cpu").gradient_checkpointing == "none"


def tried(config: dict[str, Any], *, base: Base, lora: Lora, train: Train, gib: float, card: Card | None = None,
          device: Any = "cuda") -> MemoryPlan:  # fmt: skip
    return try_plan(config, base=base, lora=lora, train=train, budget_gib=gib, device=device, card=card)


REFUSED = [
    (Train(micro_batch_size=48), Base(name="x"), Lora(), 12.0),
    (Train(gradient_checkpointing="none"), Base(name="x"), Lora(), 12.0),
    (Train(), Base(name="x", quantize="none"), Lora(), 12.0),
    (Train(optimizer="adamw"), Base(name="x", double_quant=False), Lora(rank=64), 6.6),
    (Train(max_length=16384), Base(name="x"), Lora(), 8.0),
    (
        Train(micro_batch_size=8, gradient_checkpointing="none"),
        Base(name="x", quantize="int8"),
        Lora(dropout=0.1),
        12.0,
    ),
    (Train(), Base(name="x"), Lora(method="dora", rank=128), 8.0),
]


@pytest.mark.parametrize(("train", "base", "lora", "gib"), REFUSED)
def test_what_does_not_fit_is_refused_with_three_changes_that_help(
    train: Train, base: Base, lora: Lora, gib: float
) -> None:
    with pytest.raises(ResourceError) as caught:
        plan(LLAMA_2, base=base, lora=lora, train=train, gib=gib)
    assert caught.value.exit_code == 4 and len(str(caught.value).splitlines()) == 1
    problem, found = caught.value.problems[0], tried(LLAMA_2, base=base, lora=lora, train=train, gib=gib)
    assert problem.key and not found.fits and found.peak_gib + found.uncertainty_gib > MARGIN * gib
    assert len(found.changes) == 3
    for change in found.changes:
        assert change.words in problem.fix
        time = re.search(r"\([0-9.]+ GiB(, (\+[0-9]+ % time|as fast|[0-9]+ % faster))?\)", str(change))
        if change.words.startswith("set "):
            assert time and time[1]
            apply_and_plan(change.words, train=train, base=base, lora=lora, gib=gib)
        else:
            size = re.match(r"take a card of ([0-9]+) GiB such as (.+)", change.words)
            assert size and time and not time[1]  # the speed of the card that it is compared with is not known here
            plan(LLAMA_2, base=base, lora=lora, train=train, gib=usable_gib(CARDS[size[2]]))


def apply_and_plan(words: str, *, train: Train, base: Base, lora: Lora, gib: float) -> None:
    """The change that is named must really fit, and none of its parts alone may."""
    pairs = [part.split(": ") for part in words.removeprefix("set ").split(" and ")]

    def changed(kept: list[list[str]]) -> dict[str, Any]:
        sections: dict[str, Any] = {"train": train, "base": base, "lora": lora}
        for key, value in kept:
            section, name = key.split(".")
            plain: Any = {"true": True, "[]": ()}.get(value, value)
            plain = int(plain) if str(plain).isdigit() else plain
            plain = float(plain) if plain == "0.0" else plain
            sections[section] = sections[section].model_copy(update={name: plain})
        return sections

    assert tried(LLAMA_2, **changed(pairs), gib=gib).fits
    for left_out in pairs:
        assert not tried(LLAMA_2, **changed([pair for pair in pairs if pair != left_out]), gib=gib).fits


def test_changes_that_leave_the_training_as_it_is_come_first() -> None:
    train = Train(micro_batch_size=16, gradient_checkpointing="none", optimizer="adamw")
    found = tried(LLAMA_2, base=Base(name="x"), lora=Lora(), train=train, gib=12.0, card=CARDS["rtx3060"])
    assert [change.alters for change in found.changes] == sorted(change.alters for change in found.changes)
    assert "micro_batch_size: auto" in found.changes[0].words or "gradient_checkpointing" in found.changes[0].words


def test_a_measured_card_is_planned_by_its_measurements() -> None:
    before = tried(LLAMA_3, base=Base(name="x"), lora=Lora(), train=Train(micro_batch_size=1), gib=48.0, card=CARD)
    assert before.calibrated == 0
    calibration.remember(
        CARD.name, predicted={"peak": before.peak_gib}, measured={"peak": 1.1 * before.peak_gib},
        step_s=(1.0, 1.2),
    )  # fmt: skip
    try:
        after = tried(LLAMA_3, base=Base(name="x"), lora=Lora(), train=Train(micro_batch_size=1), gib=48.0, card=CARD)
        assert after.calibrated == 1 and after.formula_gib == before.formula_gib
        assert after.peak_gib == pytest.approx(1.1 * before.peak_gib)
        assert after.uncertainty_gib < before.uncertainty_gib and after.uncertainty_gib <= 0.031 * after.peak_gib
        assert before.step_s and after.step_s == pytest.approx(1.2 * before.step_s)
        other = tried(LLAMA_3, base=Base(name="x"), lora=Lora(), train=Train(), gib=24.0, card=CARDS["rtx3090"])
        assert other.calibrated == 0
    finally:
        calibration.calibration_file().unlink()


def test_a_calibration_file_that_is_damaged_is_none() -> None:
    path = calibration.calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    name = CARD.name
    versions = calibration.libraries()
    damaged: list[Any] = [[], {name: 3}, {name: {versions: [1, {"ratios": {"peak": "a"}}]}}]
    damaged += [{name: {versions: [{"ratios": {"peak": 99}}]}}, {name: {"torch 0.1": [{"ratios": {"peak": 1.0}}]}}]
    for text in ("", "{", *map(json.dumps, damaged)):
        path.write_text(text)
        assert calibration.read(name) is None
    calibration.remember(name, predicted={"peak": 2.0, "x": 1.0}, measured={"peak": 2.2, "y": 1.0})
    found = calibration.read(name)
    assert found is not None and found.ratios == {"peak": pytest.approx(1.1)} and found.runs == 1 and not found.spread
    for ratio in (1.0, 1.2):
        calibration.remember(name, predicted={"peak": 1.0}, measured={"peak": ratio})
    again = calibration.read(name)
    assert again and again.runs == 3 and again.ratios["peak"] == pytest.approx(1.1)
    assert again.spread == pytest.approx(0.1 / 1.1)
    path.unlink()


def test_time_per_step_falls_with_faster_cards_and_rises_with_recomputing() -> None:
    asked = job(Train(micro_batch_size=1), config=LLAMA_3)
    times = [step_seconds(asked, Choice(1, 0, "adamw"), CARDS[name]) for name in ("t4", "rtx3090", "rtx4090", "h100")]
    assert times == sorted(times, reverse=True)
    by_layers = [step_seconds(asked, Choice(1, layers, "adamw"), CARD) for layers in (0, 16, 32)]
    assert by_layers == sorted(by_layers) and 1.25 < by_layers[2] / by_layers[0] < 1.5
    halved = replace(asked, calibration=calibration.Calibration("x", "", {}, None, 0.5, 1))
    assert step_seconds(halved, Choice(1, 0, "adamw"), CARD) == pytest.approx(by_layers[0] / 2)

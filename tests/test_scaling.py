"""The plan of several cards: strategies, links, where more stop paying; the tables and the simulation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import many_cards, scaling_simulation
from benchmarks.model_configs import CONFIGS
from lora_tune.cli import main
from lora_tune.errors import UsageError
from lora_tune.model.cards import CARDS, find_card
from lora_tune.model.links import LINKS, REACHED, find_link, link_of
from lora_tune.model.scaling import Place, best_layout, layout_on, on_cards, pays_until, plan_layout, scaling
from lora_tune.recipe import Recipe

Printed = pytest.CaptureFixture[str]
LLAMA_8B, LLAMA_70B = CONFIGS["meta-llama/Llama-3.1-8B"], CONFIGS["meta-llama/Llama-3.1-70B"]


def recipe(**sections: Any) -> Recipe:
    content: dict[str, Any] = {"base": {"name": "x"}, "data": [{"source": "x"}], "train": {"batch_size": 64}}
    return Recipe.model_validate(content | {"output": "out"} | sections)


def place(card: str, link: str = "nvlink3", network: str = "100gbe") -> Place:
    return replace(many_cards.place(card), link=find_link(link), network=find_link(network))


def test_the_tables_are_what_the_commands_print() -> None:
    fix = "run python -m benchmarks.many_cards --write"
    assert many_cards.TABLE.read_text(encoding="utf-8") == many_cards.tables(), fix
    fix = "run python -m benchmarks.scaling_simulation --write"
    assert scaling_simulation.RESULT.read_text(encoding="utf-8") == scaling_simulation.report(), fix


def test_published_steps_of_several_cards_lie_near_the_simulation() -> None:
    """Where the link is known: never faster than simulated, and at most a quarter slower."""
    known = [row for row in scaling_simulation.ROWS if "*" not in row.what]
    assert len(known) >= 8
    for row in known:
        assert 1.0 <= row.step_s / scaling_simulation.simulated(row) <= 1.25, row.what


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_divided_cards_need_less_and_all_of_them_do_the_same_work(quantize: str) -> None:
    asked = recipe(base={"name": "x", "quantize": quantize}, train={"batch_size": 64, "micro_batch_size": 1})
    peaks = []
    for cards in (2, 4, 8):
        plan = plan_layout(LLAMA_70B, asked, layout_on(cards, "fsdp2"), place=place("h200"))
        assert plan.memory is not None and plan.memory.accumulation * plan.memory.micro_batch_size * cards == 64
        peaks.append(plan.memory.parts_gib["weights"])
    assert peaks[0] > peaks[1] > peaks[2]
    assert peaks[0] / peaks[2] == pytest.approx(4, rel=0.25 if quantize == "nf4" else 0.01)  # scales stay whole


def test_auto_divides_rows_where_a_card_holds_the_base_and_the_base_where_not() -> None:
    assert best_layout(LLAMA_8B, recipe(), cards=4, place=place("rtx4090")).layout.strategy == "ddp"
    large = best_layout(LLAMA_70B, recipe(), cards=8, place=place("rtx4090"))
    assert large.layout.strategy == "fsdp2" and large.fits
    assert not best_layout(LLAMA_70B, recipe(), cards=2, place=place("rtx4090")).fits


def test_a_slower_link_never_pays_further() -> None:
    asked = recipe(base={"name": "x", "quantize": "none"})
    found = []
    for link in ("nvlink4", "pcie4", "10gbe", "1gbe"):
        plans = scaling(LLAMA_8B, asked, place=place("a100-80", link, link), asked="fsdp2")
        speeds = [plan.tokens_per_s or 0 for plan in plans]
        assert [plan.layout.world for plan in plans] == [1, 2, 4, 8, 16, 32, 64]
        found.append((pays_until(plans), speeds[3]))
    assert found == sorted(found, key=lambda pair: (-(pair[0] or 0), -pair[1])) and found[0] > found[-1]
    assert found[-1][0] == 1, "a base of 16 GB over 1 Gbit/s"
    ddp = scaling(LLAMA_8B, asked, place=place("a100-80", "10gbe", "10gbe"), asked="ddp")
    assert (pays_until(ddp) or 0) > (found[2][0] or 0), "gradients of an adapter are small"


def test_no_cards_are_faster_than_their_number() -> None:
    for card in ("rtx4090", "h100"):
        plans = scaling(LLAMA_8B, recipe(), place=place(card))
        one = plans[0].tokens_per_s or 0
        assert all((plan.tokens_per_s or 0) <= 1.001 * plan.layout.world * one for plan in plans)


def planned(capsys: Printed, *arguments: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", *arguments, "--json"]) == code
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A folder with the config.json of a 70B model and nothing else."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({**LLAMA_70B, "architectures": ["LlamaForCausalLM"]}))
    return str(tmp_path / "base")


def test_the_command_plans_several_cards(base: str, capsys: Printed) -> None:
    given = ["--model", base, "--gpu", "a100-80", "--batch-size", "64"]
    answer = planned(capsys, *given, "--cards", "4", "--link", "nvlink", "base.quantize=none", "--max-steps", "10")
    assert answer["cards"]["strategy"] == "fsdp2" and answer["cards"]["link"] == "nvlink" and answer["fits"]
    assert [plan["strategy"] for plan in answer["strategies"]] == ["ddp", "fsdp2", "zero3"]
    assert [plan["fits"] for plan in answer["strategies"]] == [False, True, True]
    assert [plan["cards"] for plan in answer["scaling"]] == [4, 8, 16, 32, 64] and answer["pays_until"] >= 4
    assert answer["hours"] == pytest.approx(10 * answer["cards"]["step_s"] / 3600, rel=0.01)
    assert answer["tokens_per_s"] == answer["cards"]["tokens_per_s"]
    assert sum(answer["parts_gib"].values()) == pytest.approx(answer["peak_gib"], abs=0.001)
    assert answer["parts_gib"]["exchange"] > 0
    slow = planned(capsys, *given, "--cards", "4", "--link", "1", "base.quantize=none")
    assert slow["cards"]["step_s"] > answer["cards"]["step_s"] and slow["cards"]["link"] == "1 GB/s"
    assert main(["plan", *given, "--cards", "4", "--link", "nvlink", "base.quantize=none"]) == 0
    printed = capsys.readouterr().out
    assert "fsdp2" in printed and "zero3" in printed and "speed-up" in printed and "cards" in printed


def test_what_does_not_go_together_is_said(base: str, capsys: Printed, tmp_path: Path) -> None:
    uneven = planned(capsys, "--model", base, "--gpu", "h200", "--cards", "3", code=2)
    assert "batch of all processes" in uneven["problems"][0]["reason"]
    answer = planned(capsys, "--model", base, "--gpu", "h200", "--cards", "2", "base.quantize=int8",
                     "hardware.strategy=fsdp2", code=2)  # fmt: skip
    assert "int8 cannot be divided" in answer["problems"][0]["reason"]
    assert main(["plan", "--model", base, "--gpu", "rtx4090", "--batch-size", "64"]) == 4
    assert "on 8 such cards it fits (fsdp2" in capsys.readouterr().out
    few = planned(capsys, "--model", base, "--gpu", "rtx4090", "--cards", "2", code=4)
    assert few["fits"] is False and few["cards"]["fits"] is False
    assert few["problems"][-1]["fix"].count("; or ") == 2, "three changes that would make it fit"
    assert planned(capsys, "--model", base, "--gpu", "h200", "--cards", "2", "--link", "nvlnk", code=2)["problems"]


def test_hardware_of_the_recipe_is_planned_without_options(base: str, capsys: Printed) -> None:
    given = ["--model", base, "--gpu", "h200", "hardware.processes=2", "hardware.nodes=2", "train.batch_size=16"]
    answer = planned(capsys, *given, "--network", "10gbe")
    assert answer["cards"] | {"cards": 4, "nodes": 2, "link": "10gbe", "strategy": "ddp"} == answer["cards"]
    assert "cards" not in planned(capsys, "--model", base, "--gpu", "h200", "hardware.processes=1")
    here = on_cards(LLAMA_8B, recipe(train={"batch_size": 6}), cards=None, place=replace(place("h200"), cards=4))
    assert here is not None and here.chosen.layout.world == 3, "as many of the four as divide the batch"
    processes = on_cards(LLAMA_8B, recipe(), cards=2, place=replace(place("h200"), device="cpu", card=None))
    assert processes is not None and processes.chosen.memory is not None
    assert processes.chosen.memory.budget_gib == pytest.approx(place("h200").budget_gib / 2), "they share the memory"


def test_links_are_known_by_name_and_number() -> None:
    assert find_link("PCIe4").gbs == 31.5 and find_link("25GB/s").gbs == find_link("25").gbs == 25
    assert LINKS["10gbe"].seconds(1.25e9, collectives=0, hops=0) == pytest.approx(1 / REACHED)
    for wrong in ("wifi", "0", "-3", "", "1e9"):
        with pytest.raises(UsageError):
            find_link(wrong)
    assert link_of(find_card("a100-40")).name == "nvlink3" and link_of(find_card("rtx3090")).name == "pcie4"
    assert link_of(find_card("h100-pcie")).name == "pcie5" and link_of(None).name == "pcie4"
    assert all(link_of(card) for card in CARDS.values())

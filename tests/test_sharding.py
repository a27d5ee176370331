"""What the plan says that a card holds, gathers and sends, against torch: `fully_shard` and what a team sends.

One process plays rank 0 of 2, 3, 4 or 8: with torch's "fake" process group every tensor is divided and every collective
is called as among real processes, and carries nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from training_kit import adapter

from benchmarks.model_configs import CONFIGS
from lora_tune.model.base import linear4bit_modules
from lora_tune.model.divided import divide, move_buffers
from lora_tune.model.footprint import Choice, Job, job_of, parts_gib
from lora_tune.model.scaling import exchanged
from lora_tune.model.sharding import gathered_units, held_adapter, held_base
from lora_tune.model.strategy import Layout
from lora_tune.model.zero3 import PartsOptimizer
from lora_tune.recipe import Base, Lora, Train
from lora_tune.training.state import OptimizerState, read_optimizer, write_optimizer
from lora_tune.training.team import Team

LORA = Lora(rank=4, alpha=8.0)


class Sent(TorchDispatchMode):
    """Bytes of the whole tensors of every collective, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {"gather": 0, "scatter": 0, "sum": 0}
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.calls += "c10d._allgather_base_" in name or "c10d._reduce_scatter_base_" in name
        if "c10d._allgather_base_" in name:
            self.bytes["gather"] += args[0].nbytes
        elif "c10d._reduce_scatter_base_" in name:
            self.bytes["scatter"] += args[1].nbytes
        elif "c10d.allreduce_" in name:
            self.bytes["sum"] += sum(tensor.nbytes for tensor in args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def first_of(world: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def job(folder: Path, strategy: Any, cards: int) -> Job:
    config = json.loads((folder / "config.json").read_text())
    base = Base(name="x", quantize="none", compute_dtype="float32")
    made = job_of(config, base=base, lora=LORA, train=Train(batch_size=4, max_length=8), device="cpu")
    return replace(made, layout=Layout(strategy, cards))


def backward(model: Any) -> Sent:
    ids = torch.arange(8)[None] + 4
    with Sent() as sent:
        model(input_ids=ids, labels=ids).loss.backward()
    return sent


@pytest.mark.parametrize("cards", [2, 3, 4, 8])
def test_a_card_holds_and_sends_what_the_divided_base_does(tiny_base: Path, cards: int) -> None:
    planned = job(tiny_base, "fsdp2", cards)
    with first_of(cards):
        model = adapter(tiny_base, lora=LORA)
        divide(model, device=torch.device("cpu"))
        held = {True: 0, False: 0}
        for parameter in model.parameters():
            local: Any = parameter.to_local()  # type: ignore[attr-defined]
            held[parameter.requires_grad] += local.nbytes
        sent = backward(model)
    norms = 5 * (-(-64 // cards) - 64 / cards) * 4  # the plan counts norms as evenly divided: 5 of 64 numbers here
    assert held[False] == pytest.approx(held_base(planned.shape, planned.base, element=4, cards=cards) + norms, abs=1)
    assert held[True] == 4 * held_adapter(planned.shape, LORA, cards=cards)
    parts = parts_gib(planned, Choice(1, 0, "adamw"))
    assert parts["adapters"] * 2**30 == pytest.approx(held[True])
    ring = (cards - 1) / cards
    planned_bytes, collectives, hops = exchanged(planned, accumulation=1)
    filled = ring * cards * norms * (2 * 4 + 1) / 5  # four norms stand in layers, which are gathered twice
    assert ring * (sent.bytes["gather"] + sent.bytes["scatter"]) == pytest.approx(planned_bytes + filled, rel=1e-9)
    assert hops == cards - 1 and collectives == sent.calls == 1 + 2 * 3  # layers gathered twice, gradients divided once


def test_ddp_sums_the_gradients_of_the_adapter_once(tiny_base: Path) -> None:
    """What the team of a run adds up after a step: the adapter's gradients, the loss, and which of them there are."""
    planned = job(tiny_base, "ddp", 2)
    with first_of(2):
        model = adapter(tiny_base, lora=LORA)
        assert sum(backward(model).bytes.values()) == 0
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        team = Team(rank=0, world=2, layout=Layout("ddp", 2), store=dist.HashStore())
        with Sent() as sent:
            team.add([*gradients, torch.zeros(()), torch.ones(len(gradients))])
    planned_bytes, _, hops = exchanged(planned, accumulation=8)
    summed = sent.bytes["sum"] - 4 * (1 + len(gradients))
    assert planned_bytes == 2 * 0.5 * summed and hops == 2  # a ring sends 2 (n - 1) / n of a sum
    alone = parts_gib(job(tiny_base, "single", 1), Choice(1, 0, "adamw"))
    together = parts_gib(planned, Choice(1, 0, "adamw"))
    assert together.pop("exchange") * 2**30 == summed
    assert together == alone


@pytest.mark.nightly
@pytest.mark.skipif("LORA_TUNE_ENGINES_REQUIRED" not in os.environ, reason="a quarter of a minute: make nightly")
def test_two_real_processes_send_the_same(tiny_base: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1]))),
    }
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "store"), str(tiny_base)],
            stdout=subprocess.PIPE, text=True, env=environment,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    found = [json.loads(process.communicate(timeout=200)[0]) for process in started]
    planned = job(tiny_base, "fsdp2", 2)
    sent, collectives, _ = exchanged(planned, accumulation=1)
    for one in found:
        assert one["bytes"]["gather"] + one["bytes"]["scatter"] == 2 * sent and one["calls"] == collectives
        assert one["held"] == held_base(planned.shape, planned.base, element=4, cards=2) + 4 * held_adapter(
            planned.shape, LORA, cards=2
        )


@pytest.mark.parametrize("quantize", ["nf4", "none"])
@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-70B"])
def test_shares_add_up_and_shrink(name: str, quantize: Any) -> None:
    base, lora = Base(name="x", quantize=quantize), Lora()
    shape = job_of(CONFIGS[name], base=base, lora=lora, train=Train(), device="cuda").shape
    whole = held_base(shape, base, element=2, cards=1)
    shares = [held_base(shape, base, element=2, cards=cards) for cards in (1, 2, 4, 8, 64)]
    assert shares == sorted(shares, reverse=True)
    for cards, share in zip((1, 2, 4, 8, 64), shares, strict=True):
        assert whole <= cards * share  # scales are on every card, and parts are filled up
        assert share <= whole / cards * (1.001 if quantize == "none" else 1 + 0.035 * cards)
    assert held_adapter(shape, lora, cards=1) <= 64 * held_adapter(shape, lora, cards=64)
    assert gathered_units(shape, base, lora, element=2) < whole


def test_published_bytes_of_two_cards() -> None:
    """fms-acceleration, scripts/benchmarks/refs/a100_80gb.csv: allocated after loading, rank 16 on q, k, v, o, FSDP."""
    lora = Lora(targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    llama_70b = CONFIGS["meta-llama/Llama-3.1-70B"] | {"vocab_size": 32_000}  # Llama 2: the same layers
    measured = {
        ("mistral", "none"): (CONFIGS["mistralai/Mistral-7B-v0.3"] | {"vocab_size": 32_000}, 7_850_391_552),
        ("llama-2-70b", "nf4"): (llama_70b, 19_172_741_120),
    }
    for (_, quantize), (config, allocated) in measured.items():
        base = Base(name="x", quantize=quantize)  # type: ignore[arg-type]
        shape = job_of(config, base=base, lora=lora, train=Train(), device="cuda").shape
        planned = held_base(shape, base, element=2, cards=2) + 4 * held_adapter(shape, lora, cards=2)
        assert planned == pytest.approx(allocated, rel=0.1)


if __name__ == "__main__":  # one of two real processes
    rank, store, base = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(store, 2))
    model = adapter(base, lora=LORA)
    divide(model, device=torch.device("cpu"))
    sent = backward(model)
    held = sum(parameter.to_local().nbytes for parameter in model.parameters())
    print(json.dumps({"bytes": sent.bytes, "calls": sent.calls, "held": held}), flush=True)
    dist.barrier()
    os._exit(0)


def test_the_scales_of_4_bit_weights_come_along_to_the_card(tiny_base: Path) -> None:
    """They are no buffers, and what divides a weight under zero3 moves its bytes alone."""
    model = adapter(tiny_base, base=Base(name=str(tiny_base), quantize="nf4", compute_dtype="float32"))
    move_buffers(model, torch.device("meta"))
    states = [module.weight.quant_state for _, module in linear4bit_modules(model)]
    assert states and {state.absmax.device.type for state in states} == {"meta"}
    assert {state.state2.absmax.device.type for state in states} == {state.offset.device.type for state in states}


def test_an_optimizer_of_parts_gets_its_step_count_on_the_card(tmp_path: Path) -> None:
    """A fused AdamW counts there; what a checkpoint holds is read into the machine's memory."""
    flat, parameter = torch.empty(4, device="meta"), torch.nn.Parameter(torch.empty(0, device="meta"))
    parameter.ds_shape = torch.Size([3])  # type: ignore[attr-defined]
    parts: Any = PartsOptimizer(None, torch.optim.SGD([parameter]), [{"params": [parameter]}])
    parts._place = lambda _: (flat, 0)
    parts.state = defaultdict(dict)
    groups = [{"count": 1}]
    held = OptimizerState({"0.step": torch.tensor(4.0)}, {"groups": groups, "numbers": {}, "on_cpu": []})
    paths = {"tensors": tmp_path / "o.safetensors", "text": tmp_path / "o.json"}
    write_optimizer(held, **paths)
    read_optimizer(parts, **paths)
    assert parts.state[flat]["step"].device.type == "meta"

"""Compiled decoder layers: the numbers of plain ones, one graph for all of them, nothing compiled outside training."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import training_kit as kit
from seldom import often

from lora_tune.errors import UsageError
from lora_tune.model import attention, missing
from lora_tune.model.base import checkpoint_layers
from lora_tune.model.kernels import compiled
from lora_tune.recipe import Base, Train


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("tiny") / "base", config={"num_hidden_layers": 4})


def gradients(model: Any, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, while it traces
@pytest.mark.parametrize("quantize", often(["nf4", "none"], kept=["nf4"]))
def test_gradients_are_those_of_plain_layers_from_one_graph_for_all(four_layers: Path, quantize: Any) -> None:
    """Two graphs for four layers: the first one's input needs no gradient. Traced whole, without the code generator."""
    from torch._dynamo.utils import counters

    base = Base(name=str(four_layers), quantize=quantize, compute_dtype="float32")
    model = kit.adapter(four_layers, base=base, spread=0.05).train()
    ids_BT = torch.randint(4, 260, (2, 12), generator=torch.Generator().manual_seed(2))
    own = gradients(model, ids_BT)
    torch._dynamo.reset()
    counters.clear()
    assert compiled.compile_layers(model, backend="aot_eager") == 4
    for layers in ("none", "all"):
        checkpoint_layers(model, layers)  # type: ignore[arg-type]
        found = gradients(model, ids_BT)
        assert found.keys() == own.keys()
        for name, gradient in found.items():
            assert float((gradient - own[name]).norm()) <= 1e-5 * float(own[name].norm()) + 1e-7
    assert counters["stats"]["unique_graphs"] <= 3 and not counters["graph_break"]
    graphs = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        model.eval()(input_ids=ids_BT[:, :5])
    assert counters["stats"]["unique_graphs"] == graphs  # an evaluation compiles nothing


def test_without_what_compiling_needs_it_is_refused(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match=r"train\.compile: layers cannot be compiled here: there is no C\+\+ compiler"):
        compiled.compile_layers(kit.adapter(tiny_base))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("attends", often(["varlen"], kept=[]))
def test_a_training_with_compiled_layers_has_the_losses_of_a_plain_one(
    four_layers: Path, tmp_path: Path, attends: Any
) -> None:
    """Through the code generator, over packed rows by document, in batches of one shape."""
    found = []
    for name in ("off", "layers"):
        train = Train(
            batch_size=4, micro_batch_size=2, max_steps=3, max_length=80, warmup=0, compile=name, kernels="off"
        )
        model = kit.adapter(four_layers, spread=0.05)
        attention.use_varlen(model, Base(name="x", attention=attends))
        trainer = kit.trainer(tmp_path / name, four_layers, kit.rows(10, pack=3), train=train, model=model)
        batch = next(iter(trainer.get_train_dataloader()))
        assert (batch["input_ids"].shape == (1, 160)) == (name == "layers")
        trainer.train()
        found.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_a_gpu_without_a_c_compiler_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton builds the code that starts its kernels with it, at the first step."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    (problem,) = missing.compiler_problems("cuda")
    assert "no C compiler" in str(problem)
    monkeypatch.setenv("CC", "/opt/cc")
    assert not list(missing.compiler_problems("cuda"))

"""The memory plan against real configurations, published numbers and the tensors that autograd really saves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_tune.errors import UsageError
from lora_tune.model import footprint, memory
from lora_tune.model.footprint import Choice
from lora_tune.model.memory import (
    plan_memory,
    trainable_parameters,
)
from lora_tune.model.shape import read_shape
from lora_tune.recipe import Base, Lora, Train

LLAMA_2 = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3 = LLAMA_2 | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
ONE = Train(micro_batch_size=1, packing=False, gradient_checkpointing="all", optimizer="adamw")


def plan(config: dict[str, Any], *, base: Base | None = None, lora: Lora | None = None, train: Train | None = None,
         gib: float = 1000.0, device: Any = "cuda") -> memory.MemoryPlan:  # fmt: skip
    return plan_memory(
        config, base=base or Base(name="x"), lora=lora or Lora(), train=train or Train(), budget_gib=gib, device=device
    )


def verified(corpus: Path) -> dict[str, dict[str, Any]]:
    """Name of the configuration folder -> what was measured of it."""
    found = json.loads((corpus / "data" / "VERIFIED.json").read_text())["configs"]
    return {name.removeprefix("configs/"): facts for name, facts in found.items()}


def test_parameters_of_real_configurations_are_counted_within_1_per_cent(corpus: Path) -> None:
    checked = 0
    for name, facts in verified(corpus).items():
        folder = corpus / "data" / "configs" / name
        shape = read_shape(json.loads((folder / "config.json").read_text()))
        assert shape.known, name
        if "params_tied" in facts:
            assert shape.parameters == pytest.approx(facts["params_tied"], rel=0.001), name
            checked += 1
        index = folder / "model.safetensors.index.json"
        if index.exists() and not facts.get("quant"):
            stored = json.loads(index.read_text())["metadata"]["total_size"] / 2
            assert shape.parameters == pytest.approx(stored, rel=0.01), name
            held = plan(
                json.loads((folder / "config.json").read_text()), base=Base(name="x", quantize="none"), train=ONE
            )
            assert held.parts_gib["weights"] * 2**30 == pytest.approx(2 * stored, rel=0.01), name
    assert checked >= 17


def test_weights_of_a_base_stored_in_8_bit_are_as_large_as_its_files(corpus: Path) -> None:
    folder = corpus / "data" / "configs" / "llama_h4096_l32_Llama-3.1-8B-Instruct_bnb-int8"
    stored = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    held = plan(json.loads((folder / "config.json").read_text()), train=ONE).parts_gib["weights"] * 2**30
    assert held == pytest.approx(stored, rel=0.01)


@pytest.mark.parametrize(
    ("config", "weights", "published"), [(LLAMA_2, 3.60, 5.7), (LLAMA_3, 5.31, 7.6)], ids=["Llama-2-7B", "Llama-3.1-8B"]
)
def test_worked_examples_of_7b_models(config: dict[str, Any], weights: float, published: float) -> None:
    """NF4, rank 16, 2,048 tokens, all layers checkpointed. The published sums have 16-bit adapters, ours float32; they
    add the loss head to the backward pass of a layer, where we take the larger of the two (0.2 GiB), and are of PEFT's
    own layers: fused ones need up to 0.2 GiB less."""
    train, lora, choice = ONE.model_copy(update={"max_length": 2048, "kernels": "off"}), Lora(), Choice(1, 32, "adamw")
    own, fused = (
        footprint._training(
            footprint.job_of(config, base=Base(name="x"), lora=lora, train=given, device="cuda"), choice
        )
        for given in (train, train.model_copy(update={"kernels": "auto"}))
    )
    peak = sum(own.values()) / 2**30
    assert 0 <= peak - sum(fused.values()) / 2**30 < 0.2
    found = plan(config, train=train)
    assert found.gradient_checkpointing == "all"
    assert found.parts_gib["weights"] == pytest.approx(weights, abs=0.01)
    wider_adapters = 3 * found.trainable_parameters * 2 / 2**30  # weights, gradients, and the copies of autocast
    assert peak - wider_adapters == pytest.approx(published - 0.1, rel=0.02)


def test_the_parts_add_up_and_have_the_names_that_are_recorded() -> None:
    found = plan(LLAMA_2)
    names = ["weights", "adapters", "gradients", "optimizer", "activations", "loss_head", "buffers", "runtime"]
    assert list(found.parts_gib) == names
    assert sum(found.parts_gib.values()) == pytest.approx(found.peak_gib)
    assert found.parameters == 6_738_415_616 and found.trainable_parameters == 39_976_960
    assert found.micro_batch_size * found.accumulation == 2


@pytest.mark.parametrize(
    ("targets", "count"),
    [("all-linear", 2 * 8 * (4 * 2 * 64 - 2 * 32 + 3 * 192)), (("q_proj", "self_attn.v_proj"), 2 * 8 * (128 + 96))],
)
def test_trainable_parameters_equal_those_that_peft_makes(tiny_base: Path, targets: Any, count: int) -> None:
    from lora_tune.model.base import load_base
    from lora_tune.model.methods import attach
    from lora_tune.model.source import find_base

    base = Base(name=str(tiny_base), quantize="none")
    source = find_base(base)
    for lora in (
        Lora(rank=8, targets=targets),
        Lora(rank=8, targets=targets, rank_pattern={"q_proj": 2}),
        Lora(rank=8, targets=targets, method="dora"),
        Lora(rank=8, targets=targets, modules_to_save=("lm_head",)),
    ):
        model = attach(load_base(source, base), lora, source=source, base=base, seed=0)
        real = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert trainable_parameters(read_shape(source.config), lora) == real, lora
    assert trainable_parameters(read_shape(source.config), Lora(rank=8, targets=targets)) == count


MORE = [
    (Train(max_length=4096), Train(max_length=2048)),
    (Train(micro_batch_size=2), Train(micro_batch_size=1)),
    (Train(micro_batch_size=1, gradient_checkpointing="none"), Train(micro_batch_size=1, gradient_checkpointing=16)),
    (Train(micro_batch_size=1, gradient_checkpointing=16), Train(micro_batch_size=1, gradient_checkpointing="all")),
    (Train(micro_batch_size=1), Train(micro_batch_size=1, packing=False)),
    (Train(micro_batch_size=1, kernels="off"), Train(micro_batch_size=1)),
    (Train(micro_batch_size=1, optimizer="adamw"), Train(micro_batch_size=1, optimizer="adamw_8bit")),
    (Train(micro_batch_size=1, optimizer="adamw_8bit"), Train(micro_batch_size=1, optimizer="sgd")),
]


@pytest.mark.parametrize(("more", "less"), MORE)
def test_what_needs_more_is_planned_with_more(more: Train, less: Train) -> None:
    ones = (
        train if train.micro_batch_size != "auto" else train.model_copy(update={"micro_batch_size": 1})
        for train in (more, less)
    )
    large, small = (plan(LLAMA_2, train=train).peak_gib for train in ones)
    assert large > small


def test_bases_and_adapters_that_need_more_are_planned_with_more() -> None:
    kinds: tuple[Any, ...] = ("nf4", "int8", "none")
    peaks = [plan(LLAMA_2, base=Base(name="x", quantize=kind), train=ONE).peak_gib for kind in kinds]
    assert peaks == sorted(peaks) and len(set(peaks)) == 3
    assert plan(LLAMA_2, base=Base(name="x", double_quant=False), train=ONE).peak_gib > peaks[0]
    wide = Base(name="x", compute_dtype="float32")
    assert plan(LLAMA_2, base=wide, train=ONE).peak_gib > peaks[0]
    for lora in (Lora(rank=64), Lora(dropout=0.05), Lora(method="dora"), Lora(modules_to_save=("lm_head",))):
        assert plan(LLAMA_2, lora=lora, train=ONE).peak_gib > peaks[0]


def test_experts_are_counted_as_they_are_held_unquantized() -> None:
    """transformers 5 holds the experts of a mixture as 3-D tensors: bitsandbytes leaves them in 16 bit."""
    mixture = LLAMA_3 | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000}
    shape = read_shape(mixture)
    assert shape.parameters == pytest.approx(46.7e9, rel=0.001)
    assert plan(mixture, train=ONE).parts_gib["weights"] > 2 * shape.expert_parameters / 2**30
    assert {linear.name for linear in shape.linears} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None}, "hidden_size or n_embd or d_model"),
        ({"vocab_size": -5}, "vocab_size"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers"),
        ({"intermediate_size": 10**12}, "intermediate_size"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_key_value_heads": 1.5}, "num_key_value_heads"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_one_line(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named) as caught:
        plan(LLAMA_2 | change)
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_architecture_is_counted_as_a_llama() -> None:
    shape = read_shape(LLAMA_2 | {"model_type": "brand_new"})
    assert not shape.known and shape.parameters == read_shape(LLAMA_2).parameters
    nested = read_shape({"model_type": "some_vl", "text_config": LLAMA_2, "tie_word_embeddings": False})
    assert nested.parameters == shape.parameters


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys, lora_tune.model.memory as m; m.device_budget();"
        "print({'torch', 'numpy', 'transformers', 'peft', 'datasets'} & set(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert found.stdout.strip() == "set()"

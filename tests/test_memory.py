"""The memory plan against real configurations, published numbers and the tensors that autograd really saves."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tune.errors import ResourceError, UsageError
from lora_tune.model import memory
from lora_tune.model.memory import (
    MARGIN,
    MOST_TOKENS,
    device_budget,
    plan_memory,
    saved_bytes_per_layer,
    trainable_parameters,
)
from lora_tune.model.shape import read_shape
from lora_tune.recipe import Base, Lora, Train

LLAMA_2 = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3 = LLAMA_2 | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
ONE = Train(micro_batch_size=1, packing=False)


def plan(config: dict[str, Any], *, base: Base | None = None, lora: Lora | None = None, train: Train | None = None,
         gib: float = 1000.0, device: str = "cuda") -> memory.MemoryPlan:  # fmt: skip
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
    """NF4, rank 16, 2,048 tokens, all layers checkpointed; the published sums have 16-bit adapters, ours float32."""
    found = plan(config, train=ONE)
    assert found.gradient_checkpointing == "all"
    assert found.parts_gib["weights"] == pytest.approx(weights, abs=0.01)
    wider_adapters = 3 * found.trainable_parameters * 2 / 2**30  # weights, gradients, and the copies of autocast
    assert found.peak_gib - wider_adapters == pytest.approx(published, rel=0.02)


def test_the_parts_add_up_and_have_the_names_that_are_recorded() -> None:
    found = plan(LLAMA_2)
    names = ["weights", "adapters", "gradients", "optimizer", "activations", "loss_head", "buffers", "runtime"]
    assert list(found.parts_gib) == names
    assert sum(found.parts_gib.values()) == pytest.approx(found.peak_gib)
    assert found.parameters == 6_738_415_616 and found.trainable_parameters == 39_976_960
    assert found.micro_batch_size * found.accumulation == 16


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


def saved_by_autograd(config: dict[str, Any], *, dtype: str, lora: Lora, documents: list[int], autocast: bool) -> int:
    """Bytes that one more decoder layer keeps for the backward pass, counted by saved-tensor hooks."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lora_tune.model.methods import attach, cast_inputs
    from lora_tune.model.source import BaseSource

    def total(layers: int) -> int:
        torch.manual_seed(0)
        settings_ = AutoConfig.for_model(**{**config, "num_hidden_layers": layers})
        model = AutoModelForCausalLM.from_config(settings_, dtype=getattr(torch, dtype))
        source = BaseSource(name="x", kind="local", folder=Path(), revision=None, config=settings_.to_dict())
        base = Base(name="x", quantize="none", compute_dtype=dtype)
        model = attach(model.requires_grad_(False), lora, source=source, base=base, seed=0).train()
        if autocast:
            cast_inputs(model, to="autocast")  # as training does
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        positions = torch.cat([torch.arange(length) for length in documents])[None]
        ids = torch.randint(0, 200, positions.shape)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                hidden = model.get_base_model().model(input_ids=ids, position_ids=positions, use_cache=False)
            assert hidden is not None
        trained = [tuple(p.shape) for p in model.parameters() if p.requires_grad]
        trained += [shape[::-1] for shape in trained]  # autocast's own copies of adapter weights do not count
        return sum(t.untyped_storage().nbytes() for t in kept.values() if tuple(t.shape) not in trained)

    return total(3) - total(2)


@pytest.mark.parametrize("documents", [[96], [40, 56]], ids=["one-document", "packed"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "element"), [("bfloat16", 2), ("float32", 4)])
def test_saved_activations_are_those_that_autograd_keeps(
    dtype: str, element: int, dropout: float, documents: list[int]
) -> None:
    tokens = sum(documents)
    for sizes in (
        {
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        {
            "hidden_size": 96,
            "intermediate_size": 128,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 64,
        },
    ):
        config = {**tiny.CONFIG, **sizes}
        lora = Lora(rank=4, dropout=dropout)
        real = saved_by_autograd(config, dtype=dtype, lora=lora, documents=documents, autocast=dtype == "bfloat16")
        planned = saved_bytes_per_layer(
            read_shape(config), tokens=tokens, element=element, lora=lora,
            row_length=tokens if len(documents) > 1 else None,
        )  # fmt: skip
        assert planned == pytest.approx(real, rel=0.03), sizes


SIZES = st.sampled_from([1, 2, 4, 6, 8, 12, 16, 32, 48, 64])


@given(
    batch=SIZES,
    length=st.sampled_from([128, 512, 2048, 8192, 32768]),
    gib=st.sampled_from([6.0, 8, 12, 16, 24, 80]),
    packing=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_the_micro_batch_is_the_largest_power_of_two_that_fits(
    batch: int, length: int, gib: float, packing: bool
) -> None:
    train = Train(batch_size=batch, max_length=length, packing=packing)
    try:
        found = plan(LLAMA_2, train=train, gib=gib)
    except ResourceError:
        with pytest.raises(ResourceError):
            plan(LLAMA_2, train=train.model_copy(update={"micro_batch_size": 1}), gib=gib)
        return
    micro = found.micro_batch_size
    assert micro.bit_count() == 1 and batch % micro == 0 and found.accumulation == batch // micro
    assert found.peak_gib <= MARGIN * gib
    assert not packing or micro == 1 or micro * length <= MOST_TOKENS
    assert plan(LLAMA_2, train=train.model_copy(update={"micro_batch_size": micro}), gib=gib).peak_gib == found.peak_gib
    if batch % (2 * micro) == 0 and (not packing or 2 * micro * length <= MOST_TOKENS):
        larger = plan(LLAMA_2, train=train.model_copy(update={"micro_batch_size": 2 * micro}))
        assert larger.peak_gib > MARGIN * gib


MORE = [
    (Train(max_length=4096), Train(max_length=2048)),
    (Train(micro_batch_size=2), Train(micro_batch_size=1)),
    (Train(micro_batch_size=1, gradient_checkpointing="none"), Train(micro_batch_size=1, gradient_checkpointing=16)),
    (Train(micro_batch_size=1, gradient_checkpointing=16), Train(micro_batch_size=1, gradient_checkpointing="all")),
    (Train(micro_batch_size=1), Train(micro_batch_size=1, packing=False)),
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
    kinds = ("nf4", "int8", "none")
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


def test_a_cpu_keeps_activations_and_a_gpu_recomputes_them() -> None:
    assert plan(LLAMA_2, train=ONE, device="cpu").gradient_checkpointing == "none"
    assert plan(LLAMA_2, train=ONE, device="cuda").gradient_checkpointing == "all"
    kept = Train(micro_batch_size=1, gradient_checkpointing=7)
    assert plan(LLAMA_2, train=kept).gradient_checkpointing == 7


@pytest.mark.parametrize(
    ("train", "base", "gib", "fix"),
    [
        (Train(micro_batch_size=16), Base(name="x"), 12.0, "set train.micro_batch_size: 1: about"),
        (Train(gradient_checkpointing="none"), Base(name="x"), 12.0, "set train.gradient_checkpointing: all: about"),
        (Train(), Base(name="x", quantize="none"), 12.0, "set base.quantize: nf4: about"),
        (Train(), Base(name="x"), 6.6, "set train.optimizer: adamw_8bit: about"),
        (Train(max_length=16384), Base(name="x"), 8.0, "and train.max_length: 2048: about"),
        (Train(), Base(name="x"), 2.0, "take a smaller base, or a device with"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_cheapest_change(train: Train, base: Base, gib: float, fix: str) -> None:
    with pytest.raises(ResourceError) as caught:
        plan(LLAMA_2, base=base, train=train, gib=gib)
    problem = caught.value.problems[0]
    assert caught.value.exit_code == 4 and problem.key and fix in problem.fix and "GiB" in problem.reason
    if problem.fix.startswith("set"):  # the change that is named must really fit
        names = dict(
            part.rsplit(": ", 1) for part in problem.fix.removeprefix("set ").rsplit(": about", 1)[0].split(" and ")
        )
        values = {key: int(value) if value.isdigit() else value for key, value in names.items()}
        train = train.model_copy(
            update={k.removeprefix("train."): v for k, v in values.items() if k.startswith("train.")}
        )
        base = base.model_copy(update={k.removeprefix("base."): v for k, v in values.items() if k.startswith("base.")})
        assert plan(LLAMA_2, base=base, train=train, gib=gib).peak_gib <= MARGIN * gib


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


def test_the_device_has_free_memory() -> None:
    device, gib = device_budget()
    assert device in ("cuda", "cpu") and 0.05 < gib < 10_000


def test_no_gpu_is_used_where_none_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert device_budget()[0] == "cpu"


class FakeNvml(types.ModuleType):
    """A driver with two cards of 10 and 20 GiB free; there is none on a machine without a GPU."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, driver: bool) -> None:
        super().__init__("pynvml")
        self.driver = driver

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("no driver")

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index > 1:
            raise self.NVMLError("no such card")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"GPU-b": 1}[uuid]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(free=(10 + 10 * handle) * 2**30)


@pytest.mark.parametrize(
    ("visible", "driver", "torch", "found"),
    [
        (None, True, "2.13.0", ("cuda", 10)),
        ("1,0", True, "2.13.0", ("cuda", 20)),
        ("GPU-b", True, "2.13.0", ("cuda", 20)),
        ("5", True, "2.13.0", "cpu"),
        (None, False, "2.13.0", "cpu"),
        (None, True, "2.13.0+cpu", "cpu"),
    ],
)
def test_the_first_visible_card_counts(
    visible: str | None, driver: bool, torch: str, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(driver=driver))
    monkeypatch.setattr(memory.importlib.metadata, "version", lambda name: torch)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_budget() == found if found != "cpu" else device_budget()[0] == "cpu"


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)
    free = device_budget()[1]
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("22345\n")
    (tmp_path / "memory.stat").write_text("anon 12345\ninactive_file 10000\n")
    assert device_budget()[1] == pytest.approx(free, rel=0.2)
    (tmp_path / "memory.max").write_text(f"{2**28 + 12345}\n")
    assert device_budget() == ("cpu", 0.25)


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys, lora_tune.model.memory as m; m.device_budget();"
        "print({'torch', 'numpy', 'transformers', 'peft', 'datasets'} & set(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert found.stdout.strip() == "set()"

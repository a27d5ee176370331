"""Adapter methods over architectures: they train, leave the base alone, and are saved as plain LoRA or DoRA."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lora_tune.errors import RecipeError, UsageError
from lora_tune.model.base import fit_embeddings, full_weight, load_base
from lora_tune.model.initialisation import (
    AnchoredLinear,
    StoredWeights,
    compact,
    input_directions,
    loftq_factors,
    olora_factors,
    pissa_factors,
)
from lora_tune.model.methods import (
    METHODS,
    SavedAdapter,
    adapter_state,
    attach,
    load_adapter_state,
    parameter_groups,
    saved_adapter,
)
from lora_tune.model.source import BaseSource, find_base
from lora_tune.recipe import Base, Lora, Train

# PEFT asks transformers by the old name; merges into 4 bit warn of what is measured here
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*may get different generations"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
]
SMALL = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 3,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=16, head_dim=16)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16, sliding_window=16)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    ),
}
ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
TARGETS = {name: sorted([*ATTENTION, "gate_proj", "up_proj", "down_proj"]) for name in ARCHITECTURES}
TARGETS |= {"phi3": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"], "mixtral": ATTENTION, "qwen3_moe": ATTENTION}
IDS = torch.arange(4, 36).reshape(2, 16)
BATCHES = [{"input_ids": IDS}]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of one-layer random bases, by architecture."""
    root = tmp_path_factory.mktemp("bases")
    for name, make in ARCHITECTURES.items():
        torch.manual_seed(5)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)  # logits far enough from uniform to tell a difference
        model.save_pretrained(root / name)
    return {name: root / name for name in ARCHITECTURES}


class Job:
    """One adapter on one base, trained for a few steps and written as the two files of PEFT."""

    def __init__(self, folder: Path, *, quantize: str = "none", dtype: str = "float32", **lora: Any) -> None:
        self.base = Base.model_validate({"name": str(folder), "quantize": quantize, "compute_dtype": dtype})
        self.source: BaseSource = find_base(self.base)
        self.lora = Lora.model_validate({"rank": 4, "alpha": 8.0, **lora})
        self.model = self.fresh()
        self.before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        with torch.no_grad():
            self.start = self.model(IDS).logits

    def fresh(self) -> Any:
        return load_base(self.source, self.base)

    def attach(self, start: SavedAdapter | None = None, seed: int = 3) -> Job:
        self.peft: Any = attach(
            self.model, self.lora, source=self.source, base=self.base, seed=seed, batches=BATCHES, start=start
        )
        return self

    def train(self, steps: int = 3, learning_rate: float = 5e-3, ids: torch.Tensor = IDS) -> list[float]:
        groups = parameter_groups(self.peft, lora=self.lora, train=Train(learning_rate=learning_rate))
        optimizer = torch.optim.AdamW(groups)
        losses = []
        self.peft.train()
        for _ in range(steps):
            loss = self.peft(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        self.peft.eval()
        return losses

    def logits(self) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.peft(IDS).logits
            return logits

    def saved(self) -> SavedAdapter:
        return saved_adapter(self.peft, lora=self.lora, source=self.source)

    def written(self, folder: Path) -> Path:
        return write(self.saved(), folder)


def write(adapter: SavedAdapter, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(adapter.config))
    save_file(adapter.tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def kl(left: torch.Tensor, right: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of two sets of logits, in nats per token."""
    p, q = left.double().log_softmax(-1), right.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


# --- the matrix: every method on every architecture


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "loftq"])
def test_in_full_precision_every_method_trains_reloads_and_merges_exactly(
    bases: dict[str, Path], tmp_path: Path, method: str, architecture: str
) -> None:
    job = Job(bases[architecture], method=method).attach()
    assert torch.allclose(job.logits(), job.start, atol=2e-5), "training starts from the base as it is"
    trainable = [name for name, parameter in job.peft.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    losses = job.train()
    assert losses[-1] < losses[0]
    trained = job.logits()
    assert (trained - job.start).abs().max() > 1e-3
    _check_base_untouched(job)

    folder = job.written(tmp_path / "adapter")
    config = job.saved().config
    assert config["target_modules"] == TARGETS[architecture]
    assert config["init_lora_weights"] is True and config["base_model_name_or_path"] == architecture
    assert config["r"] == (8 if METHODS[method].anchored else 4)
    reloaded: Any = PeftModel.from_pretrained(job.fresh(), str(folder)).eval()
    with torch.no_grad():
        assert torch.allclose(reloaded(IDS).logits, trained, atol=1e-5)
        assert torch.allclose(reloaded.merge_and_unload()(IDS).logits, trained, atol=1e-5)


def _check_base_untouched(job: Job) -> None:
    state = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): t for name, t in job.peft.state_dict().items()
    }
    for name, tensor in job.before.items():
        assert torch.equal(state[name], tensor), name
    with torch.no_grad(), job.peft.disable_adapter():
        assert torch.equal(job.peft(IDS).logits, job.start)


KL_OF_MERGING_NF4 = 0.06  # nats per token, 0.041 measured: a merge into 4 bit rounds the merged weight again


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3", "mixtral"])
@pytest.mark.parametrize("method", METHODS)
def test_on_nf4_every_method_trains_and_reloads_exactly_and_merges_within_a_stated_kl(
    bases: dict[str, Path], tmp_path: Path, method: str, architecture: str
) -> None:
    job = Job(bases[architecture], quantize="nf4", method=method).attach()
    if method != "loftq":  # which starts nearer to the full-precision base, on purpose
        assert torch.allclose(job.logits(), job.start, atol=2e-5)
    losses = job.train()
    assert losses[-1] < losses[0]
    trained = job.logits()
    _check_base_untouched(job)
    folder = job.written(tmp_path / "adapter")
    reloaded: Any = PeftModel.from_pretrained(job.fresh(), str(folder)).eval()
    with torch.no_grad():
        assert torch.allclose(reloaded(IDS).logits, trained, atol=1e-5)
        merged = reloaded.merge_and_unload()(IDS).logits
    assert kl(trained, merged) < KL_OF_MERGING_NF4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("quantize", ["fp4", "int8", "nf4"])
@pytest.mark.parametrize("method", ["lora", "pissa", "loftq"])
def test_other_quantizations_and_dtypes_reload_as_trained(
    tiny_base: Path, tmp_path: Path, method: str, quantize: str, dtype: str
) -> None:
    job = Job(tiny_base, quantize=quantize, dtype=dtype, method=method).attach()
    assert {parameter.dtype for parameter in job.peft.parameters() if parameter.requires_grad} == {torch.float32}
    losses = job.train()
    assert losses[-1] < losses[0]
    reloaded: Any = PeftModel.from_pretrained(job.fresh(), str(job.written(tmp_path))).eval()
    with torch.no_grad():
        difference = kl(job.logits(), reloaded(IDS).logits)
    assert difference < (1e-9 if dtype == "float32" else 1e-4)


# --- what is saved


@pytest.mark.parametrize(
    ("lora", "peft"),
    [
        ({}, {}),
        ({"method": "rslora"}, {"use_rslora": True}),
        ({"method": "dora"}, {"use_dora": True}),
        ({"modules_to_save": ("lm_head",)}, {"modules_to_save": ["lm_head"]}),
        (
            {"targets": ("q_proj", "mlp.up_proj"), "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3.0}},
            {
                "target_modules": ["q_proj", "mlp.up_proj"],
                "rank_pattern": {"q_proj": 2},
                "alpha_pattern": {"q_proj": 3},
            },
        ),
    ],
)
def test_files_are_those_that_peft_itself_would_write(
    tiny_base: Path, tmp_path: Path, lora: dict[str, Any], peft: dict[str, Any]
) -> None:
    job = Job(tiny_base, **lora).attach(seed=11)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS["llama"]), "task_type": "CAUSAL_LM", **peft}
    )
    with torch.random.fork_rng():
        torch.manual_seed(11)
        plain = get_peft_model(job.fresh(), config)
    plain.save_pretrained(str(tmp_path))
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = job.saved()
    expected = load_file(tmp_path / "adapter_model.safetensors")
    assert ours.tensors.keys() == expected.keys()
    assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in expected.items())
    theirs |= {"base_model_name_or_path": tiny_base.name, "target_modules": sorted(theirs["target_modules"])}
    assert json.loads(json.dumps(ours.config)) == theirs


def test_the_saved_config_is_in_order_and_without_paths(tiny_base: Path) -> None:
    config = Job(tiny_base, targets=("v_proj", "k_proj"), modules_to_save=("norm", "lm_head")).attach().saved().config
    assert list(config) == sorted(config)
    assert config["target_modules"] == ["k_proj", "v_proj"]
    assert config["modules_to_save"] == ["lm_head", "model.norm"]  # PEFT compares ends: `norm` is every norm to it
    assert (config["task_type"], config["inference_mode"], config["revision"]) == ("CAUSAL_LM", True, None)
    assert str(tiny_base.parent) not in json.dumps(config)


def test_tensors_are_contiguous_on_the_cpu_and_no_views_of_the_model(tiny_base: Path) -> None:
    job = Job(tiny_base, method="pissa").attach()
    tensors = job.saved().tensors
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    job.train()
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    assert all(t.is_contiguous() and t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_adapter_that_is_not_finite_is_not_saved(tiny_base: Path, value: float) -> None:
    job = Job(tiny_base).attach()
    next(p for n, p in job.peft.named_parameters() if "lora_B" in n).data[0, 0] = value
    with pytest.raises(UsageError, match=r"NaN or infinity.*lora_B.*training diverged"):
        job.saved()


def test_the_start_depends_on_the_seed_alone(tiny_base: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = Job(tiny_base).attach(seed=7).saved().tensors
    assert torch.equal(torch.get_rng_state(), before), "the global random state is left as it was"
    torch.manual_seed(2)
    second = Job(tiny_base).attach(seed=7).saved().tensors
    other = Job(tiny_base).attach(seed=8).saved().tensors
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


# --- names


def test_all_linear_leaves_out_the_head_and_is_saved_as_names(bases: dict[str, Path]) -> None:
    for architecture in ("llama", "phi3", "mixtral"):
        assert Job(bases[architecture]).attach().saved().config["target_modules"] == TARGETS[architecture]


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"targets": ("q_porj",)}, "lora.targets: .*q_porj.*did you mean q_proj"),
        ({"targets": ("lm_head",)}, "lora.targets: the output head"),
        ({"targets": ("embed_tokens",)}, "lora.targets: an embedding"),
        ({"rank_pattern": {"q_porj": 2}}, "lora.rank_pattern: .*q_porj"),
        ({"targets": ("q_proj",), "alpha_pattern": {"v_proj": 2.0}}, "lora.alpha_pattern: .*v_proj"),
        ({"modules_to_save": ("lm_haed",)}, "lora.modules_to_save: .*lm_haed"),
        ({"modules_to_save": ("mlp",)}, "lora.modules_to_save: .*adapter too"),
        ({"method": "pissa", "rank": 65}, "lora.rank: rank 65"),
        ({"method": "loftq"}, "lora.method: loftq"),
    ],
)
def test_names_that_match_nothing_are_refused_on_the_loaded_base_too(
    tiny_base: Path, lora: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        Job(tiny_base, **lora).attach()


def test_modules_trained_in_full_are_refused_where_their_dtype_cannot_be_trained(tiny_base: Path) -> None:
    with pytest.raises(RecipeError, match="a quantized layer cannot be trained in full"):
        Job(tiny_base, quantize="nf4", targets=("q_proj",), modules_to_save=("mlp",)).attach()
    with pytest.raises(RecipeError, match=r"float16 weights cannot be trained.*base.compute_dtype"):
        Job(tiny_base, dtype="float16", modules_to_save=("lm_head",)).attach()
    with pytest.raises(RecipeError, match="int8"):
        Job(tiny_base, quantize="int8", method="dora").attach()


def test_patterns_set_rank_and_scale_of_the_layers_they_name(tiny_base: Path) -> None:
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 6}, "alpha_pattern": {"down_proj": 3.0}}
    for method, factor in (("lora", 1), ("pissa", 2)):
        job = Job(tiny_base, method=method, **patterns).attach()
        ranks = {name: tensor.shape[0] for name, tensor in job.saved().tensors.items() if "lora_A" in name}
        assert {rank for name, rank in ranks.items() if "down_proj" in name} == {6 * factor}
        assert {rank for name, rank in ranks.items() if "0.self_attn.q_proj" in name} == {2 * factor}
        assert {rank for name, rank in ranks.items() if "1.self_attn.q_proj" in name} == {4 * factor}
        scales = {n: m.scaling["default"] for n, m in job.peft.named_modules() if hasattr(m, "lora_A")}
        assert {scale for name, scale in scales.items() if "down_proj" in name} == {0.5}
        assert {scale for name, scale in scales.items() if "1.self_attn.q_proj" in name} == {2.0}


# --- new tokens, modules trained in full, continuing


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_new_tokens_are_trained_and_nothing_else_of_the_embedding(
    tiny_base: Path, tmp_path: Path, quantize: str, tied: bool
) -> None:
    import shutil

    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    if tied:
        tensors = load_file(folder / "model.safetensors")
        tensors.pop("lm_head.weight")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    job = Job(folder, quantize=quantize, new_tokens=("<tool>", "<answer>")).attach()
    ids = torch.cat([torch.tensor([[260], [261]]), IDS], dim=1)
    first = adapter_state(job.peft)["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"].clone()
    losses = job.train(ids=ids)
    assert losses[-1] < losses[0]
    saved = job.saved()
    rows = {"embed_tokens": [260, 261]} | ({} if tied else {"lm_head": [260, 261]})
    assert saved.config["trainable_token_indices"] == rows
    delta = saved.tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert delta.shape == (2, 64) and not torch.equal(delta, first)
    assert not any(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in saved.tensors)
    with torch.no_grad():
        trained = job.peft(ids).logits
        model = job.fresh()
        fit_embeddings(model, 262)
        reloaded: Any = PeftModel.from_pretrained(model, str(write(saved, tmp_path / "adapter"))).eval()
        assert torch.allclose(reloaded(ids).logits, trained, atol=1e-5)
        if quantize == "none":
            assert torch.allclose(reloaded.merge_and_unload()(ids).logits, trained, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_an_adapter_is_continued_from_where_it_was(tiny_base: Path, method: str) -> None:
    first = Job(tiny_base, quantize="nf4", method=method).attach()
    first.train()
    then = Job(tiny_base, quantize="nf4", method=method).attach(start=first.saved(), seed=99)
    assert torch.equal(then.logits(), first.logits())
    losses = then.train()
    assert losses[-1] < losses[0]


def test_a_converted_adapter_is_continued_as_lora_of_twice_the_rank(tiny_base: Path) -> None:
    first = Job(tiny_base, quantize="nf4", method="pissa").attach()
    first.train()
    then = Job(tiny_base, quantize="nf4", rank=8, alpha=16.0).attach(start=first.saved())
    assert torch.allclose(then.logits(), first.logits(), atol=1e-5)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 8}, "lora.start_from: that adapter has r 4, not 8; set lora.rank"),
        ({"alpha": 4.0}, "lora.start_from: that adapter has lora_alpha 8, not 4; set lora.alpha"),
        ({"method": "rslora"}, "lora.start_from: that adapter is not rslora"),
        ({"method": "dora"}, "lora.start_from: that adapter is not dora"),
        ({"targets": ("q_proj",)}, "lora.start_from: that adapter does not fit.*4×128 there, absent here"),
        ({"modules_to_save": ("lm_head",)}, "lora.start_from: that adapter does not fit.*absent there, 260×64 here"),
        ({"rank_pattern": {"q_proj": 2}}, "lora.start_from: that adapter has rank_pattern"),
    ],
)
def test_an_adapter_that_does_not_fit_the_recipe_is_not_continued(
    tiny_base: Path, lora: dict[str, Any], words: str
) -> None:
    start = Job(tiny_base).attach().saved()
    with pytest.raises(RecipeError, match=words):
        Job(tiny_base, **lora).attach(start=start)


@pytest.mark.parametrize("lora", [{}, {"method": "dora"}, {"method": "pissa"}, {"modules_to_save": ("lm_head",)}])
def test_the_state_of_an_adapter_is_put_back_to_the_last_bit(tiny_base: Path, lora: dict[str, Any]) -> None:
    job = Job(tiny_base, quantize="nf4", **lora).attach()
    parameters = [id(parameter) for parameter in job.peft.parameters() if parameter.requires_grad]
    state = {name: tensor.clone() for name, tensor in adapter_state(job.peft).items()}
    before = job.logits()
    job.train()
    assert not torch.equal(job.logits(), before)
    load_adapter_state(job.peft, state)
    assert torch.equal(job.logits(), before)
    assert [id(parameter) for parameter in job.peft.parameters() if parameter.requires_grad] == parameters
    state.popitem()
    with pytest.raises(UsageError, match="1 tensors missing or unknown"):
        load_adapter_state(job.peft, state)


# --- LoRA+


@pytest.mark.parametrize("method", ["lora", "pissa", "dora"])
def test_lora_plus_gives_b_its_own_learning_rate(tiny_base: Path, method: str) -> None:
    job = Job(tiny_base, method=method, plus_ratio=16.0, new_tokens=("<a>",)).attach()
    names = {id(parameter): name for name, parameter in job.peft.named_parameters()}
    rates: dict[str, float] = {}
    decays: dict[str, float] = {}
    for group in parameter_groups(job.peft, lora=job.lora, train=Train(learning_rate=1e-4, weight_decay=0.1)):
        for parameter in group["params"]:
            rates[names[id(parameter)]] = group["lr"]
            decays[names[id(parameter)]] = group["weight_decay"]
    assert sorted(rates) == sorted(name for name, p in job.peft.named_parameters() if p.requires_grad)
    for name, rate in rates.items():
        assert rate == pytest.approx(1.6e-3 if ".lora_B." in name else 1e-4), name
        decayed = ".lora_A." in name or ".lora_B." in name
        assert decays[name] == (0.1 if decayed else 0.0), name


def test_without_lora_plus_all_matrices_are_one_group(tiny_base: Path) -> None:
    job = Job(tiny_base).attach()
    (group,) = parameter_groups(job.peft, lora=job.lora, train=Train(learning_rate=3e-4))
    assert (group["lr"], group["weight_decay"]) == (3e-4, 0.0)


# --- initial values


def _layer(job: Job) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Weight in the file, dequantized weight, A, B and scale of one adapted layer at the start."""
    layer = job.peft.base_model.model.model.layers[1].mlp.down_proj
    stored = load_file(job.source.folder / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    return stored, full_weight(layer.get_base_layer()), a, b, layer.scaling["default"]


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_pissa_and_olora_start_from_the_full_precision_weight(tiny_base: Path, quantize: str) -> None:
    stored, _, a, b, scale = _layer(Job(tiny_base, quantize=quantize, method="pissa").attach())
    left, values, right = torch.linalg.svd(stored)
    best = left[:, :4] @ torch.diag(values[:4]) @ right[:4]
    assert torch.allclose(scale * b[:, :4] @ a[:4], best, atol=0.02 * float(values[0]))  # anchors are kept in bfloat16
    assert torch.equal(a[:4], a[4:]) and torch.equal(b[:, :4], -b[:, 4:])
    stored, _, a, b, _ = _layer(Job(tiny_base, quantize=quantize, method="olora").attach())
    assert torch.allclose(b[:, :4].T @ b[:, :4], torch.eye(4), atol=0.02)
    assert torch.allclose(b[:, :4].T @ stored, a[:4], atol=0.05)


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_loftq_starts_nearer_to_the_full_precision_weight(tiny_base: Path, quantize: str) -> None:
    stored, quantized, a, b, scale = _layer(Job(tiny_base, quantize=quantize, method="loftq", rank=16).attach())
    assert (stored - quantized - scale * b @ a).norm() < 0.8 * (stored - quantized).norm()
    best = torch.linalg.svdvals(stored - quantized)[16:].norm()
    assert float((stored - quantized - scale * b @ a).norm()) == pytest.approx(float(best), rel=1e-4)


def test_eva_starts_from_the_directions_of_the_inputs(tiny_base: Path) -> None:
    job = Job(tiny_base, quantize="nf4", method="eva").attach()
    seen: list[torch.Tensor] = []
    layer = job.model.model.layers[1].mlp.down_proj
    with torch.no_grad(), job.peft.disable_adapter():
        hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].reshape(-1, 128)))
        job.peft(IDS)
        hook.remove()
    _, _, a, b, _ = _layer(job)
    right = torch.linalg.svd(seen[0])[2][:4]
    assert torch.allclose((a @ right.T).abs(), torch.eye(4), atol=1e-3) and not b.any()
    with pytest.raises(RecipeError, match="eva starts from training rows"):
        attach(job.fresh(), job.lora, source=job.source, base=job.base, seed=0)


def test_directions_of_many_batches_are_those_of_all_rows_and_padding_does_not_count() -> None:
    torch.manual_seed(0)

    class Pass(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(50, 12)
            self.q, self.k = torch.nn.Linear(12, 3), torch.nn.Linear(12, 3)

        def forward(self, input_ids: torch.Tensor, use_cache: bool = False, **_: Any) -> torch.Tensor:
            x = self.table(input_ids)
            return self.q(x) + self.k(x)

    model = Pass()
    with torch.no_grad():
        model.table.weight.mul_(torch.tensor([4.0, 3.0, 2.0, *[0.05] * 9]))
    ids = torch.randint(0, 50, (6, 4, 20))
    mask = (torch.rand(6, 4, 20) > 0.4).long()
    batches = [{"input_ids": i, "attention_mask": m, "labels": i} for i, m in zip(ids, mask, strict=True)]
    found = input_directions(model, {"q": 3, "k": 3}, batches)
    rows = model.table(ids[mask.bool()]).detach()
    right = torch.linalg.svd(rows, full_matrices=False)[2][:3]
    assert torch.equal(found["q"], found["k"])
    assert torch.allclose((found["q"] @ right.T).abs(), torch.eye(3), atol=2e-2)


def test_a_large_matrix_gets_nearly_the_best_approximation_too() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(1100, 8) @ torch.randn(8, 1200) + 0.02 * torch.randn(1100, 1200)
    a, b = pissa_factors(matrix, 8, 2.0)
    best = torch.linalg.svdvals(matrix)[8:].norm()
    assert float((matrix - 2 * b @ a).norm()) < 1.01 * float(best)
    a, b = olora_factors(matrix[:, :1100], 8, 2.0)
    assert (a.shape, b.shape) == ((8, 1100), (1100, 8))
    assert loftq_factors(matrix, 8, 1.0)[0].shape == (8, 1200)


SIZES = st.integers(1, 9)


@given(rank=st.integers(1, 5), rows=SIZES, columns=SIZES, seed=st.integers(0, 99), zero=st.booleans())
@settings(max_examples=60, deadline=None)
def test_compact_factors_have_the_same_product(rank: int, rows: int, columns: int, seed: int, zero: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(2 * rank, columns, generator=generator)
    b = torch.randn(rows, 2 * rank, generator=generator) * (0 if zero else 1)
    new_a, new_b = compact(a, b)
    assert (new_a.shape, new_b.shape) == (a.shape, b.shape)
    assert torch.allclose(new_b @ new_a, b @ a, atol=1e-5)


def test_a_saved_anchored_adapter_survives_16_bit() -> None:
    """The difference of two nearly equal parts would drown in bfloat16; the compact factors keep it."""
    torch.manual_seed(0)
    start, start_b = torch.randn(8, 64), torch.randn(48, 8)
    a, b = AnchoredLinear(start, dim=0), AnchoredLinear(start_b, dim=1)
    with torch.no_grad():
        a.trained.add_(1e-3 * torch.randn(8, 64))
        b.trained.add_(1e-3 * torch.randn(48, 8))
        update = b.weight @ a.weight

        def error(left: torch.Tensor, right: torch.Tensor) -> float:
            rounded = left.bfloat16().float() @ right.bfloat16().float()
            return float((rounded - update).norm() / update.norm())

        new_a, new_b = compact(a.weight, b.weight)
        assert error(new_b, new_a) < 0.01 < 0.3 < error(b.weight, a.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_anchored_pair_is_zero_at_the_start_in_every_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = AnchoredLinear(torch.randn(4, 32), dim=0), AnchoredLinear(torch.randn(16, 4), dim=1)
    for module in (a, b):  # as TRL casts the trainable parameters of a quantized base
        module.trained.data = module.trained.data.to(dtype)
    x = torch.randn(10, 32, dtype=dtype)
    scale = (a.trained @ x.T).abs().max() * b.trained.abs().max()
    assert b(a(x)).abs().max() <= (0 if dtype != torch.float32 else 1e-5) * scale + 1e-2 * (dtype != torch.float32)
    assert a.weight.dtype == b.weight.dtype == dtype
    assert [name for name, _ in a.named_parameters()] == ["trained"] and list(a.state_dict()) == ["weight"]


def test_a_weight_that_is_not_the_one_that_was_quantized_is_not_taken(tiny_base: Path) -> None:
    stored = StoredWeights(find_base(Base(name=str(tiny_base))))
    weight = load_file(tiny_base / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(stored.read(name, like=weight + 0.01), weight)
    assert torch.equal(stored.read(name.removeprefix("model."), like=weight), weight)
    for other, like in ((name, -weight), (name, weight[:32]), ("model.layers.7.self_attn.q_proj", weight)):
        with pytest.raises(UsageError, match="full-precision weight"):
            stored.read(other, like=like)

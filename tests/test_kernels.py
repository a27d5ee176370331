"""Fused functions against PEFT's own path: outputs, all gradients, what is saved, what falls back."""

from __future__ import annotations

import warnings
import weakref
from typing import Any, Literal

import pytest
import torch
from double_mlp import a_gated_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lora_tune.model.base import load_base
from lora_tune.model.kernels import readiness
from lora_tune.model.kernels.choice import Activation
from lora_tune.model.kernels.fuse import Fused, fuse
from lora_tune.model.kernels.probe import ACTIVATIONS
from lora_tune.model.kernels.projections import Frozen, GatedMlp, Projections
from lora_tune.model.kernels.rms_norm import RmsNorm
from lora_tune.model.kernels.rotary import Rotate
from lora_tune.model.methods import attach
from lora_tune.model.source import find_base
from lora_tune.recipe import Base, Lora

SMALL = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# family: what is found in two layers (qkv, mlp, single layers, norms, rotations)
FAMILIES: dict[str, tuple[int, int, int, int, int]] = {
    "llama": (2, 2, 2, 5, 2),
    "mistral": (2, 2, 2, 5, 2),
    "qwen2": (2, 2, 2, 5, 2),  # biases on q, k, v
    "qwen3": (2, 2, 2, 9, 2),  # norms of queries and keys
    "gemma": (2, 2, 2, 5, 2),  # GeGLU; weights of norms are 1 + w
    "gemma2": (2, 2, 2, 9, 2),  # and norms behind attention and MLP, soft-capped logits
    "phi3": (0, 2, 4, 5, 2),  # q, k and v of one layer, gate and up of another
    "glm4": (2, 2, 2, 9, 0),  # gate and up of one layer; pairs of neighbours are rotated
    "olmo2": (2, 2, 2, 9, 2),  # norms behind attention and MLP
    "starcoder2": (2, 0, 6, 0, 2),  # LayerNorm, an MLP without a gate
    "gpt_neox": (0, 0, 8, 0, 2),  # a quarter of each head is rotated
}


def adapted(
    family: str, *, dropout: float = 0.0, bias: Literal["none", "lora_only"] = "none", dora: bool = False
) -> Any:
    """A random model of a family with an adapter whose B is not zero, in training mode."""
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL))
    return with_adapter(base, dropout=dropout, bias=bias, dora=dora)


def with_adapter(base: Any, *, dropout: float = 0.0, bias: Any = "none", dora: bool = False, dtype: Any = None) -> Any:
    config = LoraConfig(
        r=4, lora_alpha=12, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=dora,
        lora_bias=bias == "lora_only", rank_pattern={"v_proj": 2, "up_proj": 7}, alpha_pattern={"k_proj": 3},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(base, config, autocast_adapter_dtype=dtype is None)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
        if dtype is not None and "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model.train()


def step(model: Any, *, autocast: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch."""
    model.zero_grad()
    ids = torch.randint(3, 96, (3, 17), generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a gradient."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_pefts(family: str) -> None:
    model = adapted(family)
    own = step(model)
    fused = fuse(model)
    assert (fused.qkv, fused.mlp, fused.linear, fused.norms, fused.rotations) == FAMILIES[family] and not fused.left
    loss, gradients = step(model)
    assert loss == pytest.approx(own[0], rel=1e-5) and distance(gradients, own[1]) < 1e-5
    fused.undo()
    assert step(model)[0] == own[0] and not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("quantize", ["nf4", "none"])
@pytest.mark.parametrize("kind", ["autocast", "same dtype"])
def test_in_bfloat16_it_is_as_near_to_float32_as_pefts_path(tiny_base: Any, quantize: Any, kind: str) -> None:
    """Adapters in float32 under autocast as in a run, or all in bfloat16; over the real 4-bit layers."""

    def model(dtype: Any) -> Any:
        base = Base(name=str(tiny_base), quantize=quantize, compute_dtype=dtype)
        torch.manual_seed(4)
        adapter = torch.bfloat16 if dtype == "bfloat16" and kind == "same dtype" else torch.float32
        return with_adapter(load_base(find_base(base), base), dtype=adapter)

    exact = step(model("float32"))[1]
    half = model("bfloat16")
    own = distance(step(half, autocast=kind == "autocast")[1], exact)
    fuse(half)
    found = distance(step(half, autocast=kind == "autocast")[1], exact)
    assert 0 < found <= 1.3 * own + 1e-3


SIZES = st.integers(1, 40)


@settings(max_examples=40)
@given(t=SIZES, h=SIZES, outs=st.lists(st.tuples(SIZES, st.integers(1, 9), st.booleans()), min_size=1, max_size=4),
       scale=st.floats(0.1, 4), unused=st.integers(0, 3), seed=st.integers(0, 99))  # fmt: skip
def test_projections_of_any_shape(
    t: int, h: int, outs: list[tuple[int, int, bool]], scale: float, unused: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, t, h, generator=draw, dtype=torch.float64, requires_grad=True)
    parts, factors, expected = [], [], []
    for out, rank, has_bias in outs:
        w = torch.randn(out, h, generator=draw, dtype=torch.float64)
        bias = torch.randn(out, generator=draw, dtype=torch.float64) if has_bias else None
        a = torch.randn(rank, h, generator=draw, dtype=torch.float64, requires_grad=True)
        b = torch.randn(out, rank, generator=draw, dtype=torch.float64, requires_grad=True)
        parts.append(Frozen(w.to, bias, scale))
        factors += [a, b]
        expected.append(nn.functional.linear(x, w, bias) + scale * (x @ a.T) @ b.T)
    found = Projections.apply(x, parts, torch.float64, *factors)
    used = [number for number in range(len(outs)) if number != unused] or [0]  # an output that the loss does not see
    grads = []
    for outputs in (expected, found):
        loss = torch.stack([outputs[number].cos().sum() for number in used]).sum()
        grads.append(torch.autograd.grad(loss, [x, *factors], allow_unused=True))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    for one, other, tensor in zip(*grads, [x, *factors], strict=True):
        zero = torch.zeros_like(tensor)  # of what the loss does not see
        torch.testing.assert_close(zero if other is None else other, zero if one is None else one)


@settings(max_examples=40)
@given(t=SIZES, h=SIZES, inner=SIZES, rank=st.integers(1, 9), seed=st.integers(0, 99),
       activation=st.sampled_from(ACTIVATIONS), joined=st.booleans())  # fmt: skip
def test_a_gated_mlp_of_any_shape(
    t: int, h: int, inner: int, rank: int, seed: int, activation: Activation, joined: bool
) -> None:
    """SwiGLU and GeGLU; gate and up from two layers, or the halves of what one gives."""
    mlp = a_gated_mlp(h, inner, rank, joined=joined, seed=seed)
    x = torch.randn(t, h, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)
    expected, factors = mlp.of(x, activation), mlp.factors
    found = GatedMlp.apply(x, mlp.parts, torch.float64, activation, *factors)
    torch.testing.assert_close(found, expected)
    both = [torch.autograd.grad(output.cos().sum(), [x, *factors]) for output in (expected, found)]
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=30)
@given(batch=st.integers(1, 3), heads=st.integers(1, 5), t=st.integers(1, 17), half=st.integers(1, 9),
       beyond=st.integers(0, 5), angles=st.sampled_from(["one row", "each row"]), seed=st.integers(0, 99))  # fmt: skip
def test_a_rotation_of_any_shape(
    batch: int, heads: int, t: int, half: int, beyond: int, angles: str, seed: int
) -> None:
    """Of a transposed view, and of part of a head."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, t, heads, 2 * half + beyond, generator=draw, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(1 if angles == "one row" else batch, t, 2 * half, generator=draw, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    heads_first = x.transpose(1, 2)
    first, second, rest = heads_first.split([half, half, beyond], dim=-1)
    turned = torch.cat([first, second], -1) * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    expected = torch.cat([turned, rest], dim=-1)
    before = x.detach().clone()
    found = Rotate.apply(heads_first, cos, sin)
    torch.testing.assert_close(found, expected)
    assert torch.equal(x.detach(), before)
    both = [torch.autograd.grad(output.cos().sum(), x)[0] for output in (expected, found)]
    torch.testing.assert_close(both[1], both[0])


@settings(max_examples=30)
@given(t=SIZES, h=SIZES, offset=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 99))
def test_a_norm_of_any_shape(t: int, h: int, offset: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, t, h, generator=draw, requires_grad=True)
    weight = torch.randn(h, generator=draw)
    expected = (offset + weight) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))
    found = RmsNorm.apply(x, weight, 1e-5, offset)
    torch.testing.assert_close(found, expected)
    both = [torch.autograd.grad(output.cos().sum(), x)[0] for output in (expected, found)]
    torch.testing.assert_close(both[1], both[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_over_more_rows_than_fit_the_cache(dtype: torch.dtype) -> None:
    """Its gradient comes block by block; the last block is smaller."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 1500, 48, generator=draw).to(dtype).requires_grad_()
    weight, gradient = torch.randn(48, generator=draw).to(dtype), torch.randn(2, 1500, 48, generator=draw).to(dtype)
    exact = x.detach().double().requires_grad_()
    expected = weight.double() * (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5))
    expected.backward(gradient.double())
    RmsNorm.apply(x, weight, 1e-5, 0.0).backward(gradient)
    assert x.grad is not None and exact.grad is not None
    torch.testing.assert_close(x.grad, exact.grad.to(dtype))


def saved_bytes(model: Any) -> int:
    """Bytes of activations that a forward pass keeps for the backward pass."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(3, 96, (2, 32), generator=torch.Generator().manual_seed(5))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = model(input_ids=ids, use_cache=False)
        assert outputs.logits.requires_grad
        return sum(kept.values())


def test_a_layer_keeps_twelve_h_four_i_four_kv_bytes_a_token() -> None:
    """In bfloat16: 12h + 4I + 4kv and some numbers for ranks and norms, where PEFT's path keeps 16h + 8I + 4kv."""
    found = []
    for layers in (2, 4):
        torch.manual_seed(3)
        config = AutoConfig.for_model("llama", **{**SMALL, "num_hidden_layers": layers})
        model = with_adapter(AutoModelForCausalLM.from_config(config).to(torch.bfloat16), dtype=torch.bfloat16)
        before = saved_bytes(model)
        fuse(model)
        found.append((before, saved_bytes(model)))
    tokens, h, inner, kv = 2 * 32, 48, 112, 24
    before, after = ((high - low) / 2 / tokens for low, high in zip(*found, strict=True))
    ranks_and_norms = (
        2 * (4 + 4 + 2 + 4 + 4 + 7 + 4) + 2 * 4 + 4 * 4
    )  # X Aᵀ of all seven, rstd, statistics of attention
    assert after <= 12 * h + 4 * inner + 4 * kv + ranks_and_norms
    assert before - after >= 4 * h + 4 * inner - ranks_and_norms


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"dora": True}, "another method"),
        ({"bias": "lora_only"}, "a bias of LoRA's own"),
    ],
)
def test_what_is_not_plain_keeps_pefts_path(options: dict[str, Any], reason: str) -> None:
    fused = fuse(adapted("llama", **options))
    assert (fused.qkv, fused.mlp, fused.linear) == (0, 0, 0)
    assert sum(fused.left.values()) == 14 and all(reason in key for key in fused.left)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_factors_that_are_made_of_two_keep_pefts_path(method: Any, tiny_base: Any) -> None:
    base = Base(name=str(tiny_base), quantize="none")
    source = find_base(base)
    model = attach(load_base(source, base), Lora(rank=2, method=method), source=source, base=base, seed=1).train()
    fused = fuse(model)
    assert (fused.qkv, fused.mlp, fused.linear) == (0, 0, 0) and set(fused.left) == {"another method than plain LoRA"}
    assert fused.norms and fused.rotations


def test_without_a_graph_and_with_adapters_off_the_path_is_pefts_to_the_bit() -> None:
    model, ids = adapted("qwen3"), torch.arange(3, 20)[None]

    def answers() -> list[torch.Tensor]:
        with torch.no_grad():
            found = [model(input_ids=ids).logits, model.eval()(input_ids=ids).logits]
            with model.disable_adapter():
                found.append(model(input_ids=ids).logits)
        model.train()
        with model.disable_adapter():
            found.append(model(input_ids=ids).logits.detach())
        return found

    before = answers()
    fused: Fused = fuse(model)
    assert all(torch.equal(one, other) for one, other in zip(before[:3], answers()[:3], strict=True))
    torch.testing.assert_close(answers()[3], before[3])  # norms are fused here, the adapter is not seen
    fused.undo()


def test_recomputed_layers_give_the_same_gradients() -> None:
    model = adapted("llama")
    fuse(model)
    plain = step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss, gradients = step(model)
    assert loss == plain[0] and distance(gradients, plain[1]) < 1e-5


def test_a_trained_norm_and_a_trained_base_layer_are_left_alone() -> None:
    model = adapted("llama")
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "layers.0.mlp.up_proj.base_layer.weight")):
            parameter.requires_grad_(True)
    own = step(model)
    fused = fuse(model)
    assert fused.norms == 0 and fused.mlp == 1 and fused.left["a trained base layer"] == 1
    assert distance(step(model)[1], own[1]) < 1e-5


class Gated(nn.Module):
    """A norm that takes a second input, as models with linear attention have them: needed, or left out to be asked."""

    def __init__(self, *, needed: bool) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(48), requires_grad=False), 1e-6
        self.forward = self.with_gate if needed else self.with_or_without  # type: ignore[assignment]

    def with_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return self.with_or_without(x) * gate.sigmoid()

    def with_or_without(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        x = x if gate is None else x * gate.sigmoid()
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class GatedNorms(nn.Module):
    """Both kinds, beside an ordinary norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([Gated(needed=True), Gated(needed=False), nn.RMSNorm(48, eps=1e-6)])
        self.norms[2].weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.norms[2](self.norms[1](self.norms[0](x, x), x))
        return found


def test_a_norm_with_a_second_input_keeps_its_own_path() -> None:
    model, x = GatedNorms(), torch.randn(3, 48, requires_grad=True)
    expected = model(x)
    fused = fuse(model)
    assert fused.norms == 1
    torch.testing.assert_close(model(x), expected)


def test_the_gated_norms_of_real_architectures_keep_their_path() -> None:
    from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    model = nn.ModuleList([BambaRMSNormGated(48, 48), Qwen3NextRMSNormGated(48)]).requires_grad_(False)
    assert fuse(model).norms == 0


def test_a_pass_that_ended_between_queries_and_keys_holds_no_memory_during_the_next() -> None:
    """Out of memory there: the step is repeated with a smaller micro-batch, beside the graph of what failed."""
    model = adapted("qwen3")
    fuse(model)
    first, second = (layer.self_attn.q_proj for layer in model.get_base_model().model.layers)
    x = torch.randn(2, 5, 48, requires_grad=True)
    held = weakref.ref(x)
    first(x)
    del x
    second(torch.randn(2, 5, 48, requires_grad=True))
    assert held() is None


def test_a_kernel_is_tried_outside_of_the_autocast_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first norm of a step is called under it, and what it is compared with must have its own dtype."""
    ones, cpu = torch.ones(2, 2), torch.device("cpu")
    monkeypatch.setitem(readiness.CHECKS, "product", lambda device, dtype: [(torch.full((2, 2), 2.0), ones @ ones)])
    pytest.importorskip("triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert readiness._tried("product", cpu, torch.float32) == ""

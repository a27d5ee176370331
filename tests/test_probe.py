"""What is asked of MLPs and norms before they are fused: what is not the plain thing, in any dtype, keeps its path."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_kernels import adapted, distance, step
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lora_tune.model.kernels import choice
from lora_tune.model.kernels.fuse import fuse
from lora_tune.model.kernels.probe import activation_of, offset_of

DTYPES = [torch.float32, torch.bfloat16]
Between = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Mlp(nn.Module):
    """A gated MLP with something between its layers, and something done to what it puts out."""

    def __init__(self, between: Between, after: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(32, 48, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(48, 32, bias=False)
        self.between, self.after = between, after or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.after(self.down_proj(self.between(self.gate_proj(x), self.up_proj(x))))
        return found


class Holder(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.mlp(x)
        return found


def with_adapters(mlp: nn.Module, dtype: torch.dtype) -> Any:
    config = LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(Holder(mlp).to(dtype), config).train()  # type: ignore[arg-type]


def silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return nn.functional.silu(gate) * up


OTHERS: dict[str, tuple[Between, nn.Module | None]] = {
    "both limited to 10": (lambda gate, up: silu(gate.clamp(max=10), up.clamp(-10, 10)), None),
    "the product limited to 1e4": (lambda gate, up: silu(gate, up).clamp(-1e4, 1e4), None),
    "gelu by erf": (lambda gate, up: nn.functional.gelu(gate) * up, None),
    "quick gelu": (lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up, None),
    "silu of 1.01 times": (lambda gate, up: nn.functional.silu(1.01 * gate) * up, None),
    "gate and up exchanged": (lambda gate, up: silu(up, gate), None),
    "dropout behind it": (silu, nn.Dropout(0.1)),
    "a factor behind it": (silu, nn.Softplus()),
    "dropout in between": (lambda gate, up: nn.functional.dropout(silu(gate, up), 0.1, training=True), None),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OTHERS)
def test_an_mlp_that_computes_something_else_is_left_alone(name: str, dtype: torch.dtype) -> None:
    model = with_adapters(Mlp(*OTHERS[name]), dtype)
    fused = fuse(model)
    assert fused.mlp == 0 and fused.linear == 3 and sum(fused.left.values()) == 1, "and that is said"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plain_one_is_found_and_asking_leaves_no_trace(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever computes the training: a kernel that rounds otherwise in the last bit decides nothing."""
    monkeypatch.setattr(choice, "gated", lambda gate, up, activation: 1 / 0)
    model = with_adapters(Mlp(silu, nn.Dropout(0.0)), dtype)
    mlp = model.get_base_model().mlp
    model.eval()
    mlp.gate_proj.train()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert activation_of(mlp, [mlp.gate_proj, mlp.up_proj, mlp.down_proj]) == "silu"
    assert modes == [module.training for module in model.modules()] and torch.equal(state, torch.get_rng_state())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("weight", [0.0, 1.0, 24.0, 26.0, 250.0])
@pytest.mark.parametrize(("kind", "offset"), [(LlamaRMSNorm, 0.0), (Gemma3RMSNorm, 1.0)])
def test_the_offset_of_a_norm_is_found_whatever_its_weight_and_dtype(
    kind: Any, offset: float, weight: float, dtype: torch.dtype
) -> None:
    norm = kind(64).to(dtype).requires_grad_(False)
    norm.weight.fill_(weight)
    assert offset_of(norm, norm.weight, 1e-6) == offset
    assert bool((norm.weight == weight).all())


def test_a_norm_with_another_epsilon_or_another_mean_is_none_of_them() -> None:
    norm = LlamaRMSNorm(64).requires_grad_(False)
    assert offset_of(norm, norm.weight, 1e-5) is None
    assert offset_of(nn.LayerNorm(64, eps=1e-6), nn.Parameter(torch.ones(64)), 1e-6) is None


def test_a_model_that_drops_part_of_an_mlp_goes_on_doing_so() -> None:
    """Seed-OSS has dropout behind its MLP unless it is told otherwise; the rest of its layers is fused."""
    model = adapted("seed_oss")
    torch.manual_seed(1)
    own = step(model)
    fused = fuse(model)
    assert fused.mlp == 0 and fused.qkv == 2
    torch.manual_seed(1)
    assert distance(step(model)[1], own[1]) < 1e-5
    fused.undo()
    for layer in model.get_base_model().model.layers:
        layer.mlp.residual_dropout = 0.0
    assert fuse(model).mlp == 2

"""The loss head that forms its gradient in the forward pass, against full logits: losses, gradients, what it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_kit as kit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from lora_tune.data.chat_template import TokenRow
from lora_tune.evaluation.losses import row_losses
from lora_tune.model import footprint
from lora_tune.model.kernels import choice, loss_tile
from lora_tune.model.kernels.loss_head import Head, find_head, summed, token_losses
from lora_tune.recipe import Lora, Train
from lora_tune.training.loss import summed_loss, trained_positions

SMALL = {
    "vocab_size": 211, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
# family: its own settings, and the head that is found: softcap and multiplier, None for all logits
FAMILIES: dict[str, tuple[dict[str, Any], tuple[float, float] | None]] = {
    "llama": ({}, (0.0, 1.0)),
    "qwen2": ({"tie_word_embeddings": True}, (0.0, 1.0)),
    "gemma2": ({"final_logit_softcapping": 7.0}, (7.0, 1.0)),
    "cohere": ({"logit_scale": 0.25}, (0.0, 0.25)),
    "granite": ({"logits_scaling": 8.0}, (0.0, 0.125)),
    "phi": ({}, (0.0, 1.0)),  # a head with a bias
}


def full_logits(head: Head, hidden_BTH: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """The definition, in float32 from whatever the head gives."""
    z = head.layer(hidden_BTH).float() * head.multiplier
    z = torch.tanh(z / head.softcap) * head.softcap if head.softcap else z
    return functional.cross_entropy(z[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), reduction="sum")


@settings(max_examples=60)
@given(batch=st.integers(1, 4), length=st.integers(1, 9), size=st.integers(1, 33), vocabulary=st.integers(2, 300),
       softcap=st.sampled_from([0.0, 2.0, 30.0]), multiplier=st.sampled_from([1.0, 0.125, 3.0]), bias=st.booleans(),
       trained=st.floats(0, 1), tile=st.sampled_from([1, 1000, 2**26]), seed=st.integers(0, 999))  # fmt: skip
def test_losses_and_gradients_are_those_of_full_logits(
    batch: int, length: int, size: int, vocabulary: int, softcap: float, multiplier: float, bias: bool,
    trained: float, tile: int, seed: int,
) -> None:  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    layer = nn.Linear(size, vocabulary, bias=bias).requires_grad_(False)
    layer.weight.copy_(torch.randn(vocabulary, size, generator=draw))
    head = Head(layer, softcap, multiplier)
    hidden = torch.randn(batch, length, size, generator=draw)
    labels = torch.randint(0, vocabulary, (batch, length), generator=draw)
    labels[torch.rand(batch, length, generator=draw) > trained] = -100
    own, reference = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(footprint._LOSS_TILE, "cpu", tile)
        patch.setitem(footprint.LOSS_BLOCK, "cpu", tile)
        loss = summed(own, head, *trained_positions(labels))
    expected = full_logits(head, reference, labels)
    (loss / 7).backward()
    (expected / 7).backward()
    assert own.grad is not None and reference.grad is not None
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.grad, reference.grad, rtol=1e-5, atol=1e-5 * float(reference.grad.abs().max()))
    with torch.no_grad():
        predicts, targets = trained_positions(labels)
        torch.testing.assert_close(summed(own, head, predicts, targets), loss.detach())
        each = token_losses(own.flatten(0, 1)[predicts], head, targets)
        torch.testing.assert_close(each.sum(), loss.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bit_it_is_as_near_to_float32_as_full_logits(dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(5)
    layer = nn.Linear(64, 1000, bias=False).requires_grad_(False)
    hidden, labels = torch.randn(2, 40, 64), torch.randint(0, 1000, (2, 40))
    exact = hidden.clone().requires_grad_()
    full_logits(Head(layer), exact, labels).backward()
    layer = layer if autocast else layer.to(dtype)
    distances, where = [], trained_positions(labels)
    for compute in (lambda x: full_logits(Head(layer), x, labels), lambda x: summed(x, Head(layer), *where)):
        x = hidden.clone().to(torch.float32 if autocast else dtype).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=autocast):
            loss = compute(x)
        loss.backward()
        assert x.grad is not None and exact.grad is not None and x.grad.dtype == x.dtype
        distances.append(float((x.grad.float() - exact.grad).norm() / exact.grad.norm()))
    assert 0 < distances[1] <= 1.2 * distances[0]


def test_a_loss_far_beyond_what_float32_holds_as_a_probability_is_exact() -> None:
    logits = torch.tensor([[0.0, 500.0, 3.0], [0.0, 1.0, 2.0]])
    losses = loss_tile.loss_tile(logits, torch.tensor([0, 0]))
    torch.testing.assert_close(losses, torch.tensor([500.0, 2.4076059]))
    torch.testing.assert_close(logits[0], torch.tensor([-1.0, 1.0, 0.0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_of_a_family_is_found_and_its_loss_is_the_models(family: str) -> None:
    own, expected = FAMILIES[family]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL | own)).requires_grad_(False)
    head = find_head(model)
    assert (head and (head.softcap, head.multiplier)) == expected and head is not None
    ids = torch.randint(3, 200, (2, 12))
    labels = torch.where(torch.rand(2, 12) < 0.6, ids, -100)
    embedded = torch.randn(2, 12, 32, requires_grad=True)
    gradients = []
    for found in (head, None):
        total, _ = summed_loss(model, {"inputs_embeds": embedded, "labels": labels}, layer=head.layer, head=found)
        gradients.append((total, *torch.autograd.grad(total, embedded)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_a_model_that_does_something_else_to_its_logits_gives_them_itself() -> None:
    class Shifted(nn.Module):
        """A model after whose head one token is forbidden."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL)).requires_grad_(False)
            self.config = self.inner.config
            self.get_output_embeddings = self.inner.get_output_embeddings

        def forward(self, **inputs: Any) -> Any:
            outputs = self.inner(**inputs)
            outputs.logits[..., 7] = -1e4
            return outputs

    assert find_head(Shifted()) is None


@pytest.mark.parametrize(("lora", "found"), [
    (Lora(rank=2), True),
    (Lora(rank=2, modules_to_save=("lm_head",)), False),
    (Lora(rank=2, new_tokens=("<new>",)), False),
])  # fmt: skip
def test_a_head_that_is_trained_gives_all_logits(tiny_base: Path, lora: Lora, found: bool) -> None:
    model = kit.adapter(tiny_base, lora=lora)
    assert (find_head(model) is not None) == found


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_with_kernels_off_a_step_and_an_evaluation_use_none(
    tiny_base: Path, tmp_path: Path, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []

    def tile(logits: torch.Tensor, targets: torch.Tensor, **what: float) -> torch.Tensor:
        used.append("kernel")
        return loss_tile.loss_tile(logits, targets, **what)

    monkeypatch.setattr(choice, "loss_tile", tile)
    train = Train(batch_size=2, micro_batch_size=2, max_steps=1, kernels=kernels)
    trainer = kit.trainer(tmp_path, tiny_base, kit.rows(4, pack=2), train=train)
    trainer.train()
    assert bool(used) == (kernels == "auto")
    used.clear()
    row = TokenRow(np.array([3, 4, 5], np.int32), np.array([False, True, True]), 0, "", 1, frozenset())
    row_losses(trainer.model, [row], pad_id=0)
    assert not used, "an evaluation is computed as it will be elsewhere"

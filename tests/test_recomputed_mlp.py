"""The MLP of a recomputed layer: the gradients of PEFT's path, in pieces, with fewer products and less memory."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any, Literal

import pytest
import torch
from double_mlp import a_gated_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import FAMILIES, SIZES, SMALL, adapted, distance, step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_tune.model import pieces
from lora_tune.model.base import checkpoint_layers
from lora_tune.model.kernels import recomputed_mlp as recomputed
from lora_tune.model.kernels.choice import Activation
from lora_tune.model.kernels.fuse import fuse
from lora_tune.model.kernels.probe import ACTIVATIONS

TOKENS = 3 * 17  # of the batch that `step` takes
WIDTH = SMALL["intermediate_size"]
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.linear)


def checkpointed(model: Any, layers: Literal["all", "none"] | int = "all") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint_layers(model, layers)
    return model


@pytest.fixture(params=["whole", "in pieces"])
def how_many(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "in pieces":
        monkeypatch.setattr(pieces, "PIECE_BYTES", 4 * WIDTH * 20)  # three of 17 tokens
    return str(request.param)


@settings(max_examples=40)
@given(t=SIZES, h=SIZES, inner=SIZES, rank=st.integers(1, 9), piece=st.integers(1, 45), seed=st.integers(0, 99),
       activation=st.sampled_from(ACTIVATIONS), joined=st.booleans(),
       asked=st.sampled_from(["all", "x", "factors"]))  # fmt: skip
def test_an_mlp_of_any_shape_in_any_pieces(
    t: int, h: int, inner: int, rank: int, piece: int, seed: int, activation: Activation, joined: bool, asked: str
) -> None:
    mlp = a_gated_mlp(h, inner, rank, joined=joined, seed=seed)
    x = torch.randn(2, t, h, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x.requires_grad_(asked != "factors")
    factors = [factor.requires_grad_(asked != "x") for factor in mlp.factors]
    expected = mlp.of(x, activation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", 8 * inner * piece)
        found = recomputed.recomputed_mlp(
            x, mlp.parts, torch.float64, activation=activation, factors=factors, place=recomputed.Place()
        )
        torch.testing.assert_close(found, expected)
        wanted = [tensor for tensor in (x, *factors) if tensor.requires_grad]
        both = [torch.autograd.grad(output.cos().sum(), wanted) for output in (expected, found)]
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", [family for family, found in FAMILIES.items() if found[1]])
def test_loss_and_gradients_are_pefts(family: str, how_many: str) -> None:
    """Norms behind the MLP, too (gemma2, glm4, olmo2), which need what it puts out when the layer is recomputed."""
    model = adapted(family)
    own = step(model)
    fuse(checkpointed(model))
    loss, gradients = step(model)
    assert loss == pytest.approx(own[0], rel=1e-5) and distance(gradients, own[1]) < 1e-5


def test_in_one_piece_a_layer_that_is_recomputed_has_the_bits_of_one_that_is_kept() -> None:
    """Nobody asks for the gradient of the embeddings, with layers recomputed as without."""
    model = adapted("llama")
    fuse(model)
    kept = step(model)
    found = step(checkpointed(model))
    assert found[0] == kept[0] and all(torch.equal(found[1][name], kept[1][name]) for name in kept[1])
    assert not model.get_input_embeddings()(torch.tensor([3])).requires_grad


def reads(model: Any) -> Counter[str]:
    """How many products with each frozen weight of the first layer's MLP a step computes."""
    found: Counter[str] = Counter()
    layers = dict(model.get_base_model().model.layers[0].mlp.named_children()).items()
    weights = {layer.base_layer.weight.data_ptr(): name for name, layer in layers if hasattr(layer, "base_layer")}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.overloadpacket in PRODUCTS:
                tensors = [tensor for tensor in args if isinstance(tensor, torch.Tensor)]
                found.update(weights[at] for at in {tensor.data_ptr() for tensor in tensors} & weights.keys())
            return function(*args, **(kwargs or {}))

    with Watch():
        step(model)
    return found


@pytest.mark.parametrize(
    ("family", "first", "later"),
    [("llama", (3, 3, 2), (3, 3, 2)), ("phi3", (3, 2), (3, 2)), ("gemma2", (4, 4, 3), (3, 3, 3))],
)
def test_no_product_of_the_mlp_is_computed_with_the_layer(
    family: str, first: tuple[int, ...], later: tuple[int, ...]
) -> None:
    """Gate and up three times (forward, again, gradient), down twice; all three with the layer where a norm follows."""
    model = checkpointed(adapted(family))
    fuse(model)
    own = step(checkpointed(adapted(family), "none"))
    for expected in (first, later, later):
        found = reads(model)
        assert sorted(found.values(), reverse=True) == sorted(expected, reverse=True)
        assert found["down_proj"] == expected[-1]
    assert distance(step(model)[1], own[1]) < 1e-5


def test_passes_whose_backward_passes_come_later_do_not_change_each_others_way() -> None:
    """Two graphs of a model with a norm behind its MLP: what is learned in the first must not change the second."""
    model = checkpointed(adapted("gemma2"))
    fuse(model)
    ids = torch.randint(3, 96, (2, 9))
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for _ in range(2)]
    for loss in losses:
        loss.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for _ in range(2):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    apart = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert distance(together, apart) < 1e-5


def largest(model: Any, *, of: Literal["step", "evaluation"]) -> int:
    """The most elements of a tensor as wide as the MLP that is made."""
    found = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(made):
                if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == WIDTH:
                    rows = tensor.numel() // WIDTH
                    found[0] = max(found[0], tensor.numel() if rows != 48 and rows != 4 else 0)  # not the weights
            return made

    with Watch():
        if of == "step":
            step(model)
        else:
            with torch.no_grad():
                model(input_ids=torch.randint(3, 96, (3, 17)), use_cache=False)
    return found[0]


@pytest.mark.parametrize("of", ["step", "evaluation"])
def test_what_is_as_wide_as_the_mlp_does_not_grow_with_the_sequences(
    of: Literal["step", "evaluation"], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpointed(adapted("llama"))
    fuse(model)
    assert largest(model, of=of) == TOKENS * WIDTH
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4 * WIDTH * 10)
    assert largest(model, of=of) == 9 * WIDTH


@pytest.mark.parametrize("family", FAMILIES)
def test_an_evaluation_in_pieces_has_pefts_numbers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Projections, MLPs and norms; bit by bit where everything is one piece."""
    model = adapted(family).eval()
    ids = torch.randint(3, 96, (3, 17), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        own = model(input_ids=ids).logits
        fuse(model)
        assert torch.equal(model(input_ids=ids).logits, own)
        monkeypatch.setattr(pieces, "PIECE_BYTES", 4 * WIDTH * 10)
        torch.testing.assert_close(model(input_ids=ids).logits, own)


def test_the_rows_of_an_evaluation_with_several_adapters_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT is told the adapter of each row: a piece of the tokens has no rows."""
    model = adapted("llama").eval()
    ids = torch.randint(3, 96, (2, 17))
    with torch.no_grad():
        own = model(input_ids=ids, adapter_names=["default", "__base__"]).logits
        fuse(model)
        monkeypatch.setattr(pieces, "PIECE_BYTES", 4 * WIDTH * 10)
        layer = model.get_base_model().model.layers[0].self_attn.o_proj
        x = torch.randn(2, 17, 48)
        found = layer(x, adapter_names=["default", "__base__"])
        torch.testing.assert_close(found[1], layer.base_layer(x[1]))
        assert not torch.allclose(found[0], layer.base_layer(x[0]))
    assert own.shape == (2, 17, 96)

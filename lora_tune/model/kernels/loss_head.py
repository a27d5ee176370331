"""The loss of a step from the last hidden states, without the logits of all tokens and without computing them twice.

The head W (V, h) is frozen. For a tile of trained tokens the logits x Wᵀ are computed, become their own gradient
softmax − one(target) in place (`loss_tile.py`), and that times W is dX at once: 4·V·h products for each token and the
memory of one tile, where logits that are kept need their float32 copy and its gradient as well, and those that are
computed again 6·V·h. Tokens that are not trained are left out of all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lora_tune.model.footprint import loss_tile_tokens
from lora_tune.model.kernels import choice
from lora_tune.model.kernels import loss_tile as plain_loss

_LIFT = 1024.0  # float16 holds no probability below 6e-8: the gradient of the logits is that much larger there
_SAME = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative, of what is done to logits
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # of the logits, in a configuration
_DIVISORS = ("logits_scaling",)


@dataclass(frozen=True, slots=True)
class Head:
    """A frozen output layer, and what the model does to its logits: softcap · tanh(multiplier · z / softcap).

    `kernels` off: PyTorch computes the loss on every device.
    """

    layer: nn.Linear
    softcap: float = 0.0
    multiplier: float = 1.0
    kernels: Literal["auto", "off"] = "auto"

    def losses_of(self, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """Cross-entropy (N, nats, float32) of a tile of logits, which become their own gradient."""
        tile = choice.loss_tile if self.kernels == "auto" else plain_loss.loss_tile
        return tile(logits_NV, targets_N, softcap=self.softcap, multiplier=self.multiplier)


class SummedLoss(torch.autograd.Function):
    """`SummedLoss.apply(hidden, head, predicts, targets, dtype, keep)`: cross-entropy (nats, float32), summed.

    `hidden` (B, T, h) are the inputs of the head, `predicts` (N) the positions in its B·T tokens that are trained,
    `targets` (N) the tokens that follow them. Products are computed in `dtype`. The gradient of `hidden` is ready
    when the forward pass ends; `keep` says whether it will be asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_BTH: torch.Tensor,
        head: Head,
        predicts_N: torch.Tensor,
        targets_N: torch.Tensor,
        dtype: torch.dtype,
        keep: Literal["gradient", "nothing"],
    ) -> torch.Tensor:
        """The sum over the trained tokens."""
        with torch.autocast(hidden_BTH.device.type, enabled=False):
            x_NH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1]).index_select(0, predicts_N).to(dtype)
            weight_VH, bias = head.layer.weight.to(dtype), head.layer.bias
            bias_V = None if bias is None else bias.to(dtype)
            dx_NH = x_NH  # each tile of x is read before its gradient takes its place
            lift = _LIFT if dtype == torch.float16 else 1.0
            total = torch.zeros((), dtype=torch.float32, device=x_NH.device)
            wide = 4 + dtype.itemsize if lift > 1 else dtype.itemsize
            step = loss_tile_tokens(len(x_NH), len(weight_VH), element=wide, device=x_NH.device.type)
            for start in range(0, len(x_NH), step):
                tile = slice(start, start + step)
                logits_NV = nn.functional.linear(x_NH[tile], weight_VH, bias_V)
                d_NV = logits_NV.float() if lift > 1 else logits_NV
                losses_N = head.losses_of(d_NV, targets_N[tile])
                total += losses_N.sum()
                if keep == "gradient":
                    scaled_NV = d_NV.mul_(lift).to(dtype) if lift > 1 else d_NV
                    torch.mm(scaled_NV, weight_VH, out=dx_NH[tile])
                    del scaled_NV
                del logits_NV, d_NV  # one tile is there at a time
        ctx.save_for_backward(*((dx_NH, predicts_N) if keep == "gradient" else ()))
        ctx.shape, ctx.dtype, ctx.lift = hidden_BTH.shape, hidden_BTH.dtype, lift
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """dX, zero at positions that are not trained."""
        dx_NH, predicts_N = ctx.saved_tensors
        batch, length, size = ctx.shape
        dx_BTH = dx_NH.new_zeros(batch * length, size, dtype=ctx.dtype)
        dx_BTH.index_copy_(0, predicts_N, (dx_NH * (gradient / ctx.lift)).to(ctx.dtype))
        return dx_BTH.view(ctx.shape), None, None, None, None, None


def summed(hidden_BTH: torch.Tensor, head: Head, predicts_N: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (nats, float32) summed over N trained tokens, as `SummedLoss` takes them; under autocast as it
    says, else in the dtype of the head.
    """
    kind = hidden_BTH.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.layer.weight.dtype
    keep = "gradient" if torch.is_grad_enabled() and hidden_BTH.requires_grad else "nothing"
    return SummedLoss.apply(hidden_BTH, head, predicts_N, targets_N, dtype, keep)  # type: ignore[no-any-return]


@torch.no_grad()
def token_losses(x_NH: torch.Tensor, head: Head, targets_N: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (N, nats, float32) of each of N tokens from the inputs of the head, without a gradient."""
    weight_VH, bias = head.layer.weight, head.layer.bias
    step = loss_tile_tokens(len(x_NH), len(weight_VH), element=weight_VH.element_size(), device=x_NH.device.type)
    tiles = [slice(start, start + step) for start in range(0, len(x_NH), step)]
    losses = [
        head.losses_of(nn.functional.linear(x_NH[tile].to(weight_VH.dtype), weight_VH, bias), targets_N[tile])
        for tile in tiles
    ]
    return torch.cat(losses) if losses else x_NH.new_zeros(0, dtype=torch.float32)


@contextmanager
def input_of(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Inside, the input (B, T, h) of the output layer is kept, and the layer computes no logit."""
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        seen.append(inputs[0])
        return (inputs[0].detach()[:, :0], *inputs[1:])

    handle = layer.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def find_head(model: Any, *, kernels: Literal["auto", "off"] = "auto") -> Head | None:
    """The head of a model whose loss can be computed from its inputs; None where it must give all logits itself.

    That is a plain frozen linear layer of a model that is not divided, after which the model does nothing but scale and
    bend each logit: asked with numbers, by what the model makes of logits put in the place of its own (one token goes
    through the model for it).
    """
    layer: Any = model.get_output_embeddings()
    if type(layer) is not nn.Linear or any(parameter.requires_grad for parameter in layer.parameters()):
        return None
    if any(hasattr(parameter, "placements") or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return None  # divided over processes: a weight is whole only inside of the forward pass
    put_V = torch.linspace(-40, 40, layer.weight.shape[0], device=layer.weight.device).to(layer.weight.dtype)
    found_V = _answered(model, layer, put_V)
    config = model.config.get_text_config()
    factors = [float(getattr(config, name, None) or 1.0) for name in _FACTORS]
    factors += [1 / float(getattr(config, name, None) or 1.0) for name in _DIVISORS]
    softcap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
    heads = [Head(layer, cap, multiplier, kernels) for multiplier in {1.0, *factors} for cap in {0.0, softcap}]
    errors = [_error(head, put_V, found_V) for head in heads]
    least = min(errors)
    return heads[errors.index(least)] if least <= _SAME.get(put_V.dtype, 0.0) else None


def _error(head: Head, put_V: torch.Tensor, found_V: torch.Tensor) -> float:
    """How far what the model made of some logits is from what this head says, relative."""
    if found_V.shape != put_V.shape:
        return float("inf")
    expected_V = put_V.float() * head.multiplier
    if head.softcap:
        expected_V = torch.tanh(expected_V / head.softcap) * head.softcap
    return float((found_V.float() - expected_V).norm() / expected_V.norm())


def _answered(model: Any, layer: nn.Linear, logits_V: torch.Tensor) -> torch.Tensor:
    """What the model gives as logits of one token where its head gives these."""
    was_training = model.training
    handle = layer.register_forward_hook(lambda _, inputs, output: logits_V.expand_as(output).clone())
    try:
        model.eval()
        token = torch.zeros(1, 1, dtype=torch.long, device=layer.weight.device)
        found: torch.Tensor = model(input_ids=token, use_cache=False).logits
        return found.flatten()
    finally:
        handle.remove()
        model.train(was_training)

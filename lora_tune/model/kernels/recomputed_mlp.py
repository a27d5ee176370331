"""A gated MLP of a layer that is recomputed: it keeps its input alone, and works on some of the tokens at a time.

The backward pass of a checkpointed layer computes the layer again up to the last tensor that something keeps. Two
functions see to it that this is the input of the MLP: `KeepInput` keeps it, computes nothing, and has the gradients;
`Compute`, behind it, has the output and keeps nothing. So neither gate, up nor down are computed with the layer: its
backward pass computes gate and up for some tokens, their gradients, and goes on with the next ones. Of the MLP's
9 products of matrices (3 forward, 3 again, 3 for gradients) 8 are left, and what a pass needs for the width of the MLP
(5 tensors (T, I)) does not grow with the length of the sequences.

Where a norm follows the MLP (Gemma 2, OLMo 2) and keeps what that puts out, the layer is computed to its end all the
same: there it would be 11 products instead of 9, so that such an MLP keeps gate and up unless the sequences are long.

    x --> KeepInput --> carrier (no values) --> Compute(x) --> y
    dx <-- gradients by pieces <-- dy <----------- dy <------- dy
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_tune.model.kernels.choice import Activation
from lora_tune.model.kernels.projections import Frozen, GatedMlp, gate_and_up, gated_down, mlp_backward
from lora_tune.model.pieces import piece_tokens


@dataclass(slots=True)
class Place:
    """What was learned of an MLP's place in its layer: whether something `followed` that keeps tensors, too.

    `entered`: passes through it since its last backward pass.
    """

    entered: int = 0
    followed: bool = False


def recomputed_mlp(
    x: torch.Tensor,
    frozen: Sequence[Frozen],
    dtype: torch.dtype,
    *,
    activation: Activation,
    factors: Sequence[torch.Tensor],
    place: Place,
) -> torch.Tensor:
    """down(activation(gate(x)) · up(x)) of x (…, h), in `dtype`; `frozen` and `factors` as those of `GatedMlp`."""
    tokens = x.numel() // max(x.shape[-1], 1)
    if place.followed and piece_tokens(tokens, factors[-2].shape[1], element=dtype.itemsize) >= tokens:
        return GatedMlp.apply(x, frozen, dtype, activation, *factors)  # type: ignore[no-any-return]
    place.entered += 1
    carrier = KeepInput.apply(x, frozen, dtype, activation, place, *factors)
    held = [factor.detach() for factor in factors]
    return Compute.apply(carrier, x.detach(), frozen, activation, held)  # type: ignore[no-any-return]


class KeepInput(torch.autograd.Function):
    """`KeepInput.apply(x, frozen, dtype, activation, place, *factors)`: no values yet, but the gradients of all."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        frozen: Sequence[Frozen],
        dtype: torch.dtype,
        activation: Activation,
        place: Place,
        *factors: torch.Tensor,
    ) -> Any:
        """One value that stands for all of (…, h)."""
        ctx.save_for_backward(x, *factors)
        ctx.frozen, ctx.dtype, ctx.activation, ctx.place = frozen, dtype, activation, place
        return x.new_empty((), dtype=dtype).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Gradients of x and of the factors, some tokens at a time."""
        place, entered = ctx.place, ctx.place.entered
        x, *factors = ctx.saved_tensors  # computes the layer again, if nothing behind the MLP has done so
        if entered == place.entered == 2:
            place.followed = True
        place.entered = 0
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[5:])
        x_TH, dy_TH = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        dx_TH = torch.empty_like(x_TH) if needs[0] else None
        sums: list[torch.Tensor | None] = [None] * len(factors)
        size = piece_tokens(x_TH.shape[0], factors[-2].shape[1], element=ctx.dtype.itemsize)
        for start in range(0, x_TH.shape[0], size):
            piece = slice(start, start + size)
            dx_PH, found = _of_piece(ctx, x_TH[piece].to(ctx.dtype), dy_TH[piece], factors, needs=needs)
            if dx_TH is not None and dx_PH is not None:
                dx_TH[piece] = dx_PH
            sums = [new if old is None or new is None else old.add_(new) for old, new in zip(sums, found, strict=True)]
        return (None if dx_TH is None else dx_TH.view(x.shape), None, None, None, None, *sums)


class Compute(torch.autograd.Function):
    """`Compute.apply(carrier, x, frozen, activation, factors)`: y, whose gradient is handed on as the carrier's."""

    @staticmethod
    def forward(
        ctx: Any,
        carrier: torch.Tensor,
        x: torch.Tensor,
        frozen: Sequence[Frozen],
        activation: Activation,
        factors: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """The output, in the dtype of the carrier."""

        def of_piece(part: torch.Tensor) -> torch.Tensor:
            _, made = gate_and_up(part.reshape(-1, part.shape[-1]).to(carrier.dtype), frozen, factors)
            return gated_down(made, frozen[-1], factors[-2:], activation=activation)[0].view(part.shape)

        with torch.autocast(x.device.type, enabled=False):
            return by_pieces(of_piece, x, width=factors[-2].shape[1], element=carrier.dtype.itemsize)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """The same gradient."""
        return gradient, None, None, None, None


def by_pieces(
    own: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *, width: int, element: int
) -> torch.Tensor:
    """What `own` computes of x (…, h) -> (…, out), each row for itself: some rows at a time, where there are many.

    `width` is that of the widest tensor it makes on the way, `element` the bytes of one of its values.
    """
    rows = x.numel() // max(x.shape[-1], 1)
    size = piece_tokens(rows, width, element=element)
    if size >= rows:
        return own(x)
    x_TH, y_TH = x.reshape(-1, x.shape[-1]), x.new_empty(0)
    for start in range(0, rows, size):
        y_PH = own(x_TH[start : start + size])
        if not start:
            y_TH = y_PH.new_empty(rows, y_PH.shape[-1])
        y_TH[start : start + size] = y_PH
    return y_TH.view(*x.shape[:-1], y_TH.shape[-1])


def _of_piece(
    ctx: Any, x_PH: torch.Tensor, dy_PH: torch.Tensor, factors: Sequence[torch.Tensor], *, needs: Sequence[bool]
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """dX of these tokens, and what they add to dA and dB."""
    inner_PR, made = gate_and_up(x_PH, ctx.frozen, factors)
    saved = (x_PH, inner_PR, made, None)
    return mlp_backward(dy_PH, saved, factors, ctx.frozen, activation=ctx.activation, needs=needs)

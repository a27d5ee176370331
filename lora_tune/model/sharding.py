"""What one of several cards holds of base and adapter, what it gathers, and what it sends, counted tensor by tensor.

`fully_shard` of torch divides every parameter along its first dimension, so that a card holds `ceil(rows / cards)` rows
and the last ones may hold fewer; the units that are gathered are the decoder layers and, as one, what is left
(embeddings, head, last norm). The scales of a 4-bit base are no parameters: every card keeps all of them. DeepSpeed's
ZeRO-3 divides the same parameters flat. `tests/test_sharding.py` compares with torch.
"""

from __future__ import annotations

from lora_tune.model.activations import is_target, rank_of
from lora_tune.model.shape import Shape
from lora_tune.recipe import Base, Lora

ADAPTER_BYTES = 4  # of an adapter weight and of its gradient: float32 beside every base
_SCALES = {True: 1 / 64 + 4 / 16384, False: 4 / 64}  # bytes a 4-bit weight, by double quantization
_GATHERED_LAYERS = 2  # the one that computes, and the next, which is on its way


def packed_bytes(base: Base, *, element: int) -> float:
    """Bytes of one weight of a linear layer without its scales."""
    return {"nf4": 0.5, "fp4": 0.5, "int8": 1.0, "none": float(element)}[base.quantize]


def scale_bytes(shape: Shape, base: Base) -> float:
    """Bytes of the scales of a 4-bit base, which are never divided."""
    return shape.linear_parameters * _SCALES[base.double_quant] if base.quantize in ("nf4", "fp4") else 0.0


def held_base(shape: Shape, base: Base, *, element: int, cards: int) -> float:
    """Bytes of the frozen base on the first of `cards` cards between two steps."""
    if base.quantize == "none":
        linear = float(sum(lin.count * _rows(lin.outputs, cards) * lin.inputs for lin in shape.linears) * element)
    else:  # stored flat
        linear = shape.linear_parameters * packed_bytes(base, element=element) / cards
    embeddings = _rows(shape.vocabulary, cards) * shape.hidden * (1 if shape.tied else 2)
    rest = embeddings + (shape.expert_parameters + shape.other_parameters) / cards
    return linear + rest * element + scale_bytes(shape, base)


def held_adapter(shape: Shape, lora: Lora, *, cards: int) -> int:
    """Weights of A and B (and DoRA's magnitudes) on the first of `cards` cards."""
    count = 0
    for linear in shape.linears:
        if is_target(linear, lora):
            rank = rank_of(linear, lora)
            count += linear.count * (_rows(rank, cards) * linear.inputs + _rows(linear.outputs, cards) * rank)
            count += linear.count * _rows(linear.outputs, cards) if lora.method == "dora" else 0
    return count


def divided_base(shape: Shape, base: Base, *, element: int, cards: int) -> float:
    """Bytes of all cards' parts of the base together, what a gathering of all of it brings: the filling included."""
    return (held_base(shape, base, element=element, cards=cards) - scale_bytes(shape, base)) * cards


def divided_root(shape: Shape, *, element: int, cards: int) -> float:
    """Of `divided_base` what stands in no layer, embeddings, head and last norm: it is gathered once, and kept until
    the backward pass has ended."""
    embeddings = _rows(shape.vocabulary, cards) * shape.hidden * (1 if shape.tied else 2)
    return (embeddings * cards + shape.hidden) * element


def gathered_units(shape: Shape, base: Base, lora: Lora, *, element: int) -> float:
    """Bytes that a card holds of other cards' parts at the peak: two layers, and embeddings, head and last norm."""
    root = (shape.embedding_parameters + shape.hidden) * element
    layers = shape.linear_parameters * packed_bytes(base, element=element)
    layers += (shape.expert_parameters + shape.other_parameters) * element
    layers += held_adapter(shape, lora, cards=1) * ADAPTER_BYTES
    return root + min(_GATHERED_LAYERS, shape.layers) * layers / shape.layers


def _rows(rows: int, cards: int) -> int:
    """Rows of a tensor on the first card."""
    return -(-rows // cards)

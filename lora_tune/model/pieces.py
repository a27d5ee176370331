"""Work on some of the tokens at a time: how many, where it is done, and what memory a pass needs then.

An MLP of a layer that is recomputed (`kernels/recomputed_mlp.py`), and in an evaluation projections, MLPs and norms,
take so many tokens that the widest tensor they make has 64 MiB. The counts beside them were read off PyTorch's record
of allocations: `python -m benchmarks.recompute`, and `tests/test_pieces.py` holds the plan to it.
"""

from __future__ import annotations

from lora_tune.model.activations import Kernels, fuses_mlp, is_followed
from lora_tune.model.shape import Shape
from lora_tune.recipe import Lora

CACHE_BYTES = 2**30  # keys and values of a batch of answers, at most
PIECE_BYTES = 2**26  # of one tensor: 2,340 tokens of the MLP of an 8B Llama in 16 bit
_WIDE = 5  # as wide as the MLP in its backward pass: gate, up, and the gradients of the product and of the two
_EVALUATED = 7  # as wide as the hidden size: stream, norm, queries, and four while they are rotated


def piece_tokens(tokens: int, width: int, *, element: int) -> int:
    """How many of the tokens are worked on at a time: equal pieces, none over PIECE_BYTES by width and bytes."""
    most = max(1, PIECE_BYTES // (width * element))
    pieces = max(1, -(-tokens // most))
    return max(1, -(-tokens // pieces))


def keeps_input_alone(shape: Shape, *, lora: Lora, kernels: Kernels) -> bool:
    """Whether the MLP of a recomputed layer keeps its input alone: it is fused, known, and no norm follows it."""
    return shape.known and not shape.routed and not is_followed(shape) and fuses_mlp(shape, lora=lora, kernels=kernels)


def backward_bytes(shape: Shape, tokens: int, *, element: int) -> float:
    """What the backward pass of a recomputed layer needs beside what it keeps, where the MLP works by pieces.

    In the MLP, or in attention, which sums up the gradient of its queries in float32. The input of the layer's first
    norm is that of the layer, and counted as such.
    """
    width = shape.active_intermediate
    mlp = _WIDE * piece_tokens(tokens, width, element=element) * width + shape.hidden * tokens
    attention = 2 * (shape.hidden + shape.key_value) * tokens
    return float(element * max(mlp, attention))


def evaluation_bytes(shape: Shape, tokens: int, *, element: int, lora: Lora, kernels: Kernels) -> float:
    """Temporaries of a pass without gradients over so many tokens; adapters make float32 of what they take.

    By pieces where everything is fused: then attention needs most, at the rotation of queries and keys.
    """
    width = shape.active_intermediate
    by_token = width * (2 * element + 12) + shape.hidden * (2 * element + 4)
    if not (lora.targets == "all-linear" and keeps_input_alone(shape, lora=lora, kernels=kernels)):
        return float(tokens * by_token)
    piece = piece_tokens(tokens, width, element=4)
    mlp = piece * by_token + 3 * element * shape.hidden * tokens
    attention = element * tokens * (_EVALUATED * shape.hidden + 2 * shape.key_value + 2 * shape.hidden // shape.heads)
    return float(max(mlp, attention))


def cache_bytes(shape: Shape, tokens: int, *, element: int) -> int:
    """Keys and values of a row that is answered: up to 1 GiB, beyond that those of two layers are enough.

    The others wait in the machine's memory where they do not fit (`host_cache.py`).
    """
    layer = 2 * shape.key_value * tokens * element
    return min(shape.layers * layer, CACHE_BYTES + 2 * layer)

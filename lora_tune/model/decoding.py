"""The decoding loop: a batch of left-padded prompts to new tokens, with a KV cache that finished rows leave.

`generate` of transformers runs a batch until its last row ends and asks the GPU after every token whether it has. Here
the rows that have ended are taken out of batch and cache, and a GPU is asked every few tokens only. Architectures whose
state is no plain KV cache (recurrent ones, inputs of their own) still go through transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lora_tune.model.host_cache import host_cache

Held = Literal["device", "host"]
_ASK_EVERY = 8  # tokens between two looks at which rows have ended, on a GPU; at every token on a CPU
_LEAVE_SHARE = 8  # rows leave when one in so many has ended: cutting the cache costs about as much as one step


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are made. `temperature` 0 is greedy search; above it tokens are drawn, from the `top_k` most likely
    (0: all) and of these from the smallest set whose probability reaches `top_p` (Holtzman et al. 2020).

    A row's random numbers depend on `seed` and the number of the row alone, never on its batch.
    """

    max_new_tokens: int
    batch_size: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def decode(
    base: PreTrainedModel,
    ids_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    rows: Sequence[int],
    stop_ids: Sequence[int],
    decoding: Decoding,
    held: Held = "device",
) -> list[list[int]]:
    """New token ids of every prompt, up to `max_new_tokens`; what follows a row's first stop token is arbitrary.

    `held`: where keys and values are kept; in the machine's memory those of a single row.

    `ids_BT` and `mask_BT` are padded on the left; `rows` are the numbers of the rows (B), which seed their random
    numbers. The model must be in evaluation mode, without gradients.
    """
    most, device = decoding.max_new_tokens, ids_BT.device
    batch, length = ids_BT.shape
    stops = torch.as_tensor(list(stop_ids), device=device)
    accepted = inspect.signature(base.forward).parameters
    found_BN = torch.full((batch, most), int(stop_ids[0]), dtype=torch.long, device=device)
    draws_BN = _draws(rows, decoding, device=device)
    mask_BL = torch.cat([mask_BT, mask_BT.new_ones((batch, most))], dim=1)
    place_B1 = mask_BT.sum(dim=1, keepdim=True)
    inputs: dict[str, Any] = {"input_ids": ids_BT, "position_ids": (mask_BT.cumsum(dim=1) - 1).clamp(min=0)}
    cache = DynamicCache(config=base.config) if held == "device" else host_cache(base.config, room=length + most)
    alive = torch.arange(batch, device=device)  # numbers of the rows that are still in the batch
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    ask_every = 1 if device.type == "cpu" else _ASK_EVERY
    for step in range(most):
        inputs |= {"attention_mask": mask_BL[:, : length + step], "past_key_values": cache, "logits_to_keep": 1}
        output = base(use_cache=True, **{key: value for key, value in inputs.items() if key in accepted})
        next_B = _choose(output.logits[:, -1], decoding, None if draws_BN is None else draws_BN[alive, step])
        found_BN[alive, step] = next_B
        ended |= torch.isin(next_B, stops)
        if (step + 1) % ask_every == 0:
            left = int((~ended).sum())
            if not left:
                break
            if (len(ended) - left) * _LEAVE_SHARE >= len(ended):
                kept = (~ended).nonzero().squeeze(1)
                cache.batch_select_indices(kept)
                alive, next_B, place_B1, mask_BL = alive[kept], next_B[kept], place_B1[kept], mask_BL[kept]
                ended = torch.zeros(left, dtype=torch.bool, device=device)
        inputs |= {"input_ids": next_B[:, None], "position_ids": place_B1}
        place_B1 = place_B1 + 1
    return cast(list[list[int]], found_BN.tolist())


def has_plain_cache(base: PreTrainedModel) -> bool:
    """Whether this architecture decodes from a KV cache alone, by the inputs that all such models share."""
    accepted = inspect.signature(base.forward).parameters
    own_inputs = type(base).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    if own_inputs or not {"input_ids", "attention_mask", "past_key_values"} <= set(accepted):
        return False
    return all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=base.config).layers)


def _draws(rows: Sequence[int], decoding: Decoding, *, device: torch.device) -> torch.Tensor | None:
    """Uniform numbers (B, N) of every row and token; None for greedy search."""
    if decoding.temperature == 0:
        return None
    drawn = []
    for row in rows:
        generator = torch.Generator().manual_seed((decoding.seed * 0x9E3779B1 + row) % 2**63)
        drawn.append(torch.rand(decoding.max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(drawn).to(device=device, dtype=torch.float32)


def _choose(logits_BV: torch.Tensor, decoding: Decoding, draws_B: torch.Tensor | None) -> torch.Tensor:
    """The next token of every row: the most likely one, or the one at which the cumulated probability passes a draw."""
    if draws_B is None:
        return logits_BV.argmax(dim=-1)
    sorted_BV, order_BV = (logits_BV.float() / decoding.temperature).sort(dim=-1, descending=True, stable=True)
    if 0 < decoding.top_k < sorted_BV.shape[1]:
        sorted_BV, order_BV = sorted_BV[:, : decoding.top_k], order_BV[:, : decoding.top_k]
    chances_BV = sorted_BV.softmax(dim=-1)
    before_BV = chances_BV.cumsum(dim=-1) - chances_BV
    chances_BV = chances_BV.masked_fill((before_BV >= decoding.top_p) & (before_BV > 0), 0.0)
    edges_BV = chances_BV.cumsum(dim=-1)
    passed_B1 = torch.searchsorted(edges_BV, draws_B[:, None] * edges_BV[:, -1:], right=True)
    last_B1 = (chances_BV > 0).sum(dim=-1, keepdim=True) - 1
    return order_BV.gather(1, torch.minimum(passed_B1, last_B1)).squeeze(1)

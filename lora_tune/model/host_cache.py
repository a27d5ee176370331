"""Keys and values of one row in the machine's memory: for a prompt that is too long for a GPU to keep them all.

Each layer's come to the device when that layer attends to them, so that those of two layers are there at most. A prompt
of 8,192 tokens has 1.0 GiB of them in an 8B base with grouped queries, 6.3 GiB in Llama-2-13B.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from lora_tune.model.offload import pinned


class _HostLayer(DynamicLayer):
    """Keys and values of one layer, of at most `room` tokens."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.tokens = room, 0
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, cache_kwargs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._held is None:
            self.lazy_initialization(key_states, value_states)
            self._held = self._space(key_states), self._space(value_states)
        start, self.tokens = self.tokens, self.tokens + key_states.shape[-2]
        self.keys, self.values = (held[..., : self.tokens, :] for held in self._held)
        self.keys[..., start:, :].copy_(key_states)
        self.values[..., start:, :].copy_(value_states)
        if not start:
            return key_states, value_states
        return self.keys.to(key_states.device), self.values.to(value_states.device)

    def _space(self, states: torch.Tensor) -> torch.Tensor:
        shape = (*states.shape[:-2], self.room, states.shape[-1])
        if states.device.type == "cpu":
            return torch.empty(shape, dtype=states.dtype)
        return pinned(int(torch.Size(shape).numel()), states.dtype).view(shape)


def host_cache(config: PretrainedConfig, *, room: int) -> DynamicCache:
    """A cache for one row of at most `room` tokens; layers with a window keep theirs, which is short, on the device."""
    cache = DynamicCache(config=config)
    cache.layers = [_HostLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache

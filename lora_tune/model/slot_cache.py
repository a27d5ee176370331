"""A KV cache in which every row of a batch has its own place and its own length, so that rows come and go at any step.

Row r of a batch lies in slot r; its token at position p lies in column p of the slot. A new row is written into a free
slot, the last row moves into the slot of one that has left, and nothing is padded, shifted or cut. What a slot holds
beyond its row is hidden by the mask (`masks`), which the model is given ready-made.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

_WHOLE = "full_attention"
_WINDOW = "sliding_attention"


class _Now:
    """Where the forward pass that comes next writes, and how many columns it reads."""

    rows: int = 0
    length: int = 0
    first: int = 0
    rows_B: torch.Tensor | None = None  # one token for each row, at columns_B; None: columns first to length
    columns_B: torch.Tensor | None = None


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: (slots, heads, columns, width)."""

    is_sliding = False
    keys: torch.Tensor | None
    values: torch.Tensor | None

    def __init__(self, now: _Now) -> None:
        super().__init__()
        self._now = now
        self.slots = self.columns = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def grow(self, slots: int, columns: int) -> None:
        """Make room; what is there stays."""
        self.slots, self.columns = max(slots, self.slots), max(columns, self.columns)
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self._grown(self.keys), self._grown(self.values)

    def _grown(self, old: torch.Tensor) -> torch.Tensor:
        new = old.new_zeros((self.slots, old.shape[1], self.columns, old.shape[3]))
        new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, cache_kwargs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        now, found = self._now, []
        for held, new in zip(self.held(key_states, value_states), (key_states, value_states), strict=True):
            if now.rows_B is not None:
                held[now.rows_B, :, now.columns_B] = new[:, :, 0]
            else:
                held[: now.rows, :, now.first : now.length] = new
            found.append(held[: now.rows, :, : now.length])
        return found[0], found[1]

    def held(self, like_keys: torch.Tensor, like_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer holds, made at the first call: heads, width and dtype are those of `like_*`."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(like_keys, like_values)
            self.keys, self.values = (
                like.new_zeros((self.slots, like.shape[1], self.columns, like.shape[3]))
                for like in (like_keys, like_values)
            )
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._now.length, 0

    def get_seq_length(self) -> int:
        return self._now.first

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """The cache of one batch. Before every forward pass say what it is: `one_each` or `chunk`."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.now = _Now()
        super().__init__(layers=[_SlotLayer(self.now) for _ in DynamicCache(config=config).layers])
        self._slots = self._columns = 0

    @property
    def size(self) -> int:
        """Columns of all slots together: how many tokens there is room for."""
        return self._slots * self._columns

    def reserve(self, slots: int, columns: int) -> None:
        """Have room for so many rows and tokens in each."""
        if slots > self._slots or columns > self._columns:
            self._slots, self._columns = max(slots, self._slots), max(columns, self._columns)
            for layer in self._own_layers():
                layer.grow(self._slots, self._columns)

    def release(self) -> None:
        """Give the memory back."""
        self._slots = self._columns = 0
        for layer in self._own_layers():
            layer.keys = layer.values = None
            layer.slots = layer.columns = 0

    def one_each(self, rows_B: torch.Tensor, columns_B: torch.Tensor, *, length: int) -> None:
        """The next pass has one token for each of the rows 0 to B - 1, at these columns, and reads `length` columns."""
        now = self.now
        now.rows, now.length, now.first = len(rows_B), length, length - 1
        now.rows_B, now.columns_B = rows_B, columns_B

    def chunk(self, rows: int, *, first: int, count: int) -> None:
        """The next pass has `count` tokens for each of the first rows, from column `first` on."""
        now = self.now
        now.rows, now.length, now.first = rows, first + count, first
        now.rows_B = now.columns_B = None

    def move(self, source: int, target: int) -> None:
        """Put the row of one slot into another."""
        for layer in self._own_layers():
            for held in (layer.keys, layer.values):
                if held is not None:
                    held[target] = held[source]

    def take(self, other: SlotCache, source: int, target: int, *, length: int) -> None:
        """Copy the first `length` columns of a row of another cache into a slot, and clear what follows them."""
        for layer, foreign in zip(self._own_layers(), other._own_layers(), strict=True):
            if foreign.keys is None or foreign.values is None:
                continue
            own = layer.held(foreign.keys, foreign.values)
            for held, given in zip(own, (foreign.keys, foreign.values), strict=True):
                held[target, :, :length] = given[source, :, :length]
                held[target, :, length:] = 0  # hidden by the mask, but 0 * NaN would be seen

    def _own_layers(self) -> list[_SlotLayer]:
        return [layer for layer in self.layers if isinstance(layer, _SlotLayer)]


class Masks:
    """The attention masks of a model, by position: which columns a token at position p may read."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None)
        if not kinds:
            kinds = {_WINDOW} if window and getattr(config, "use_sliding_window", True) else {_WHOLE}
        self.is_known = kinds <= {_WHOLE, _WINDOW} and config._attn_implementation in ("sdpa", "eager")
        self._windows = {kind: int(window) if kind == _WINDOW and window else None for kind in sorted(kinds)}
        self._named = len(kinds) > 1 or (kinds == {_WINDOW} and bool(getattr(config, "layer_types", None)))
        self._additive = config._attn_implementation == "eager"
        self._dtype = model.dtype

    def of(self, positions_BT: torch.Tensor, *, length: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """(B, 1, T, length) for tokens at these positions; by kind of layer where the model has several."""
        columns_L = torch.arange(length, device=positions_BT.device)
        seen = columns_L <= positions_BT[:, None, :, None]
        found = {}
        for kind, window in self._windows.items():
            mask = seen if window is None else seen & (columns_L > positions_BT[:, None, :, None] - window)
            if self._additive:
                mask = torch.zeros_like(mask, dtype=self._dtype).masked_fill_(~mask, torch.finfo(self._dtype).min)
            found[kind] = mask
        return found if self._named else next(iter(found.values()))

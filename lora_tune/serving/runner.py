"""The model of an engine: the base with adapters on it, and its forward passes. For the worker's thread alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from lora_tune.adapter.load import attach_saved, detach
from lora_tune.adapter.mixture import Mixture, mixable_rank
from lora_tune.model.decoding import has_plain_cache
from lora_tune.model.slot_cache import Masks, SlotCache

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_tune.model.methods import SavedAdapter

_PROBE = 24  # tokens of the probe that compares our batches with the model's own
_PROBE_TOLERANCE = 0.05  # of the logits' standard deviation: 16-bit kernels differ by less, a wrong mask by more


class Runner:
    """A base, the adapters on it, and which of them a batch is answered by."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self.device = base.device
        self._accepted = set(inspect.signature(base.forward).parameters)
        self._masks = Masks(base)
        self._mixture = Mixture()
        self._model: PeftModel | None = None
        self._mixable: dict[str, int] = {}
        self._count = 0
        self.has_slots = has_plain_cache(base) and self._masks.is_known and self._slots_agree()
        """Rows of different lengths can share a batch that others join and leave; else every row decodes by itself."""

    def attach(self, saved: SavedAdapter) -> tuple[str, bool]:
        """Put a checked adapter beside the others: its name in PEFT, and whether it can share a batch with them.

        Raises: CheckFailed where it does not fit; the model is then as it was.
        """
        self._count += 1
        name = f"served{self._count:09}"  # none is a part of another: PEFT looks names up as parts of keys
        self._mixture.leave(name)
        rank = mixable_rank(saved.tensors)
        try:
            self._model = attach_saved(self._model or self.base, saved, name=name)
            self._mixable |= {} if rank is None else {name: rank}
        finally:
            self._mixture.place(self._model, self._mixable)
        return name, rank is not None

    def detach(self, name: str) -> None:
        """Take an adapter off the model; nothing else changes."""
        if self._model is None:
            return
        self._mixable.pop(name, None)
        self._mixture.leave(name)
        detach(self._model, name)
        self._mixture.place(self._model, self._mixable)

    def select(self, adapters: Sequence[str | None]) -> None:
        """By which adapters the rows of the next batch are answered. One that cannot be mixed answers all of them."""
        alone = next((name for name in adapters if name is not None and name not in self._mixable), None)
        if alone is None:
            self._mixture.select(adapters)
        elif set(adapters) == {alone}:
            self._mixture.alone(alone)
        else:
            raise ValueError("an adapter that cannot be mixed shares a batch")

    def new_cache(self) -> SlotCache:
        """An empty cache for one batch."""
        return SlotCache(self.base.config)

    def forward(
        self, ids_BT: torch.Tensor, positions_BT: torch.Tensor, cache: SlotCache, *, keep: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Logits (B, K, V) of the places `keep` of T, by default the last; the cache has been told what comes."""
        inputs: dict[str, Any] = {
            "input_ids": ids_BT,
            "position_ids": positions_BT,
            "attention_mask": self._masks.of(positions_BT, length=cache.now.length),
            "past_key_values": cache,
            "logits_to_keep": 1 if keep is None else torch.tensor(list(keep), device=ids_BT.device),
            "use_cache": True,
        }
        output = self.base(**{key: value for key, value in inputs.items() if key in self._accepted})
        logits: torch.Tensor = output.logits
        if "logits_to_keep" not in self._accepted:
            logits = logits[:, -1:] if keep is None else logits[:, list(keep)]
        return logits

    def start_alone(self, ids: Sequence[int]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Logits (1, V) behind one row, by the model's own way, and what it needs to go on."""
        ids_1T = torch.tensor([list(ids)], device=self.device)
        state: dict[str, Any] = {"attention_mask": torch.ones_like(ids_1T), "use_cache": True}
        base = cast(Any, self.base)
        output = base(**base.prepare_inputs_for_generation(ids_1T, is_first_iteration=True, **state), return_dict=True)
        return output.logits[:, -1], base._update_model_kwargs_for_generation(output, state)

    def go_on_alone(self, ids: Sequence[int], state: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """The same one token later; `ids` are all of the row's."""
        ids_1T = torch.tensor([list(ids)], device=self.device)
        base = cast(Any, self.base)
        inputs = base.prepare_inputs_for_generation(ids_1T, next_sequence_length=1, **state)
        output = base(**inputs, return_dict=True)
        return output.logits[:, -1], base._update_model_kwargs_for_generation(output, state)

    @torch.no_grad()
    def _slots_agree(self) -> bool:
        """Whether rows in slots get the logits that the model gives to each of them alone."""
        vocabulary = int(self.base.get_input_embeddings().weight.shape[0])
        rows = [[(7 * place + row) % vocabulary for place in range(_PROBE - 5 * row)] for row in range(2)]
        cache = self.new_cache()
        cache.reserve(2, _PROBE)
        try:
            for row, ids in enumerate(rows):
                alone = self.new_cache()
                alone.reserve(1, _PROBE)
                alone.chunk(1, first=0, count=len(ids) - 1)
                positions = torch.arange(len(ids) - 1, device=self.device)[None]
                self.forward(torch.tensor([ids[:-1]], device=self.device), positions, alone)
                cache.take(alone, 0, row, length=len(ids) - 1)
            columns_B = torch.tensor([len(ids) - 1 for ids in rows], device=self.device)
            cache.one_each(torch.arange(2, device=self.device), columns_B, length=_PROBE)
            last_B1 = torch.tensor([[ids[-1]] for ids in rows], device=self.device)
            ours = self.forward(last_B1, columns_B[:, None], cache)[:, -1].float()
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
            return False
        theirs = torch.cat(
            [self.base(input_ids=torch.tensor([ids], device=self.device)).logits[:, -1].float() for ids in rows]
        )
        return bool((ours - theirs).abs().max() <= _PROBE_TOLERANCE * theirs.std())

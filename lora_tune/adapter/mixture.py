"""Several plain LoRA adapters in one batch: each row of the batch is answered by the adapter that it asks for.

PEFT's own way (`adapter_names`) gathers the rows of every adapter in every layer. Here the adapters stand side by side
as one adapter of PEFT: A of all of them below each other, B beside each other, each scaled as its own configuration
says, and between the two a mask that leaves to every row the columns of its own adapter. That is what PEFT computes,
`base(x) + B(A(x)) * scaling`, by two products in each layer whatever the number of adapters; a row of the base keeps no
column, and gets exactly the base's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

_NAME = "all-together"  # of the adapter that stands for all of them; served names are others
_COLUMNS = 512  # ranks that may stand side by side at once before only those of a batch do
_PARTS = ("lora_A.weight", "lora_B.weight")


def mixable_rank(tensors: Mapping[str, torch.Tensor]) -> int | None:
    """The largest rank of an adapter that is nothing but A and B of linear layers, None where it is more than that.

    Only the former can share a batch with others.
    """
    if not tensors or not all(key.endswith(_PARTS) for key in tensors):
        return None
    return max(len(tensor) for key, tensor in tensors.items() if key.endswith(_PARTS[0]))


class _Rows:
    """Which columns (R) a row of the batch (B) does not have: (B, 1, R), True where they are hidden.

    `own` are the columns of an adapter that has the batch for itself (none: of the base), which needs no mask.
    """

    hidden_B1R: torch.Tensor
    own: slice | None = None


class _TogetherA(nn.Module):
    """A of all adapters (R, in), and the mask of the batch behind it."""

    def __init__(self, weight: torch.Tensor, rows: _Rows) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._rows = rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, in) or, where a model has flattened it, (B * T, in), to as many columns R."""
        if self._rows.own is not None:
            return nn.functional.linear(x, self.weight[self._rows.own])
        columns, hidden = nn.functional.linear(x, self.weight), self._rows.hidden_B1R
        if columns.dim() == 3:
            return columns.masked_fill(hidden, 0.0)
        return columns.view(len(hidden), -1, columns.shape[-1]).masked_fill(hidden, 0.0).view(columns.shape)


class _TogetherB(nn.Module):
    """B of all adapters (out, R)."""

    def __init__(self, weight: torch.Tensor, rows: _Rows) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._rows = rows

    def forward(self, columns: torch.Tensor) -> torch.Tensor:
        """What A gave, to (…, out)."""
        own = self._rows.own
        return nn.functional.linear(columns, self.weight if own is None else self.weight[:, own])


class Mixture:
    """The adapters that can share a batch, on one model. Call `leave` before what is on the model changes,
    and `place` behind it."""

    def __init__(self) -> None:
        self._model: PeftModel | None = None
        self._layers: list[Any] = []
        self._ranks: Mapping[str, int] = {}
        self._stacked: dict[str, slice] = {}
        self._rows = _Rows()
        self._selected: tuple[str | None, ...] | None = None
        self._active: str | None = None

    def place(self, model: PeftModel | None, ranks: Mapping[str, int]) -> None:
        """The model (None: it has no adapter yet) and {name: rank} of the adapters on it that can share a batch."""
        self._model = model
        self._active = self._selected = None
        self._stacked = {}
        self._ranks = dict(ranks)
        if model is not None:
            self._layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
            self._stack(sorted(ranks) if sum(ranks.values()) <= _COLUMNS else ())

    def leave(self, changing: str) -> None:
        """Take the common adapter off the model, before the adapter `changing` comes or goes."""
        if self._model is not None:
            for layer in self._layers:
                layer.set_adapter([])
                _take_off(layer)
            cast(Any, self._model.base_model).active_adapter = changing  # PEFT looks it up, and accepts no empty list
        self._model = self._active = self._selected = None
        self._stacked = {}

    def select(self, names: Sequence[str | None]) -> None:
        """Let row i of the next batch be answered by adapter `names[i]`, None for the base alone."""
        if self._model is None:
            return
        wanted = tuple(names)
        if wanted == self._selected and self._active == _NAME:
            return
        missing = {name for name in wanted if name is not None} - self._stacked.keys()
        if missing:
            self._stack(sorted({name for name in wanted if name is not None}))
        self._activate(_NAME)
        kinds: list[str | None] = [None, *self._stacked]
        number = {name: index for index, name in enumerate(kinds)}
        device = self._table_KR.device
        rows_B = torch.tensor([number[name] for name in wanted], device=device)
        self._rows.hidden_B1R = self._table_KR[rows_B].unsqueeze(1)
        self._rows.own = self._columns_of(wanted[0]) if len(set(wanted)) == 1 else None
        self._selected = wanted

    def _columns_of(self, name: str | None) -> slice:
        return slice(0, 0) if name is None else self._stacked[name]

    def alone(self, name: str) -> None:
        """Let all rows of the next batches be answered by this adapter, which may be of any kind."""
        self._activate(name)
        self._selected = None

    def _activate(self, name: str) -> None:
        if self._active != name and self._model is not None:
            cast(Any, self._model.base_model).set_adapter(name, inference_mode=True)
            self._active = name

    def _stack(self, names: Sequence[str]) -> None:
        """Put A and B of these adapters side by side in all layers; the place of a name is the same in each."""
        model = cast(PeftModel, self._model)
        self._stacked, start = {}, 0
        for name in names:
            self._stacked[name] = slice(start, start + self._ranks[name])
            start += self._ranks[name]
        device = next(model.parameters()).device
        self._table_KR = torch.ones((len(names) + 1, start), dtype=torch.bool, device=device)
        for number, columns in enumerate(self._stacked.values(), 1):
            self._table_KR[number, columns] = False
        self._rows.hidden_B1R = self._table_KR[:1].unsqueeze(1)
        for layer in self._layers:
            self._stack_layer(layer, start)
        self._active = self._selected = None

    def _stack_layer(self, layer: Any, columns: int) -> None:
        here = [name for name in self._stacked if name in layer.lora_A]
        _take_off(layer)
        if not here:
            return
        a, b = layer.lora_A[here[0]].weight, layer.lora_B[here[0]].weight
        a_RI = torch.zeros((columns, a.shape[1]), dtype=torch.float32, device=a.device)
        b_OR = torch.zeros((b.shape[0], columns), dtype=torch.float32, device=b.device)
        for name in here:
            start, rank = self._stacked[name].start, layer.lora_A[name].weight.shape[0]
            a_RI[start : start + rank] = layer.lora_A[name].weight
            b_OR[:, start : start + rank] = layer.lora_B[name].weight.float() * layer.scaling[name]
        layer.lora_A[_NAME] = _TogetherA(a_RI, self._rows)
        layer.lora_B[_NAME], layer.lora_dropout[_NAME] = _TogetherB(b_OR, self._rows), nn.Identity()
        layer.scaling[_NAME] = 1.0


def _take_off(layer: Any) -> None:
    for part in (layer.lora_A, layer.lora_B, layer.lora_dropout, layer.scaling):
        if _NAME in part:
            del part[_NAME]

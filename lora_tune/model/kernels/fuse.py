"""Which layers of an adapted model are trained through the fused functions, found by their structure.

Only passes that build a graph go through them: an evaluation or an answer without gradients takes PEFT's own path.
What is not plain LoRA over a frozen linear layer (dropout, DoRA, a bias of LoRA's own, several adapters, a sharded
parameter) keeps PEFT's path, layer by layer.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_tune.model.base import weight_reader
from lora_tune.model.kernels.choice import Activation
from lora_tune.model.kernels.probe import activation_of, offset_of
from lora_tune.model.kernels.projections import Frozen, GatedMlp, Projections
from lora_tune.model.kernels.recomputed_mlp import Place, by_pieces, recomputed_mlp
from lora_tune.model.kernels.rms_norm import RmsNorm
from lora_tune.model.kernels.rotary import rotating

QKV = ("q_proj", "k_proj", "v_proj")
_WHO = -1  # of what is handed out, beside 0 for the input, 1 and 2 for keys and values
MLPS = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"))  # the last one of each has the output
_OTHER_MLP = "an MLP with more between its layers than silu or tanh-gelu"


@dataclass
class Fused:
    """What was fused: the number of each kind, and why layers were not: {reason: how many}."""

    qkv: int = 0
    mlp: int = 0
    linear: int = 0
    norms: int = 0
    rotations: int = 0
    left: Counter[str] = field(default_factory=Counter)
    restore: list[Callable[[], None]] = field(default_factory=list, repr=False)
    handed: dict[int, Any] = field(default_factory=dict, repr=False)  # of one attention: who, its input, keys, values

    def undo(self) -> None:
        """Give every layer its own forward pass again."""
        while self.restore:
            self.restore.pop()()


def fuse(model: nn.Module) -> Fused:
    """Let the adapted layers of a PEFT model compute through the fused functions wherever a gradient is asked for.

    Weights, names and state dictionaries stay as they are; `undo` of the answer takes it back.
    """
    fused = Fused()
    taken: set[int] = set()
    known: dict[Any, Activation | None] = {}
    blocks = _blocks(model)
    for parent in model.modules():
        children = dict(parent.named_children())
        if _all_plain(children, QKV):
            _fuse_qkv([children[name] for name in QKV], fused)
            taken |= {id(children[name]) for name in QKV}
        layers, activation = _gated_mlp(parent, children, known)
        if activation:
            _fuse_mlp(parent, layers, activation, fused, blocks.get(id(parent)))
            taken |= {id(layer) for layer in layers}
        elif layers:
            fused.left[_OTHER_MLP] += 1
    for _, layer in _adapted(model):
        if id(layer) in taken:
            continue
        reason = why_not(layer)
        if reason:
            fused.left[reason] += 1
        else:
            _fuse_linear(layer, fused)
    _fuse_norms(model, fused)
    for module, forward in rotating(model):
        _replace(module, forward, fused)
        fused.rotations += 1
    return fused


def _blocks(model: nn.Module) -> dict[int, nn.Module]:
    """By the id of a module, the layer of the model that it stands in and that may be recomputed."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return {id(part): block for block in blocks for part in block.modules()}


def why_not(layer: Any) -> str:
    """Why an adapted layer keeps PEFT's path, or nothing."""
    names = list(layer.lora_A)
    if len(names) != 1:
        return "several adapters"
    (name,) = names
    dropout = layer.lora_dropout[name]
    if getattr(dropout, "p", 0):
        return "dropout"
    if name in getattr(layer, "lora_variant", {}) or type(layer.lora_A[name].weight) is not nn.Parameter:
        return "another method than plain LoRA"
    if layer.lora_B[name].bias is not None:
        return "a bias of LoRA's own"
    base = layer.base_layer
    if weight_reader(base) is None:
        return f"a base layer of type {type(base).__name__}"
    if any(parameter.requires_grad for parameter in base.parameters()):
        return "a trained base layer"
    return ""


def left_divided(model: nn.Module) -> dict[str, int]:
    """What keeps PEFT's path, and how often, where each layer is divided between processes: all that is adapted."""
    return {"divided between processes": sum(1 for _ in _adapted(model))}


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted linear layers, known by what they consist of."""
    parts = ("lora_A", "lora_B", "lora_dropout", "scaling", "base_layer")
    for name, module in model.named_modules():
        if all(hasattr(module, part) for part in parts) and len(module.lora_A):  # type: ignore[arg-type]
            yield name, module


def _all_plain(children: dict[str, nn.Module], names: tuple[str, ...]) -> bool:
    """All of these are adapted layers that can be fused, on one device."""
    layers = [children.get(name) for name in names]
    return all(layer is not None and hasattr(layer, "lora_A") and not why_not(layer) for layer in layers)


@dataclass(frozen=True, slots=True)
class _Plain:
    """An adapted layer that can be fused: the layer, its frozen part, and the name of its adapter."""

    layer: Any
    frozen: Frozen
    name: str

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, in) and B (out, rank), as they are now."""
        return self.layer.lora_A[self.name].weight, self.layer.lora_B[self.name].weight

    @property
    def width(self) -> int:
        """Of its input or its output, whichever is wider."""
        a, b = self.factors
        return max(a.shape[1], b.shape[0])


def _plain(layer: Any) -> _Plain:
    (name,) = layer.lora_A
    read = weight_reader(layer.base_layer)
    if read is None:
        raise TypeError(type(layer.base_layer).__name__)
    return _Plain(layer, Frozen(read, layer.base_layer.bias, layer.scaling[name]), name)


def _now(parts: list[_Plain], adapter_names: list[str] | None = None) -> bool:
    """A graph is being built, and the layers are as they were when they were fused."""
    if not torch.is_grad_enabled() or adapter_names is not None:
        return False
    for part in parts:
        layer = part.layer
        if not layer.training or layer.disable_adapters or layer.merged or len(layer.lora_A) != 1:
            return False
        if type(part.factors[0]) is not nn.Parameter or layer.scaling[part.name] != part.frozen.scale:
            return False
    return True


def _given(own: Callable[..., Any], x: torch.Tensor, adapter_names: list[str] | None, width: int) -> Any:
    """PEFT's own path, with the adapter of each row where they are given; `width`: of its input or output.

    Without a graph some tokens at a time, where there are many: it makes float32 of all of it.
    """
    if adapter_names is not None:
        return own(x, adapter_names=adapter_names)
    return own(x) if torch.is_grad_enabled() else by_pieces(own, x, width=width, element=4)


def _dtype(x: torch.Tensor) -> torch.dtype:
    """What products are computed in: autocast's dtype where it is on, else the input's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _project(x: torch.Tensor, parts: list[_Plain]) -> tuple[torch.Tensor, ...]:
    factors = [matrix for part in parts for matrix in part.factors]
    return Projections.apply(x, [part.frozen for part in parts], _dtype(x), *factors)  # type: ignore[no-any-return]


def _replace(module: Any, forward: Callable[..., Any], fused: Fused) -> None:
    """Give one module another forward pass, until it is undone."""
    module.forward = forward
    fused.restore.append(lambda: module.__dict__.pop("forward", None) and None)


def _fuse_linear(layer: Any, fused: Fused) -> None:
    own, parts = layer.forward, [_plain(layer)]
    width = parts[0].width

    def forward(x: torch.Tensor, adapter_names: list[str] | None = None) -> torch.Tensor:
        if not _now(parts, adapter_names):
            return _given(own, x, adapter_names, width)
        return _project(x, parts)[0]

    _replace(layer, forward, fused)
    fused.linear += 1


def _fuse_qkv(layers: list[Any], fused: Fused) -> None:
    """The first projection computes all three; the other two hand out their part if they are given the same input.

    What waits for the other two is that of one layer of the model: a pass that memory ended between them leaves
    nothing behind but until the next one begins.
    """
    kept = fused.handed
    own, parts = [layer.forward for layer in layers], [_plain(layer) for layer in layers]

    def first(x: torch.Tensor, adapter_names: list[str] | None = None) -> torch.Tensor:
        kept.clear()
        if not _now(parts, adapter_names):
            return _given(own[0], x, adapter_names, parts[0].width)
        outputs = _project(x, parts)
        kept.update({_WHO: parts, 0: x, 1: outputs[1], 2: outputs[2]})
        return outputs[0]

    def other(number: int) -> Callable[..., Any]:
        def forward(x: torch.Tensor, adapter_names: list[str] | None = None) -> torch.Tensor:
            known = number in kept and kept[_WHO] is parts and kept[0] is x
            if not known or not _now(parts, adapter_names):
                return _given(own[number], x, adapter_names, parts[number].width)
            found: torch.Tensor = kept.pop(number)
            if len(kept) == 2:
                kept.clear()  # the input is not held longer than needed
            return found

        return forward

    _replace(layers[0], first, fused)
    for number in (1, 2):
        _replace(layers[number], other(number), fused)
    fused.qkv += 1


def _fuse_mlp(parent: Any, layers: list[Any], activation: Activation, fused: Fused, block: Any) -> None:
    """`block`: the layer of the model that the MLP stands in, which may be recomputed; None where it stands in none."""
    own, parts = parent.forward, [_plain(layer) for layer in layers]
    frozen, width, place = [part.frozen for part in parts], parts[-1].width, Place()

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not _now(parts):
            return _given(own, x, None, width)  # type: ignore[no-any-return]
        factors = [matrix for part in parts for matrix in part.factors]
        if getattr(block, "gradient_checkpointing", False) and block.training:
            return recomputed_mlp(x, frozen, _dtype(x), activation=activation, factors=factors, place=place)
        return GatedMlp.apply(x, frozen, _dtype(x), activation, *factors)

    _replace(parent, forward, fused)
    fused.mlp += 1


def _gated_mlp(
    parent: nn.Module, children: dict[str, nn.Module], known: dict[Any, Activation | None]
) -> tuple[list[Any], Activation | None]:
    """The layers of a gated MLP, and its activation; None where it computes something else (`probe.py`).

    Asked once for all parents that are made alike.
    """
    for names in MLPS:
        if not (_all_plain(children, names) and _takes_one(parent)):
            continue
        layers = [children[name] for name in names]
        rest = tuple(f"{name} {child}" for name, child in children.items() if name not in names)
        own = tuple(f"{name} {value!r}" for name, value in vars(parent).items() if name[0] != "_")
        kind = (type(parent), names, type(layers[0].base_layer), rest, own)
        if kind not in known:
            known[kind] = activation_of(parent, layers)
        return layers, known[kind]
    return [], None


def _takes_one(module: nn.Module) -> bool:
    """Its forward pass has one input: with a second one, such as a gate, it may compute something else."""
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    return kinds == [inspect.Parameter.POSITIONAL_OR_KEYWORD]


def _fuse_norms(model: nn.Module, fused: Fused) -> None:
    """Every module that computes w · x / rms(x), or (1 + w) · x / rms(x), with a frozen weight."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not (isinstance(weight, nn.Parameter) and weight.dim() == 1 and isinstance(epsilon, float)):
            continue
        if not _takes_one(module):
            continue
        offset = offset_of(module, weight, epsilon)
        if offset is not None and not weight.requires_grad:
            _fuse_norm(module, epsilon, offset, fused)


def _fuse_norm(module: Any, epsilon: float, offset: float, fused: Fused) -> None:
    own = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return by_pieces(own, x, width=x.shape[-1], element=4)
        if x.dtype != module.weight.dtype or not x.requires_grad:
            return own(x)  # type: ignore[no-any-return]
        return RmsNorm.apply(x, module.weight, epsilon, offset)

    _replace(module, forward, fused)
    fused.norms += 1

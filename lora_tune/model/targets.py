"""What the names in the `lora` section mean in a loaded base: layers with an adapter, modules trained in full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lora_tune.errors import Problem, RecipeError
from lora_tune.model import base_fit
from lora_tune.model.base_config import stored_bits
from lora_tune.model.base_fit import end_of, matches
from lora_tune.model.source import BaseSource
from lora_tune.recipe import Base, Lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class NamedModules:
    """Sorted, explicit names as they are saved: never `all-linear`, never a pattern."""

    targets: tuple[str, ...]
    modules_to_save: tuple[str, ...]


def named_modules(model: PreTrainedModel, lora: Lora, *, source: BaseSource, base: Base) -> NamedModules:
    """Resolve and check the names of the `lora` section against the modules of the base.

    Raises:
        RecipeError: names that match nothing, modules that cannot be trained in full, combinations that cannot work.
    """
    stored = f"{stored_bits(source.config)} bit" if source.quantization is not None else None
    problems = base_fit.combination_problems(lora, quantize=base.quantize, stored=stored)
    linear = linear_layers(model)
    targets = resolve_targets(model, lora)
    refused = (*base_fit.HEADS, *base_fit.EMBEDDINGS)  # have a message of their own
    problems += base_fit.unmatched("lora.targets", [name for name in targets if end_of(name) not in refused], linear)
    adapted = {name: linear[name] for target in targets for name in matches(target, linear)}
    problems += base_fit.adapted_experts(adapted)
    problems += base_fit.unmatched("lora.rank_pattern", lora.rank_pattern, adapted)
    problems += base_fit.unmatched("lora.alpha_pattern", lora.alpha_pattern, adapted)
    names = [name for name, _ in model.named_modules()]
    problems += base_fit.unmatched("lora.modules_to_save", lora.modules_to_save, names)
    problems += base_fit.full_training_problems(lora, linear, adapted, quantize=base.quantize)
    problems += [problem for problem in base_fit.rank_problems(lora, adapted) if problem.severity == "error"]
    if lora.modules_to_save and model.dtype == torch.float16:
        reason = "modules trained in full keep the dtype of the base, and float16 weights cannot be trained"
        fix = "set base.compute_dtype: float32, or leave them out"
        problems.append(Problem(reason, fix, key="lora.modules_to_save"))
    if problems:
        raise RecipeError(problems)
    return NamedModules(tuple(targets), tuple(sorted(_unambiguous(lora.modules_to_save, names))))


def linear_layers(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Every linear layer but the output head, by name, with (out, in)."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear):
            shapes[name] = module.out_features, module.in_features
        elif isinstance(module, Conv1D):
            shapes[name] = module.weight.shape[1], module.weight.shape[0]
    return shapes


def resolve_targets(model: PreTrainedModel, lora: Lora) -> list[str]:
    """The sorted names of the layers that get an adapter; `all-linear` is every linear layer but the output head."""
    if lora.targets != "all-linear":
        return sorted(lora.targets)
    linear = linear_layers(model)
    others = {end_of(name) for name, _ in model.named_modules() if name not in linear}
    return sorted({name if end_of(name) in others else end_of(name) for name in linear})


def _unambiguous(names: tuple[str, ...], modules: list[str]) -> set[str]:
    """Names by which PEFT finds the same modules: it compares ends of text, so that `norm` is `input_layernorm` too."""
    found: set[str] = set()
    for name in names:
        meant = matches(name, modules)
        found.update([name] if [m for m in modules if m.endswith(name)] == meant else meant)
    return found

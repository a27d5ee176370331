"""Adapter methods: one table, one function that fills PEFT's LoraConfig, and the plain LoRA or DoRA that is saved."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import model as peft_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import nn

from lora_tune.errors import Problem, RecipeError, UsageError
from lora_tune.imports import is_in_use
from lora_tune.model import initialisation
from lora_tune.model.base import fit_embeddings, full_weight
from lora_tune.model.base_fit import end_of
from lora_tune.model.divided import as_divided, standing, whole
from lora_tune.model.rate import rate_of
from lora_tune.model.source import BaseSource, load_tokenizer
from lora_tune.model.targets import NamedModules, named_modules
from lora_tune.recipe import EMBEDDING_NAMES, Base, Lora, Train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"
Factors = Callable[[torch.Tensor, int, float], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Method:
    """What distinguishes an adapter method.

    `factors` computes A and B from a (out, in) matrix, rank and scale; `of` says which matrix: the full-precision
    weight, or the residual that quantization took from it. `inputs` fills A from the layers' inputs instead.
    """

    dora: Literal["yes", "no"] = "no"
    scale: Literal["alpha/rank", "alpha/sqrt(rank)"] = "alpha/rank"
    factors: Factors | None = None
    of: Literal["weight", "residual", "inputs", "nothing"] = "nothing"

    @property
    def anchored(self) -> bool:
        """Whether the start is subtracted again, which doubles the saved rank."""
        return self.of == "weight"


METHODS: dict[str, Method] = {
    "lora": Method(),  # arXiv 2106.09685
    "rslora": Method(scale="alpha/sqrt(rank)"),  # arXiv 2312.03732
    "dora": Method(dora="yes"),  # arXiv 2402.09353
    "pissa": Method(factors=initialisation.pissa_factors, of="weight"),
    "olora": Method(factors=initialisation.olora_factors, of="weight"),
    "loftq": Method(factors=initialisation.loftq_factors, of="residual"),
    "eva": Method(of="inputs"),
}


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as PEFT's files hold it: the content of adapter_config.json and of adapter_model.safetensors."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def attach(
    model: PreTrainedModel,
    lora: Lora,
    *,
    source: BaseSource,
    base: Base,
    seed: int,
    batches: Iterable[Mapping[str, torch.Tensor]] | None = None,
    start: SavedAdapter | None = None,
) -> PeftModel:
    """Put a trainable adapter on a loaded base; the base's own weights stay untouched, whatever the method.

    `batches` (input_ids, attention_mask, position_ids) are needed by eva alone; `start` is the adapter to continue.
    Adapter weights are float32 for every compute dtype: updates of a late, small learning rate vanish in 16 bit.
    The global random state is left as it was.

    Raises:
        RecipeError: targets, patterns or modules that match nothing; `start` of another shape; eva without batches.
        UsageError: the full-precision weights for pissa, olora or loftq are not in the base's files.
    """
    named = named_modules(model, lora, source=source, base=base)
    config = lora_config(lora, named, source=source, token_ids=_new_token_ids(model, lora, source))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
        torch.manual_seed(seed)
        for message in _UPSTREAM_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        with without_bitsandbytes():
            peft_model = get_peft_model(model, config, adapter_name=ADAPTER)
        _initialise(peft_model, lora, source=source, base=base, batches=batches)
    if start is not None:
        _continue(peft_model, start)
    return peft_model


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """While an adapter is attached: PEFT does not import bitsandbytes, which nobody has used so far, for its layers."""
    names = () if is_in_use("bitsandbytes") else ("is_bnb_available", "is_bnb_4bit_available")
    asked = {name: getattr(peft_lora, name) for name in names}
    try:
        for name in asked:
            setattr(peft_lora, name, lambda: False)
        yield
    finally:
        for name, function in asked.items():
            setattr(peft_lora, name, function)


# tied embeddings are handled (PEFT ties the trained rows); fan_in_fan_out is set by PEFT itself for GPT-2's layers
_UPSTREAM_WARNINGS = (
    ".*tie_word_embeddings.*",
    ".*ensure_weight_tying.*",
    ".*fan_in_fan_out.*",
    ".*is_gradient_checkpointing.*",  # PEFT asks by the old name
    ".*base_model_name_or_path.*renamed.*",  # the name is recorded, not where the base lies
)


def lora_config(
    lora: Lora, named: NamedModules, *, source: BaseSource, token_ids: Mapping[str, list[int]] | None
) -> LoraConfig:
    """The one place that fills PEFT's LoraConfig. Anchored methods train rank r and hold rank 2·r."""
    method = METHODS[lora.method]
    factor = 2 if method.anchored else 1
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=source.name,
        revision=source.revision,
        r=lora.rank * factor,
        lora_alpha=_number(lora.alpha * factor),
        lora_dropout=lora.dropout,
        target_modules=list(named.targets),
        modules_to_save=list(named.modules_to_save) or None,
        rank_pattern={name: rank * factor for name, rank in sorted(lora.rank_pattern.items())},
        alpha_pattern={name: _number(alpha * factor) for name, alpha in sorted(lora.alpha_pattern.items())},
        trainable_token_indices=dict(token_ids) if token_ids else None,
        use_rslora=method.scale == "alpha/sqrt(rank)",
        use_dora=method.dora == "yes",
        init_lora_weights=True,
        bias="none",
    )


def _number(value: float) -> Any:
    """A whole number as int: some servers read alpha as an integer."""
    return int(value) if float(value).is_integer() else value


def _new_token_ids(model: PreTrainedModel, lora: Lora, source: BaseSource) -> dict[str, list[int]] | None:
    """Row numbers of the new tokens, for the embedding and, where it is not tied to it, the output head."""
    if not lora.new_tokens:
        return None
    tokenizer = load_tokenizer(source, new_tokens=lora.new_tokens)
    vocabulary = tokenizer.get_vocab()
    ids = sorted(vocabulary[token] for token in lora.new_tokens)
    fit_embeddings(model, ids[-1] + 1)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): end_of(name) for name, module in model.named_modules()}
    rows = {names[id(embedding)]: ids}
    if head is not None and head.weight is not embedding.weight:
        rows[names[id(head)]] = ids
    return rows


def _layers(model: PeftModel) -> dict[str, Any]:
    """The adapted layers by their name in the base."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }


@torch.no_grad()
def _initialise(
    model: PeftModel,
    lora: Lora,
    *,
    source: BaseSource,
    base: Base,
    batches: Iterable[Mapping[str, torch.Tensor]] | None,
) -> None:
    method = METHODS[lora.method]
    if method.of == "inputs":
        _initialise_from_inputs(model, batches)
    if method.factors is None:
        return
    stored = initialisation.StoredWeights(source) if base.quantize != "none" else None
    for name, layer in _layers(model).items():
        weight = quantized = full_weight(layer.get_base_layer())
        if stored is not None:
            weight = stored.read(name, like=quantized)
        scale = layer.scaling[ADAPTER]
        if method.anchored:
            a, b = method.factors(weight, layer.r[ADAPTER] // 2, scale)
            layer.lora_A[ADAPTER] = initialisation.AnchoredLinear(a, dim=0)
            layer.lora_B[ADAPTER] = initialisation.AnchoredLinear(b, dim=1)
        else:
            a, b = method.factors(weight - quantized, layer.r[ADAPTER], scale)
            layer.lora_A[ADAPTER].weight.copy_(a)
            layer.lora_B[ADAPTER].weight.copy_(b)


def _initialise_from_inputs(model: PeftModel, batches: Iterable[Mapping[str, torch.Tensor]] | None) -> None:
    layers = _layers(model)
    ranks = {name: layer.r[ADAPTER] for name, layer in layers.items()}
    with model.disable_adapter():
        found = initialisation.input_directions(model.get_base_model(), ranks, batches or ())
    if not found:
        raise RecipeError(
            Problem("eva starts from training rows, but none were given", "set lora.method: lora", key="lora.method")
        )
    for name, directions in found.items():
        layers[name].lora_A[ADAPTER].weight[: len(directions)].copy_(directions)


def check_start(start: SavedAdapter, base: Base) -> None:
    """Refuse an adapter to go on from that trains what `base.embeddings: cpu` keeps frozen. Raises RecipeError."""
    kept = start.config.get("modules_to_save") or ()
    trained = [name for name in kept if name.rpartition(".")[2] in EMBEDDING_NAMES]
    if base.embeddings == "cpu" and (trained or start.config.get("trainable_token_indices")):
        reason = "keeps the embedding frozen, but the adapter of lora.start_from trains it"
        raise RecipeError(Problem(reason, "set it to device", key="base.embeddings"))


def _continue(model: PeftModel, start: SavedAdapter) -> None:
    """Load the weights of another adapter as the start; its shapes and scale must be those of the recipe."""
    key, ours = "lora.start_from", model.peft_config[ADAPTER].to_dict()
    fields = {"r": "rank", "lora_alpha": "alpha", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"}
    problems = [
        Problem(f"that adapter has {field} {start.config.get(field)}, not {ours[field]}", f"set lora.{name}", key=key)
        for field, name in fields.items()
        if (start.config.get(field) or {}) != (ours[field] or {})
    ]
    problems += [
        Problem(f"that adapter is {'' if start.config.get(flag) else 'not '}{name}", "set lora.method", key=key)
        for flag, name in (("use_rslora", "rslora"), ("use_dora", "dora"))
        if bool(start.config.get(flag)) != bool(ours[flag])
    ]
    if problems:
        raise RecipeError(problems)
    here = {name: tuple(tensor.shape) for name, tensor in adapter_state(model).items()}
    there = {name: tuple(tensor.shape) for name, tensor in start.tensors.items()}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise RecipeError(
                Problem(
                    f"that adapter does not fit the recipe: {name} is {_shape(there.get(name))} there, "
                    f"{_shape(here.get(name))} here",
                    "set lora.targets, lora.modules_to_save and lora.new_tokens as they were for it",
                    key=key,
                )
            )
    load_adapter_state(model, start.tensors)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "×".join(str(size) for size in shape)


def cast_inputs(model: nn.Module, *, to: Literal["adapter dtype", "autocast"]) -> None:
    """Who brings an adapter's input to the dtype of its product: PEFT, in float32, or autocast in its own dtype.

    Under autocast PEFT's cast is a float32 copy of every input for nothing (a sixth of a step in bfloat16 on a CPU).
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = to == "adapter dtype"


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Every tensor of the adapter as it is trained, frozen anchors included, under PEFT's names: for checkpoints."""
    with standing(model):
        return dict(get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False))


@torch.no_grad()
def load_adapter_state(model: PeftModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `adapter_state` gave, in place; parameters keep their identity and dtype.

    Raises:
        UsageError: a tensor is missing or belongs nowhere.
    """
    expected = adapter_state(model).keys()
    odd = sorted(expected ^ tensors.keys())
    if odd:
        raise UsageError(f"adapter state: {len(odd)} tensors missing or unknown, got {odd[:3]}", "use the same recipe")
    anchored = {
        f"base_model.model.{name}.lora_{letter}.weight": pair[ADAPTER]
        for name, layer in _layers(model).items()
        for letter, pair in (("A", layer.lora_A), ("B", layer.lora_B))
        if isinstance(pair[ADAPTER], initialisation.AnchoredLinear)
    }
    with standing(model, "write"):
        for name, own in adapter_state(model).items():  # sharing the parameters' memory, anchored ones apart
            if name in anchored:
                anchored[name].load_state_dict({"weight": tensors[name]})
            else:
                own.copy_(as_divided(tensors[name], own))


def saved_adapter(model: PeftModel, *, lora: Lora, source: BaseSource) -> SavedAdapter:
    """The adapter as it is saved: plain LoRA or DoRA against the untouched base, whatever the method.

    Tensors are on the CPU, contiguous, named as PEFT names them; float32, but for modules trained in full, which keep
    the dtype of the base. Lists in the config are sorted. Adapters of pissa and olora have twice the rank and alpha of
    the recipe; their factors are balanced (`initialisation.compact`).

    Raises:
        UsageError: a tensor holds NaN or infinity.
    """
    tensors = {name: whole(tensor.detach()).to("cpu") for name, tensor in adapter_state(model).items()}
    broken = sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())
    if broken:
        raise UsageError(
            f"the adapter has {len(broken)} tensors with NaN or infinity, got {broken[0]}",
            "training diverged: lower train.learning_rate",
        )
    if METHODS[lora.method].anchored:
        for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
            other = name.replace(".lora_A.", ".lora_B.")
            tensors[name], tensors[other] = initialisation.compact(tensors[name], tensors[other])
    config = {key: _plain(value) for key, value in sorted(model.peft_config[ADAPTER].to_dict().items())}
    config.update(base_model_name_or_path=source.name, revision=source.revision, inference_mode=True)
    return SavedAdapter(config, {name: tensors[name].contiguous().clone() for name in sorted(tensors)})


def _plain(value: Any) -> Any:
    """JSON values: enums by their value, sets and lists of text sorted."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return sorted(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in sorted(value.items())}
    return value


def parameter_groups(model: nn.Module, *, lora: Lora, train: Train) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters: weight decay for matrices only; for LoRA+ a higher rate for B.

    LoRA+ (arXiv 2402.12354): the learning rate of B is `plus_ratio` times that of A.
    """
    ratio = lora.plus_ratio or 1.0
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = rate_of(train) * (ratio if ".lora_B." in name or ".lora_embedding_B." in name else 1.0)
        plain_matrix = parameter.dim() >= 2 and "trainable_tokens" not in name
        groups.setdefault((rate, train.weight_decay if plain_matrix else 0.0), []).append(parameter)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]

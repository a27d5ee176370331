"""`adapter_config.json` under an allow-list: what each field may hold, and what it means for the tensors. No torch.

PEFT obeys this file when it loads an adapter: it may rebuild or overwrite the base, import modules, match regular
expressions or allocate by its numbers. So a field is either understood here or has to be off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_tune.errors import Problem

MOST_RANK = 1024
MOST_SCALE = 1000.0  # of the update; alpha / r is 0.5 to 4 in practice, alpha / sqrt(r) up to about 50
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_LOOKS_OTHERWISE = re.compile(r"|true|false|null|[-+.\d]+(e[-+]?\d+)?", re.IGNORECASE)  # text that could be a number
_MOST_NAMES = 4096
_HARMLESS_INIT = (True, False, None, "gaussian", "orthogonal", "eva")  # all others change the base's weights at load

Check = Callable[[Any], str | None]
"""What a value must be, or None where it is right."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The settings of a checked adapter that its tensors follow from."""

    rank: int
    alpha: float
    targets: tuple[str, ...] | str
    excluded: tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    trained_tokens: Mapping[str, int]
    """{embedding: number of tokens}; the name "" stands for the input embeddings."""
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    transposed: bool
    """Weights are stored as (in, out), as in GPT-2 (`fan_in_fan_out`)."""
    base_name: str | None
    base_revision: str | None

    def rank_of(self, module: str) -> int:
        """The rank of one module's update."""
        return _of_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """By what a module's B·A is multiplied: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        rank = self.rank_of(module)
        return _of_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def check_config(content: Mapping[str, Any]) -> list[Problem]:
    """Everything that keeps an adapter from being loaded, one problem for each field."""
    problems = []
    for field in ("peft_type", "r", "lora_alpha", "target_modules"):
        if field not in content and content.get("peft_type", "LORA") == "LORA":
            problems.append(Problem("is missing", "a LoRA adapter needs it", key=field))
    kind = content.get("peft_type")
    if kind != "LORA":
        return [
            Problem(f"not supported: peft_type must be LORA, got {_shown(kind)}", "use a LoRA adapter", key="peft_type")
        ]
    for field, value in content.items():
        check = FIELDS.get(field)
        wanted = check(value) if check else _unknown(value)
        if wanted:
            problems.append(Problem(f"{wanted}, got {_shown(value)}", key=field[:80]))
    if not problems and (settings := read_settings(content)):
        problems += _check_scales(settings)
    return problems


def read_settings(content: Mapping[str, Any]) -> LoraSettings:
    """The settings of a configuration that `check_config` found no fault with."""
    layers, pattern = content.get("layers_to_transform"), content.get("layers_pattern")
    tokens = content.get("trainable_token_indices") or {}
    targets = content["target_modules"]
    return LoraSettings(
        rank=content["r"],
        alpha=float(content["lora_alpha"]),
        targets=targets if isinstance(targets, str) else tuple(targets),
        excluded=tuple(content.get("exclude_modules") or ()),
        layers=(layers,) if isinstance(layers, int) else tuple(layers) if layers else None,
        layers_pattern=(pattern,) if isinstance(pattern, str) else tuple(pattern or ()),
        modules_to_save=tuple(content.get("modules_to_save") or ()),
        trained_tokens={"": len(tokens)}
        if isinstance(tokens, list)
        else {name: len(ids) for name, ids in tokens.items()},
        rank_pattern=content.get("rank_pattern") or {},
        alpha_pattern=content.get("alpha_pattern") or {},
        rslora=bool(content.get("use_rslora")),
        dora=bool(content.get("use_dora")),
        transposed=bool(content.get("fan_in_fan_out")),
        base_name=content.get("base_model_name_or_path"),
        base_revision=content.get("revision"),
    )


def _check_scales(settings: LoraSettings) -> list[Problem]:
    names = ["", *settings.rank_pattern, *settings.alpha_pattern]
    worst = max(names, key=settings.scale_of)
    scale = settings.scale_of(worst)
    if scale <= MOST_SCALE:
        return []
    reason = f"alpha / r is out of bounds: the update would be multiplied by {scale:.3g}, at most {MOST_SCALE:g}"
    return [Problem(reason, "lower it", key="alpha_pattern" if worst else "lora_alpha")]


def _of_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first name that is the module's name or its end, after a dot."""
    return next((value for name, value in pattern.items() if names_module(name, module)), default)


def names_module(name: str, module: str) -> bool:
    """Whether `name` (`q_proj`, `self_attn.q_proj`, `layers.0.mlp.up_proj`) means the module with this full name."""
    return module == name or module.endswith("." + name)


def _shown(value: Any) -> str:
    text = "true" if value is True else "false" if value is False else "null" if value is None else str(value)
    text = repr(value) if isinstance(value, str) and _LOOKS_OTHERWISE.fullmatch(value) else text
    return text if len(text) <= 60 else text[:57] + "…"


def _unknown(value: Any) -> str | None:
    """Newer versions of PEFT write new fields; one that is off changes nothing."""
    return (
        None if value in (None, False, "") or value == {} or value == [] else "not supported: unknown field must be off"
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 400 and _NAME.fullmatch(value) is not None


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MOST_NAMES and all(_is_name(item) for item in value)


def _rank(value: Any) -> str | None:
    return None if type(value) is int and 1 <= value <= MOST_RANK else f"must be a whole number from 1 to {MOST_RANK}"


def _alpha(value: Any) -> str | None:
    return None if _is_number(value) and value > 0 else "must be a finite number above 0"


def _targets(value: Any) -> str | None:
    if value == "all-linear" or (_are_names(value) and value):
        return None
    if value is None:
        return "not supported: no target modules"
    if isinstance(value, str):
        return "not supported: a regular expression; must be a list of module names or all-linear"
    return "must be a list of module names or all-linear"


def _names(value: Any) -> str | None:
    return None if value is None or _are_names(value) else "must be a list of module names"


def _name_or_names(value: Any) -> str | None:
    return None if _is_name(value) else _names(value)


def _layers(value: Any) -> str | None:
    numbers = [value] if type(value) is int else value
    right = numbers is None or (
        isinstance(numbers, list) and len(numbers) <= _MOST_NAMES and all(type(n) is int and n >= 0 for n in numbers)
    )
    return None if right else "must be a list of layer numbers"


def _pattern_of(check: Check) -> Check:
    def _values(value: Any) -> str | None:
        if value is None:
            return None
        if not isinstance(value, dict) or len(value) > _MOST_NAMES or not all(_is_name(name) for name in value):
            return "must map module names (no regular expressions)"
        return next((wanted for wanted in map(check, value.values()) if wanted), None)

    return _values


def _token_ids(value: Any) -> str | None:
    lists = list(value.values()) if isinstance(value, dict) else [] if value is None else [value]
    right = all(
        isinstance(ids, list) and all(type(n) is int and 0 <= n < 1 << 24 for n in ids) and len(set(ids)) == len(ids)
        for ids in lists
    )
    named = not isinstance(value, dict) or all(_is_name(name) for name in value)
    return None if right and named else "must be a list of token ids, or {embedding: list}"


def _flag(value: Any) -> str | None:
    return None if value is None or isinstance(value, bool) else "must be true or false"


def _text(value: Any) -> str | None:
    return None if value is None or (isinstance(value, str) and len(value) <= 4096) else "must be text"


def _task(value: Any) -> str | None:
    return None if value in ("CAUSAL_LM", None) else "not supported: task_type must be CAUSAL_LM"


def _auto_mapping(value: Any) -> str | None:
    """PEFT imports what stands here; only transformers' own causal language models are named by honest folders."""
    if value is None:
        return None
    fields = isinstance(value, dict) and set(value) == {"base_model_class", "parent_library"}
    if fields and all(isinstance(item, str) for item in value.values()):
        library, model = value["parent_library"], value["base_model_class"]
        if re.fullmatch(r"transformers\.models(\.\w+)+", library) and model.endswith("ForCausalLM"):
            return None
    return "not supported: auto_mapping may only name a causal language model of transformers"


def _init(value: Any) -> str | None:
    if any(value is known or (isinstance(known, str) and value == known) for known in _HARMLESS_INIT):
        return None
    return "not supported: init_lora_weights changes the base's weights at load"


def _one_of(values: tuple[str, ...], wanted: str) -> Check:
    return lambda value: None if value in values else wanted


def _off(feature: str) -> Check:
    return lambda value: None if value in (None, False) or value == {} or value == [] else f"not supported: {feature}"


def _anything(value: Any) -> str | None:
    return None


FIELDS: dict[str, Check] = {
    "peft_type": _text,
    "task_type": _task,
    "auto_mapping": _auto_mapping,
    "peft_version": _text,
    "base_model_name_or_path": _text,
    "revision": _text,
    "inference_mode": _flag,
    "r": _rank,
    "lora_alpha": _alpha,
    "lora_dropout": lambda value: (
        None if _is_number(value) and 0 <= value < 1 else "must be a number from 0 to below 1"
    ),
    "target_modules": _targets,
    "exclude_modules": _names,
    "modules_to_save": _names,
    "layers_to_transform": _layers,
    "layers_pattern": _name_or_names,
    "rank_pattern": _pattern_of(_rank),
    "alpha_pattern": _pattern_of(_alpha),
    "trainable_token_indices": _token_ids,
    "init_lora_weights": _init,
    "fan_in_fan_out": _flag,
    "use_rslora": _flag,
    "use_dora": _flag,
    "ensure_weight_tying": _flag,
    "bias": lambda value: None if value in ("none", None) else "not supported: trained biases; bias must be none",
    "megatron_core": lambda value: (
        None if value in ("megatron.core", None) else "not supported: names a module to import"
    ),
    "megatron_config": _off("megatron_config"),
    "loftq_config": _off("loftq_config changes the base's weights at load"),
    "layer_replication": _off("layer_replication rebuilds the base"),
    "runtime_config": _off("runtime_config is not an adapter's business"),
    "target_parameters": _off("target_parameters"),
    "lora_bias": _off("lora_bias"),
    "alora_invocation_tokens": _off("alora_invocation_tokens"),
    "arrow_config": _off("arrow_config"),
    "corda_config": _off("corda_config changes the base's weights at load"),
    "lora_ga_config": _off("lora_ga_config changes the base's weights at load"),
    "eva_config": _anything,  # where the numbers of A came from; read by nobody at load
    "kasa_config": _off("kasa_config"),
    "monteclora_config": _off("monteclora_config"),
    "velora_config": _off("velora_config"),
    "use_bdlora": _off("use_bdlora"),
    "use_qalora": _off("use_qalora"),
    "qalora_group_size": _anything,  # without use_qalora it means nothing
}
"""{field of adapter_config.json: check of its value}; a field that is not here must be off."""

"""The shape of an architecture that `shape.py` does not know: its modules are made without memory and counted.

That needs torch and transformers (5 s), which nothing else in a plan does; both are imported inside.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from lora_tune.errors import Problem, UsageError
from lora_tune.model.shape import Linear, Shape, is_known, read_shape

_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "intermediate_size", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a `config.json` describes, by formula where the architecture is known, else by counting modules.

    A base that brings its own Python code is not run for a plan: it is counted as a Llama of its sizes.

    Raises:
        UsageError: a size is missing or impossible, or transformers does not know the architecture either.
    """
    if is_known(config) or "auto_map" in config:
        return read_shape(config)
    return _counted(config)


def _counted(config: Mapping[str, Any]) -> Shape:
    model_type = str(config.get("model_type") or "")
    where = f"model type {model_type!r}"
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = AutoConfig.for_model(model_type, **plain)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        said = _first_line(error).partition(". Should contain")[0]
        reason = f"{where}: transformers {version('transformers')} cannot read it: {said}"
        raise UsageError(Problem(reason, "a newer transformers may know it", key="base.name")) from None
    text = settings.get_text_config()
    standard = {name: getattr(text, name, None) for name in _SIZES}
    shape = read_shape({**plain, **{key: value for key, value in standard.items() if value is not None},
                        "model_type": model_type})  # fmt: skip
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(text)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        reason = f"{where}: transformers {version('transformers')} cannot make the model: {_first_line(error)}"
        raise UsageError(Problem(reason, "take a causal language model", key="base.name")) from None
    return _with_modules(shape, model)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _with_modules(shape: Shape, model: Any) -> Shape:
    """The shape with the linear layers, embeddings and other weights that the model really has."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    counts: dict[tuple[str, int, int], int] = {}
    for name, module in model.named_modules():
        if module is head or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        first, second = module.weight.shape
        outputs, inputs = (first, second) if isinstance(module, nn.Linear) else (second, first)
        key = (name.rpartition(".")[2], int(inputs), int(outputs))
        counts[key] = counts.get(key, 0) + 1
    linears = tuple(Linear(name, inputs, outputs, count) for (name, inputs, outputs), count in counts.items())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    in_linears = sum(linear.parameters for linear in linears)
    experts = sum(
        weight.numel() for name, weight in model.named_parameters() if ".experts." in name and weight.dim() == 3
    )
    tied = head is None or head.weight is embedding.weight or bool(model.config.tie_word_embeddings)
    vocabulary, hidden = (int(size) for size in embedding.weight.shape)
    if tied and head is not None and head.weight is not embedding.weight:
        parameters -= head.weight.numel()
    rest = parameters - in_linears - experts - vocabulary * hidden * (1 if tied else 2)
    return replace(
        shape,
        hidden=hidden,
        vocabulary=vocabulary,
        tied=tied,
        linears=linears or shape.linears,
        expert_parameters=experts,
        other_parameters=max(0, rest),
    )

"""The one loader of adapters in the project: whatever it loads has passed the checks first.

PEFT's own loading obeys the folder: it may rewrite the base's weights (`init_lora_weights`), overwrite them (a tensor
named like one of the base's) or leave out what does not fit, without a word. Here the layers are made from settings
that were checked, and the tensors are put into exactly these layers, in the dtype of the file; all else is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from lora_tune.adapter.checks import Subject, run_checks
from lora_tune.adapter.expected_keys import PREFIX
from lora_tune.adapter.folder import CONFIG, WEIGHTS
from lora_tune.errors import CheckFailed, Problem
from lora_tune.model.base import fit_embeddings
from lora_tune.model.methods import SavedAdapter, without_bitsandbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SETTINGS = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "trainable_token_indices", "fan_in_fan_out", "use_rslora", "use_dora",
    "ensure_weight_tying",
)  # fmt: skip
"""Fields of `adapter_config.json` that decide what an adapter computes; no other one reaches PEFT."""


_UPSTREAM_WARNINGS = (".*tie_word_embeddings.*", ".*ensure_weight_tying.*", ".*is_gradient_checkpointing.*")


def read_adapter(folder: Path) -> SavedAdapter:
    """The configuration and the tensors of an adapter folder, on the CPU, in the dtypes of the file.

    Raises: CheckFailed with every problem that the checks without a base find.
    """
    subject = Subject(folder)
    _refuse(run_checks(subject))
    return SavedAdapter(config=subject.content, tensors=load_file(folder / WEIGHTS))


def load_adapter(model: PreTrainedModel, folder: Path, *, name: str = "default") -> PeftModel:
    """Put the adapter of a folder on a base, for use, not for training; the base's own weights stay as they are.

    `model` is wrapped and changed in place, like by PEFT itself. The global random numbers are not touched.

    Raises: CheckFailed where the folder fails a check, or its tensors are not exactly those that the base implies.
    """
    subject = Subject(folder, shapes=live_shapes(model))
    _refuse(run_checks(subject))
    return attach_saved(model, SavedAdapter(config=subject.content, tensors=load_file(folder / WEIGHTS)), name=name)


def attach_saved(model: PreTrainedModel | PeftModel, saved: SavedAdapter, *, name: str = "default") -> PeftModel:
    """Put an adapter that is already in memory, and checked, on a base, or beside the adapters that are on it.

    Raises: CheckFailed where it does not fit.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    _make_room(cast("PreTrainedModel", base), saved.config.get("trainable_token_indices"))
    settings = {key: saved.config[key] for key in _SETTINGS if saved.config.get(key) is not None}
    if settings.get("target_modules") == "all-linear":
        settings["target_modules"] = _updated_modules(saved.tensors)
    config = LoraConfig(task_type="CAUSAL_LM", inference_mode=True, lora_dropout=0.0, **settings)
    devices = [device for device in {parameter.device for parameter in model.parameters()} if device.type == "cuda"]
    with (
        torch.random.fork_rng(devices=devices),  # PEFT draws A, which is overwritten below
        warnings.catch_warnings(),
        without_bitsandbytes(),
    ):
        for message in _UPSTREAM_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        if isinstance(model, PeftModel):
            wrapped = model
            wrapped.add_adapter(name, config, autocast_adapter_dtype=False)
        else:
            wrapped = get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=False)
    try:
        _put(wrapped, saved.tensors, name=name)
    except BaseException:  # the model is left as it was
        if wrapped is model:
            detach(wrapped, name)
        else:
            wrapped.unload()
        raise
    wrapped.requires_grad_(False)
    return wrapped.eval()


def read_checked(folder: Path, *, shapes: Mapping[str, tuple[int, ...]]) -> SavedAdapter:
    """An adapter of a folder, on the CPU, checked against the shapes of its base (`live_shapes` before any adapter).

    Raises: CheckFailed with every problem.
    """
    subject = Subject(folder, shapes=dict(shapes))
    _refuse(run_checks(subject))
    return SavedAdapter(config=subject.content, tensors=load_file(folder / WEIGHTS))


def detach(model: PeftModel, name: str) -> None:
    """Take one adapter off a model; the base and the other adapters stay as they are.

    Another one should be the active adapter, or none.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was active which is now deleted.*")
        model.delete_adapter(name)


def _updated_modules(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The modules that the tensors name. PEFT's own `all-linear` takes in heads that other adapters have wrapped."""
    return sorted({key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors if ".lora_" in key})


def _make_room(model: PreTrainedModel, trained: Mapping[str, list[int]] | list[int] | None) -> None:
    """Rows of the embedding for new tokens, as at training; they must follow the base's own."""
    ids = {index for part in (trained.values() if isinstance(trained, Mapping) else [trained or []]) for index in part}
    rows = model.config.get_text_config().vocab_size
    if ids and max(ids) >= rows + len(ids):
        reason = (
            f"trains token {max(ids)}, but the base has {rows} rows of embeddings and {len(ids)} tokens are trained"
        )
        raise CheckFailed(Problem(reason, "give the base of this adapter", CONFIG, key="trainable_token_indices"))
    needed = max(ids, default=-1) + 1
    holders = [model.get_input_embeddings(), model.get_output_embeddings()]
    if needed > rows and not all(type(one) in (torch.nn.Embedding, torch.nn.Linear, type(None)) for one in holders):
        reason = "adds tokens to the base, but an adapter beside it holds the embeddings or the head as they were"
        raise CheckFailed(Problem(reason, "load it before the others, or by itself", CONFIG))
    fit_embeddings(model, needed)


def live_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """{parameter: shape} of a loaded base; a quantized matrix has its real shape (out, in), not the packed one."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            shapes[f"{name}.weight"] = (module.out_features, module.in_features)
    return shapes


def _put(model: PeftModel, tensors: Mapping[str, torch.Tensor], *, name: str) -> None:
    """Give every tensor of the adapter, shapes as in the file, to the one parameter that it belongs to."""
    slots = _slots(model, name)
    missing, extra = sorted(slots.keys() - tensors.keys()), sorted(tensors.keys() - slots.keys())
    for fault, keys in (("is missing", missing), ("has no place in this base", extra)):
        if keys:
            raise CheckFailed(
                Problem(f"{len(keys)} tensors: {keys[0]} {fault}", "give the base of this adapter", WEIGHTS)
            )
    own = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    for key, slot in slots.items():
        parameter, tensor = own[slot.data_ptr()], tensors[key]
        if parameter.shape != tensor.shape:
            reason = f"{key} must have the shape {list(parameter.shape)}, got {list(tensor.shape)}"
            raise CheckFailed(Problem(reason, "give the base of this adapter", WEIGHTS))
        parameter.data = tensor.to(parameter.device)


def _slots(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """The parameters of one adapter on a model, by their names in a file."""
    try:
        return dict(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    except KeyError:  # PEFT 0.21 asks each adapter for trained tokens where one of them has some
        own = {key: tensor for key, tensor in model.named_parameters() if name in key.split(".")}
        plain = {key.replace(f".{name}", "").replace(".modules_to_save.", "."): one for key, one in own.items()}
        return {key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): one for key, one in plain.items()}


def _refuse(problems: list[Problem]) -> None:
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise CheckFailed(errors)

"""A base that never lies in memory as a whole: each layer's weights are read from its files when the layer runs.

For merging and measuring a base that is larger than the memory: the model is built without weights, and hooks of
accelerate put every module's own weights in before it runs and take them out after. What a weight is may be changed on
the way: rounded to 4 bit and back as in training, or with an adapter folded in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from lora_tune.errors import UsageError
from lora_tune.model.base import device_type, round_trip
from lora_tune.model.source import BaseSource
from lora_tune.model.weights import tensor_infos
from lora_tune.recipe import Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK = 256  # positions whose logits are computed at a time
Change = Callable[[str, torch.Tensor], torch.Tensor]
"""(name of the parameter in the model, stored weight) -> weight to compute with."""


class StoredWeights(Mapping[str, torch.Tensor]):
    """The parameters of a model by their names in it, read one by one from the base's files and changed on the way."""

    def __init__(self, folder: Path, names: Mapping[str, str], *, change: Change) -> None:
        self._files = {name: info.file for name, info in tensor_infos(folder).items()}
        self._names, self._change = names, change

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._names[name]
        with safe_open(self._files[stored], framework="pt") as file:
            return self._change(name, file.get_tensor(stored)).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def sketch(source: BaseSource) -> PreTrainedModel:
    """The model of a base without its weights; buffers are real. Raises: UsageError for an unknown architecture."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"base {source.name!r}: cannot be built: {reason}", "a newer transformers may know it"
        ) from None
    return model.eval()


def hollow(model: PreTrainedModel) -> PreTrainedModel:
    """Give every parameter of a sketch zeros that take no memory: for what looks at shapes and devices alone."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zeros = torch.zeros(1).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(zeros, requires_grad=False))
    return model


def stored_names(model: PreTrainedModel, source: BaseSource) -> dict[str, str] | None:
    """{parameter of the model: tensor of the files}; None where the files hold it in another arrangement.

    A tied head is the embedding; names of old files lack the model's prefix. Mixtures whose experts are stored one by
    one and computed together are such another arrangement.
    """
    stored, prefix = tensor_infos(source.folder), f"{model.base_model_prefix}."
    tied = model.all_tied_weights_keys
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        candidates = [one for key in (name, tied.get(name, name)) for one in (key, key.removeprefix(prefix))]
        found = next((one for one in candidates if one in stored), None)
        if found is None or tuple(stored[found].shape) != tuple(parameter.shape):
            return None
        names[name] = found
    return names


def quantized_names(model: PreTrainedModel) -> frozenset[str]:
    """The parameters that a quantized base holds in 4 or 8 bit: weights of linear layers, but not the output head."""
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear and module is not head]
    return frozenset(f"{name}.weight" for name in linear)


def as_held(base: Base, names: frozenset[str], *, dtype: torch.dtype) -> Change:
    """What the weights of a base held as `base` says are: in `dtype`, those of `names` quantized and back as well."""

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        return round_trip(weight.to(dtype), base) if name in names else weight.to(dtype)

    return change


@torch.no_grad()
def streamed_log_probs(
    model: PreTrainedModel, weights: StoredWeights, rows: Sequence[Sequence[int]], *, pad_id: int
) -> torch.Tensor:
    """Log-probabilities (positions, V), float32 on the CPU, after every id of every row, in one pass over the layers.

    `model` is a sketch and stays one; arithmetic is float32. Rows are padded on the right, padding leaves no trace.
    """
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    device, longest = torch.device(device_type()), max(len(row) for row in rows)
    ids_BT = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows], device=device)
    mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    cpu_offload(model, execution_device=device, state_dict=weights)  # type: ignore[arg-type]  # any mapping does
    try:
        hidden_NH = model.base_model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)[0][mask_BT.bool()]
        head = model.get_output_embeddings()
        return torch.cat([head(part).float().log_softmax(dim=-1).cpu() for part in hidden_NH.split(_CHUNK)])
    finally:
        remove_hook_from_submodules(model)

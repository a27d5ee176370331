"""The base in memory: quantized or not, on GPU or CPU, its dtype always explicit. The only caller of bitsandbytes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError

from lora_tune.errors import ResourceError, UsageError
from lora_tune.imports import is_in_use, quick_imports
from lora_tune.model import hub
from lora_tune.model.base_config import check_trust, stored_bits
from lora_tune.model.kernels.choice import dequantize
from lora_tune.model.missing import attention_problems
from lora_tune.model.offload import keep_embedding_on_host
from lora_tune.model.source import BaseSource
from lora_tune.model.weights import tensor_infos
from lora_tune.recipe import Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def device_type() -> Literal["cuda", "cpu"]:
    """Where a base is loaded: the CUDA GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype(base: Base) -> torch.dtype:
    """The dtype of activations and of unquantized weights.

    `auto` is bfloat16 where the GPU has it in hardware, else float16 (T4, V100, RTX 20); on a CPU it is float32, which
    is as fast there at the sizes that a CPU can train, and gives the same numbers on every machine.
    """
    if base.compute_dtype != "auto":
        return _DTYPES[base.compute_dtype]
    if device_type() == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_base(
    source: BaseSource,
    base: Base,
    *,
    trust_remote_code: str | None = None,
    place: Literal["device", "memory, to be divided"] = "device",
) -> PreTrainedModel:
    """Load the frozen base in evaluation mode; of a hub base this downloads the weights into the hub's cache.

    `trust_remote_code` is the repository whose Python code may run; it must be the base's own. A base that will be
    divided over processes (`divided.py`) comes into the machine's memory, its 4-bit weights in a storage that divides.

    Raises:
        UsageError: weights missing, damaged or of another model; code not trusted; attention not available.
        ResourceError: the weights do not fit into the memory of the device.
    """
    check_trust(source.name, trust_remote_code)
    if lacking := list(attention_problems(base, device_type())):
        raise UsageError(lacking)
    if source.kind == "hub":
        hub.download(source.name, revision=source.revision, patterns=hub.WEIGHT_FILES)
    if not tensor_infos(source.folder):
        raise UsageError(
            f"base {source.name!r}: no safetensors weights there", "pickled weights (.bin) are not read: convert them"
        )
    with _quiet():
        model = _from_pretrained(source, base, trusted=trust_remote_code is not None, divided=place != "device")
    protect_from_repacking(model)
    _warn_of_ragged_rows(model, f"base {source.name!r}")
    _set_dtype(model, compute_dtype(base))
    model.requires_grad_(False)
    if base.embeddings == "cpu":
        keep_embedding_on_host(model)
    return model.eval()


def _from_pretrained(source: BaseSource, base: Base, *, trusted: bool, divided: bool) -> PreTrainedModel:
    with quick_imports():
        from transformers import AutoModelForCausalLM

    where = f"base {source.name!r}"
    settings: dict[str, Any] = {
        "dtype": compute_dtype(base),
        "device_map": {"": "cpu" if divided else device_type()},
        "use_safetensors": True,
        "local_files_only": True,
        "trust_remote_code": trusted,
        "output_loading_info": True,
    }
    if base.attention not in ("auto", "varlen"):  # transformers takes sdpa where the model has it (Gemma 2: eager)
        settings["attn_implementation"] = base.attention
    if base.quantize != "none" and stored_bits(source.config) is None:  # None here would undo what is stored quantized
        settings["quantization_config"] = _quantization(base, divided=divided)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(source.folder), **settings)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{where}: its weights do not fit into GPU memory", "set base.quantize: nf4, or take a smaller base"
        ) from error
    except (ImportError, ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UsageError(f"{where}: cannot be loaded: {reason}", _hint(str(error))) from error
    model, info = loaded
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise UsageError(
            f"{where}: {len(missing)} tensors are missing from its weights or have another shape, got {missing[:3]}",
            "config.json and weights must be of the same model: download the base again",
        )
    if info["unexpected_keys"]:
        unknown = sorted(info["unexpected_keys"])
        _log.warning("%s: %d tensors of its files belong nowhere, such as %s", where, len(unknown), unknown[0])
    return model


def _set_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """A base that is stored quantized comes in the dtype of its files, whatever was asked for."""
    for _, module in linear4bit_modules(model):
        module.compute_dtype = dtype
    stored = model.dtype
    if stored != dtype:
        for parameter in model.parameters():
            if parameter.dtype == stored:
                parameter.data = parameter.data.to(dtype)


def _hint(reason: str) -> str:
    if "flash" in reason.lower():
        return "set base.attention: auto"
    if "does not recognize this architecture" in reason or "model type" in reason:
        return "a newer transformers may know this model type"
    return "check that the folder holds the whole base"


def _quantization(base: Base, *, divided: bool) -> Any:
    from transformers import BitsAndBytesConfig

    if base.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=base.quantize,
        bnb_4bit_use_double_quant=base.double_quant,
        bnb_4bit_compute_dtype=compute_dtype(base),
        bnb_4bit_quant_storage=_divisible(base) if divided else torch.uint8,
    )


def _divisible(base: Base) -> torch.dtype:
    """The storage of 4-bit weights that FSDP2 divides: uint8 it leaves whole without a word."""
    dtype = compute_dtype(base)
    return dtype if dtype in (torch.bfloat16, torch.float32) else torch.bfloat16


def linear4bit_modules(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """Names and modules of the 4-bit linear layers."""
    if not is_in_use("bitsandbytes"):
        return []
    with _quiet():
        from bitsandbytes.nn.modules import Linear4bit

    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]


def protect_from_repacking(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place at the first evaluation on a CPU with AVX512-BF16.

    After that repacking the backward pass reads them in the wrong layout: gradients through the base are wrong without
    a word (cosine 0.3 to 0.75 to the true ones with bitsandbytes 0.50.2).
    """
    for _, module in linear4bit_modules(model):
        module.support_avx512bf16_for_cpu = False


def is_read_wrongly(columns: int, block: int) -> bool:
    """bitsandbytes 0.50.2 takes the scales of other blocks for rows of so many 4-bit values, on a CPU with AVX512.

    The weights that it computes with are then 0.2 to 0.3 of their size away from what was quantized, not 0.09. It is
    right where rows end with a block, and where it takes another way: rows of no 16 values, large blocks.
    """
    ragged = columns % block != 0 and columns % 16 == 0 and block < 2048
    return ragged and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _warn_of_ragged_rows(model: torch.nn.Module, where: str) -> None:
    if device_type() != "cpu":
        return
    layers = [(name, module.in_features, module.weight.quant_state) for name, module in linear4bit_modules(model)]
    wrong = [
        (name, columns)
        for name, columns, state in layers
        if state is not None and is_read_wrongly(columns, state.blocksize)
    ]
    if wrong:
        _log.warning(
            "%s: bitsandbytes computes %d 4-bit layers with wrong scales on this CPU, got %s of %d inputs, which no "
            "whole blocks make up; set base.quantize: none, or train on a GPU",
            where,
            len(wrong),
            *wrong[0],
        )


@torch.no_grad()
def full_weight(module: torch.nn.Module) -> torch.Tensor:
    """The weight of a linear layer as float32 (out, in), dequantized where it is quantized."""
    from transformers.pytorch_utils import Conv1D

    with _quiet():
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    weight: Any = module.weight
    if isinstance(module, Linear4bit):
        return dequantize_4bit(weight.data, weight.quant_state).to(torch.float32)
    if isinstance(module, Linear8bitLt):
        scale: torch.Tensor = weight.SCB if weight.SCB is not None else module.state.SCB
        return weight.data.to(torch.float32) * (scale.to(torch.float32) / 127)[:, None]
    return (weight.data.T if isinstance(module, Conv1D) else weight.data).to(torch.float32)


def weight_reader(module: torch.nn.Module) -> Callable[[torch.dtype], torch.Tensor] | None:
    """How the frozen matrix (out, in) of a linear layer is read in a dtype, dequantized anew by every call.

    None for a layer that is neither a plain linear one nor one in 4 bit. What is read of a 4-bit layer may stand in a
    buffer that the next reading on the same device writes over: use it at once and keep no reference.
    """
    if type(module) is torch.nn.Linear:
        return lambda dtype: module.weight.detach().to(dtype)
    if not is_in_use("bitsandbytes"):
        return None
    with _quiet():
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn.modules import Linear4bit

    layer: Any = module
    if isinstance(module, Linear4bit):

        def anew() -> torch.Tensor:
            return dequantize_4bit(layer.weight.data, layer.weight.quant_state)

        return lambda dtype: dequantize(layer.weight.data, layer.weight.quant_state, dtype, otherwise=anew)
    return None


@torch.no_grad()
def round_trip(weight: torch.Tensor, base: Base) -> torch.Tensor:
    """A weight as float32 after it was held as `base` says: quantized and back for 4 and 8 bit, else as it came."""
    if base.quantize == "none":
        return weight.float()
    with _quiet():
        from bitsandbytes.functional import (
            dequantize_4bit,
            int8_vectorwise_dequant,
            int8_vectorwise_quant,
            quantize_4bit,
        )
    moved = weight.to(device_type()).contiguous()
    if base.quantize == "int8":
        rounded, scales, _ = int8_vectorwise_quant(moved.to(torch.float16))
        return int8_vectorwise_dequant(rounded, scales).float().to(weight.device)
    if moved.device.type == "cpu":  # the same numbers from float32, in a quarter of the time
        packed, state = quantize_4bit(moved.float(), compress_statistics=base.double_quant, quant_type=base.quantize)
        return dequantize_4bit(packed, state).to(weight.dtype).float()
    packed, state = quantize_4bit(moved, compress_statistics=base.double_quant, quant_type=base.quantize)
    return dequantize_4bit(packed, state).float().to(weight.device)


@torch.no_grad()
def fit_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Give the embedding (and the output head) at least this many rows; new rows are the mean of the old ones."""
    embedding: Any = model.get_input_embeddings()
    before = embedding.weight.shape[0]
    if before >= rows:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    resized: tuple[Any, Any] = (model.get_input_embeddings(), model.get_output_embeddings())
    for module in resized:
        if module is not None:
            module.weight[before:] = module.weight[:before].float().mean(dim=0).to(module.weight.dtype)
            module.weight.requires_grad_(False)


def checkpoint_layers(model: PreTrainedModel, layers: Literal["all", "none"] | int) -> None:
    """Recompute the activations of all, none or the first N decoder layers in the backward pass (not re-entrant).

    Loss and gradients do not change; memory falls by what those layers would have kept.

    Raises:
        UsageError: the model does not support it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    # transformers 5.23 renamed both; up to then (constraints/gpu.txt) they are called after gradients
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if layers == "none" or layers == 0:
        getattr(model, f"{word}_checkpointing_disable")()
        return
    try:
        how = {f"{word}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(model, f"{word}_checkpointing_enable")(**how)
    except ValueError as error:
        raise UsageError(f"train.gradient_checkpointing: {error}", "set it to none") from error
    # for checkpoints of the other kind it let the embedding ask for a gradient, which nobody needs here
    model.disable_input_require_grads()
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for index, block in enumerate(blocks):
        block.gradient_checkpointing = layers == "all" or index < layers


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars of transformers and a deprecation inside bitsandbytes; real warnings pass."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*_check_is_size will be removed.*", category=FutureWarning)
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()

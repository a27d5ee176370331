"""State of a training as tensors and JSON: adapter, optimizer, schedule and random numbers, exact to the last bit.

Nothing here knows files other than by the two formats it writes: safetensors for tensors, JSON for the rest.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_tune.errors import CheckFailed
from lora_tune.model.divided import as_divided, assign, gathered, handle, shape_of, whole
from lora_tune.model.zero3 import PartsOptimizer

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@dataclass(frozen=True, slots=True)
class RandomState:
    """The states of every random number generator that a training draws from."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: tuple[Tensor, ...]


def random_state() -> RandomState:
    """The states of Python's, NumPy's, torch's and every CUDA device's generator as they are now."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return RandomState(random.getstate(), np.random.get_state(), torch.get_rng_state(), tuple(cuda))


def set_random_state(state: RandomState) -> None:
    """Put all generators back to `state`; CUDA devices that are no longer there are left out."""
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.torch)
    for device, device_state in enumerate(state.cuda[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state, device)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode without gradients; afterwards modes and random numbers are as before."""
    before = random_state()
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), gathered(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
        set_random_state(before)


def write_random_state(state: RandomState, *, tensors: Path, text: Path) -> None:
    """Write the states as safetensors (torch, CUDA) and JSON (Python, NumPy)."""
    name, keys, position, has_gauss, gauss = state.numpy
    version, words, gauss_next = state.python
    named = {"torch": state.torch} | {f"cuda.{index}": tensor for index, tensor in enumerate(state.cuda)}
    write_tensors(named, tensors)
    numpy = [name, keys.tolist(), position, has_gauss, gauss]
    text.write_text(json.dumps({"python": [version, list(words), gauss_next], "numpy": numpy}), encoding="utf-8")


def read_random_state(*, tensors: Path, text: Path) -> RandomState:
    """Read what `write_random_state` wrote."""
    named = load_file(tensors)
    read = json.loads(text.read_text(encoding="utf-8"))
    version, words, gauss_next = read["python"]
    name, keys, position, has_gauss, gauss = read["numpy"]
    cuda = tuple(named[f"cuda.{index}"] for index in range(len(named) - 1))
    numpy = (name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss)
    return RandomState((version, tuple(words), gauss_next), numpy, named["torch"], cuda)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors with their own dtypes; each gets its own memory, as safetensors asks.

    Raises: OSError where the disk refuses; safetensors has an error of its own for that.
    """
    named = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(named, path)
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The handles of the parameters that are trained, by their full names, not copied."""
    return {name: handle(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}


def training_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the trained parameters and of the optimizer's state: nearly all of a checkpoint."""
    states = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.nbytes for tensor in (*trainable_tensors(model).values(), *states))


def set_trainable_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `trainable_tensors` gave: same names, shapes and dtypes.

    Assigning `.data` keeps the stored dtype; PEFT's own loader would lift a bfloat16 adapter to float32.

    Raises:
        CheckFailed: the names or shapes differ, so the checkpoint is of another adapter.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if parameters.keys() != tensors.keys():
        name = sorted(parameters.keys() ^ tensors.keys())[0]
        raise CheckFailed(f"the checkpoint is of another adapter: it and the model differ in {name}", "start a new run")
    for name, parameter in parameters.items():
        stored = tensors[name]
        if stored.shape != shape_of(parameter):
            shapes = f"{tuple(stored.shape)} stored, {tuple(shape_of(parameter))} in the model"
            raise CheckFailed(f"the checkpoint is of another adapter: {name} has shape {shapes}", "start a new run")
        # rows in order: pissa and olora make transposed tensors, and products of those differ in the last bits
        own = stored.to(parameter.device, copy=True, memory_format=torch.contiguous_format)
        assign(parameter, own)


def write_optimizer(held: OptimizerState, *, tensors: Path, text: Path) -> None:
    """Write what `optimizer_state` gave."""
    write_tensors(held.tensors, tensors)
    text.write_text(json.dumps(held.numbers), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """An optimizer's state: tensors by `<parameter number>.<name>`, and numbers and groups as JSON."""

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


def optimizer_state(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """The optimizer's state, whole where each process holds a part of it: then every process must ask for it.

    Read from `optimizer.state` and not from `state_dict()`, which bitsandbytes wraps. `on_cpu` names the tensors that
    stay on the CPU (the step count of a fused AdamW does not, that of a plain one does).
    """
    named: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    on_cpu: list[str] = []
    for index, parameter in enumerate(_parameters(optimizer)):
        for name, value in _states_of(optimizer, parameter).items():
            if isinstance(value, Tensor):
                named[f"{index}.{name}"] = whole(value)
                if value.device.type == "cpu" and parameter.device.type != "cpu":
                    on_cpu.append(f"{index}.{name}")
            else:
                numbers.setdefault(str(index), {})[name] = value
    groups = [
        {name: value for name, value in group.items() if name != "params"} | {"count": len(group["params"])}
        for group in optimizer.param_groups
    ]
    return OptimizerState(named, {"groups": groups, "numbers": numbers, "on_cpu": on_cpu})


def read_optimizer(optimizer: torch.optim.Optimizer, *, tensors: Path, text: Path) -> None:
    """Put back what `write_optimizer` wrote, into an optimizer over the same parameters.

    `Optimizer.load_state_dict` casts the moments to the parameters' dtype, which loses bits (Adafactor keeps float32
    moments for bfloat16 parameters); this keeps every dtype.

    Raises:
        CheckFailed: the groups differ, so the checkpoint is of another optimizer.
    """
    stored = json.loads(text.read_text(encoding="utf-8"))
    counts = [len(group["params"]) for group in optimizer.param_groups]
    if [group["count"] for group in stored["groups"]] != counts:
        raise CheckFailed("the checkpoint is of another optimizer: the parameter groups differ", "start a new run")
    for group, saved in zip(optimizer.param_groups, stored["groups"], strict=True):
        group.update({name: tuple(v) if isinstance(v, list) else v for name, v in saved.items() if name != "count"})
    named, on_cpu = load_file(tensors), set(stored["on_cpu"])
    parameters, parts = _parameters(optimizer), _parts_of(optimizer)
    optimizer.state.clear()
    for key, tensor in named.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        if parts is not None:
            parts.take_state(parameter, name, tensor if key in on_cpu else tensor.to(parameter.device))
        else:
            optimizer.state[parameter][name] = tensor if key in on_cpu else as_divided(tensor, parameter)
    for index, values in stored["numbers"].items() if parts is None else ():
        optimizer.state[parameters[int(index)]].update(values)


def _parts_of(optimizer: Any) -> PartsOptimizer | None:
    """The optimizer of an adapter that DeepSpeed divides, out of accelerate's wrapping; None where it is another."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, PartsOptimizer) else None


def _states_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Mapping[str, Any]:
    parts = _parts_of(optimizer)
    if parts is not None:
        return parts.whole_states(parameter)
    found: Mapping[str, Any] = optimizer.state.get(parameter, {})
    return found


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]

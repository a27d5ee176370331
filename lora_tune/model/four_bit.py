"""Whether torch and bitsandbytes work here: a small base in 4 bit, forward and backward, against its own weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_tune.errors import LoraTuneError
from lora_tune.model.conditions import Finding
from lora_tune.model.machine import GIB, Machine
from lora_tune.model.source import find_base
from lora_tune.recipe import Base

if TYPE_CHECKING:
    import torch

_TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}  # relative, of a product over 320 numbers
# what a library that does not fit to the machine raises
_BROKEN = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)


def torch_works(machine: Machine) -> Iterator[Finding]:
    """torch can be imported, and sees the GPU that the driver names."""
    try:
        import torch

        available = torch.cuda.is_available()
    except _BROKEN as error:
        yield Finding("error", f"torch cannot be imported: {_reason(error)}", "install torch again")
        return
    if machine.gpus and machine.torch_cuda and not available:
        fix = "compare the driver with torch's CUDA, and restart after a driver update"
        yield Finding("error", f"torch {torch.__version__} does not see the GPU", fix)
    elif available:
        free, total = torch.cuda.mem_get_info()
        yield Finding(
            "ok", f"{torch.cuda.get_device_name()} answers torch: {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        )
    else:
        yield Finding("ok", f"torch {torch.__version__} works on the CPU with {torch.get_num_threads()} threads")


def four_bit_works(machine: Machine) -> Iterator[Finding]:
    """4-bit layers answer as their weights say, and so do their gradients, before and after an evaluation.

    The base is the one that comes with the package; nothing is downloaded.
    """
    try:
        forward, backward, dtype, device = _errors_of_four_bit()
    except (*_BROKEN, LoraTuneError) as error:
        fix = "python -m bitsandbytes says more; or set base.quantize: none"
        yield Finding("error", f"a base in 4 bit cannot be used: {_reason(error)}", fix)
        return
    tolerance = _TOLERANCE[dtype]
    said = f"nf4 on {device} in {dtype}: forward {forward:.1e}, backward {backward:.1e} from its own weights"
    if forward <= tolerance and backward <= tolerance:
        yield Finding("ok", said)
    else:
        fix = "install another bitsandbytes, or set base.quantize: none: this one would train wrongly"
        yield Finding("error", f"{said}, at most {tolerance:g} is rounding", fix)


def _errors_of_four_bit() -> tuple[float, float, str, str]:
    """Relative errors of output and input gradient of one 4-bit layer; dtype and device."""
    import torch

    from lora_tune.model.base import compute_dtype, full_weight, linear4bit_modules, load_base

    base = Base(name="builtin:quickstart", quantize="nf4")
    model = load_base(find_base(base), base)
    _, layer = linear4bit_modules(model)[0]
    weight = full_weight(layer)
    dtype = compute_dtype(base)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(128, weight.shape[1], generator=draw).to(model.device, dtype)
    gradient = torch.randn(128, weight.shape[0], generator=draw).to(model.device, dtype)
    with torch.no_grad():
        layer.eval()(x)  # bitsandbytes may repack its weights here, and read them wrongly in the backward pass below
    x.requires_grad_(True)
    output: Any = layer.train()(x)
    output.backward(gradient)
    if x.grad is None:
        raise RuntimeError("no gradient came back")
    forward = _distance(output.detach(), x.detach().float() @ weight.T)
    return forward, _distance(x.grad, gradient.float() @ weight), str(dtype).removeprefix("torch."), model.device.type


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

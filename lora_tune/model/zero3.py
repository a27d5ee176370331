"""A base divided over processes by DeepSpeed's ZeRO-3. The only caller of DeepSpeed.

Each process holds a flat part of every weight, frozen or trained, of the gradients and of the optimizer's states. A
module's weights are put together when it is called, in the forward and in the backward pass, and let go afterwards.
DeepSpeed's engine is left out: it wants every weight in one dtype, and here float32 adapters stand on a base of
bfloat16. Its stage 3 itself is used: partitions, hooks, the sum of gradients, the step.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_tune.errors import CheckFailed

_BUCKET = 25_000_000  # numbers of gradients that are sent at once, at most
_SMALL = 100_000  # numbers in a weight that is not gathered again and again while answers are written
_HELD = -1  # in place of the number of a module that uses a weight
_OTHER = "set hardware.strategy: fsdp2"


def is_part(tensor: Tensor) -> bool:
    """Whether it is a parameter that DeepSpeed divides; its detached form is an empty tensor that knows nothing."""
    return hasattr(tensor, "ds_tensor")


def divide(model: nn.Module, plain: torch.optim.Optimizer, *, max_grad_norm: float) -> PartsOptimizer:
    """Divide every parameter over all processes; returns the optimizer that takes the place of `plain`.

    Raises:
        CheckFailed: a parameter stayed whole, or the model has parts that do not work divided.
    """
    groups = [{**group, "params": list(group["params"])} for group in plain.param_groups]
    trained = [parameter for group in groups for parameter in group["params"]]
    _check(model, trained)
    _read_anew(model)
    plain.param_groups[:] = [group for group in plain.param_groups if group["params"]]
    layer = _largest_layer(model)
    stage = _stage3()(
        model,
        plain,
        {parameter: name for name, parameter in model.named_parameters()},
        dp_process_group=dist.group.WORLD,
        clip_grad=max_grad_norm,
        communication_data_type=torch.float32,
        gradient_accumulation_dtype=torch.float32,
        reduce_bucket_size=max(1, min(_BUCKET, sum(parameter.numel() for parameter in trained))),
        prefetch_bucket_size=layer,
        max_live_parameters=2 * layer,  # the layer that computes, and the next
        max_reuse_distance=0,
        param_persistence_threshold=0,  # else small ones stay whole
        overlap_comm=torch.cuda.is_available(),
    )
    world = dist.get_world_size()
    whole_ones = [name for name, parameter in model.named_parameters() if not _is_divided(parameter, world)]
    if whole_ones:
        raise CheckFailed(f"{len(whole_ones)} weights are not divided, such as {whole_ones[0]}", _OTHER)
    return PartsOptimizer(stage, plain, groups)


def _is_divided(parameter: Any, world: int) -> bool:
    return parameter.numel() == 0 and parameter.ds_tensor.numel() == -(-parameter.ds_numel // world)


def _check(model: nn.Module, trained: Sequence[Tensor]) -> None:
    """Raise CheckFailed for what is known not to work."""
    others = sorted({str(parameter.dtype) for parameter in trained} - {"torch.float32"})
    if others:
        raise CheckFailed(f"zero3 divides adapters of float32, got {others[0]}", _OTHER)
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    experts = [name for name in lists if name.endswith("experts")]
    if experts:  # a process gathers what its own tokens go to, and the others would wait
        raise CheckFailed(f"zero3 does not divide experts that are called one by one, got {experts[0]}", _OTHER)


class _Product(torch.autograd.Function):
    """x @ W.T for a frozen W that is read in the forward and again in the backward pass, and kept in neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.read = read
        return x @ read(x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.read(gradient.dtype), None


def _read_anew(model: nn.Module) -> None:
    """Let 4-bit layers ask for their weights in the backward pass again, when DeepSpeed has put them together again.

    bitsandbytes keeps a view of them from the forward pass on, and with it the whole base on every card.
    """
    from lora_tune.model.base import linear4bit_modules, weight_reader

    for _, module in linear4bit_modules(model):
        read = weight_reader(module)
        if read is not None:
            module.forward = partial(_forward, module, module.forward, read)


def _forward(module: Any, own: Callable[[Tensor], Tensor], read: Callable[[torch.dtype], Tensor], x: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad):
        return own(x)
    dtype = module.compute_dtype or x.dtype
    y = _Product.apply(x.to(dtype), read)
    return (y if module.bias is None else y + module.bias.to(dtype)).to(x.dtype)


def _largest_layer(model: nn.Module) -> int:
    """Numbers in the largest decoder layer, as they are stored."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return max((sum(parameter.numel() for parameter in layer.parameters()) for layer in layers), default=1)


def _stage3() -> Callable[..., Any]:
    """DeepSpeed's stage 3 over the process group that torch has, on the accelerator that torch has."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed reads it on and on; each process sees one card (`place.take_card`)
    from deepspeed import comm, ops
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.utils.timer import NoopTimer

    ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a kernel that it would compile now; gloo does without
    comm.init_distributed(dist_init_required=False, verbose=False)

    warnings.filterwarnings("ignore", message=".*_tensor` is deprecated", category=FutureWarning, module="torch")
    return partial(DeepSpeedZeroOptimizer_Stage3, timers=NoopTimer(), ds_config=None)


class PartsOptimizer(torch.optim.Optimizer):
    """The optimizer of a divided adapter as a trainer sees it; what it steps are flat parts (`plain`, in `stage`).

    Its groups hold the parameters of the model and are those of the optimizer of one process.
    """

    def __init__(self, stage: Any, plain: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, plain.defaults)
        self.stage = stage
        self.plain = plain
        self.state = plain.state
        self.leaves_out = False  # the next step

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step on each process' parts, clipped; nothing where the step is to be left out."""
        if not self.leaves_out:
            full = [group for group in self.param_groups if group["params"]]
            for group, inner in zip(full, self.plain.param_groups, strict=True):
                inner.update({name: value for name, value in group.items() if name != "params"})
            self.stage.step()
        self.leaves_out = False
        self.zero_grad()

    def zero_grad(self, set_to_none: object = None) -> None:
        """Forget the gradients, those of parameters as well that the next backward pass does not come to."""
        self.stage.zero_grad()
        self.stage.grad_partitions_flat_buffer.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: `whole_states` gives what a checkpoint holds."""
        return {"state": {}, "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: `take_state` does."""

    # -- one micro-batch ----------------------------------------------------------------------------------------------

    def begin_micro_batch(self) -> None:
        """To be called before every forward pass of the training."""
        self.stage.clear_backward_seen_flag()

    def backward(self, loss: Tensor) -> None:
        """The backward pass; the means of all processes' gradients are added to the parts of them."""
        self.stage.backward_prologue()
        self.stage.enter_backward()
        loss.backward()
        self.stage.overlapping_partition_gradients_reduce_epilogue()
        self.stage.backward_epilogue()
        self.stage.exit_backward()

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient before clipping; NaN and infinity come through."""
        parts = [_real(self.stage.get_local_fp32_grad_for_param(parameter), parameter) for parameter in self._all()]
        square = torch.stack([part.square().sum() for part in parts]).sum()
        dist.all_reduce(square)
        return square.sqrt()

    def _all(self) -> list[Any]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    # -- whole values -------------------------------------------------------------------------------------------------

    def whole_states(self, parameter: Any) -> dict[str, Any]:
        """What the optimizer knows of this parameter, whole; every process must ask for it."""
        flat, start = self._place(parameter)
        return {
            name: _whole(value.narrow(0, start, parameter.ds_tensor.numel()), parameter)
            if isinstance(value, Tensor) and value.shape == flat.shape
            else value
            for name, value in self.state.get(flat, {}).items()
        }

    def take_state(self, parameter: Any, name: str, value: Any) -> None:
        """Put back what `whole_states` gave under this name."""
        flat, start = self._place(parameter)
        if not isinstance(value, Tensor) or value.shape != parameter.ds_shape:
            self.state[flat][name] = value
            return
        parts = self.state[flat].setdefault(name, torch.zeros_like(flat, dtype=value.dtype, requires_grad=False))
        _fill(parts.narrow(0, start, parameter.ds_tensor.numel()), value, parameter)

    def _place(self, parameter: Any) -> tuple[Tensor, int]:
        """The flat tensor that holds this process' part of the parameter, and where in it."""
        group, start, _ = self.stage.grad_position[self.stage.get_param_id(parameter)]
        return self.stage.fp32_partitioned_groups_flat[group], start


def _real(part: Tensor, parameter: Any) -> Tensor:
    """Of a part, which is filled up to the same length on every process, what belongs to the parameter."""
    length = parameter.ds_tensor.numel()
    return part[: max(0, min(length, parameter.ds_numel - dist.get_rank() * length))]


def _whole(part: Tensor, parameter: Any) -> Tensor:
    gathered = torch.empty(part.numel() * dist.get_world_size(), dtype=part.dtype, device=part.device)
    dist.all_gather_into_tensor(gathered, part.detach().contiguous())
    return gathered[: parameter.ds_numel].view(parameter.ds_shape)


def _fill(part: Tensor, value: Tensor, parameter: Any) -> None:
    """Copy into a part what of the whole value belongs there."""
    real, start = _real(part, parameter), dist.get_rank() * part.numel()
    real.copy_(value.reshape(-1)[start : start + real.numel()])


def whole(parameter: Any) -> Tensor:
    """The parameter with all of its parts; every process must ask for it."""
    return _whole(parameter.ds_tensor, parameter)


@torch.no_grad()
def assign(parameter: Any, value: Tensor) -> None:
    """Give the parameter this value, of which each process takes its part."""
    _fill(parameter.ds_tensor, value, parameter)
    take_part(parameter)


def take_part(parameter: Any) -> None:
    """This process' part was changed in place: the optimizer steps it from there."""
    if parameter.requires_grad:
        step = parameter._z3_optimizer
        group, start, _ = step.grad_position[step.get_param_id(parameter)]
        flat = step.fp32_partitioned_groups_flat[group]
        flat.data.narrow(0, start, parameter.ds_tensor.numel()).copy_(parameter.ds_tensor)


def largest(parameters: Sequence[Any]) -> Tensor:
    """The largest absolute value of these weights on any process; NaN and infinity come through."""
    parts = [_real(parameter.ds_tensor, parameter) for parameter in parameters]
    values = [part.abs().max() for part in parts if part.numel()]
    most = torch.stack(values).max() if values else torch.zeros((), device=parameters[0].ds_tensor.device)
    bad = torch.isnan(most).float()
    both = torch.stack([torch.nan_to_num(most, nan=0.0, posinf=torch.inf), bad])
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return torch.where(both[1] > 0, torch.nan, both[0])


@contextmanager
def standing(model: nn.Module, to: Literal["read", "write"]) -> Iterator[None]:
    """Inside, the trained parameters have their whole values; every process must come here.

    With "write" each process takes its part of them at the end.
    """
    trained: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = [parameter for parameter in trained if is_part(parameter) and parameter.numel() == 0]
    before = [parameter.data for parameter in parts]
    for parameter in parts:
        parameter.data = whole(parameter)
    try:
        yield
        for parameter in parts if to == "write" else ():
            assign(parameter, parameter.data)
    finally:
        for parameter, empty in zip(parts, before, strict=True):
            parameter.data = empty


@contextmanager
def called_in_parts(model: Any) -> Iterator[None]:
    """Inside, modules of the model are called alone: the order of calls that is known from training does not hold.

    The adapter and what is small stand whole for the time, so that a layer asks only for its frozen matrices.
    """
    parameters = list(model.parameters())
    offload = next(p for p in parameters if p.requires_grad)._z3_optimizer.parameter_offload
    offload.partition_all_parameters()
    offload.get_param_coordinator().reset_step()
    held = [parameter for parameter in parameters if parameter.requires_grad or parameter.ds_numel <= _SMALL]
    held[0].all_gather(param_list=held)
    for parameter in held:
        parameter.ds_active_sub_modules.add(_HELD)
    try:
        yield
    finally:
        offload.partition_all_parameters()
        offload.get_param_coordinator().reset_step()

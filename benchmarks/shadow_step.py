"""Bytes that a training step of an 8B model holds at most, counted on tensors without values; no card is needed:

    python -m benchmarks.shadow_step [--tokens 2048 8192 32768] [--layers 32] [--json FILE]

The real modules, adapters, fused functions and checkpoints go forward and backward on PyTorch's meta device, on which
nothing is computed; every storage is counted from the moment it is made until it is freed. Attention stands for a
kernel like FlashAttention: it keeps queries, keys, values, output and a number a head, and its backward pass sums up
dQ in float32. What comes out is set beside the plan of the same step. What it does not see: how an allocator rounds
and fragments, what cuBLAS works in, 4-bit weights (their one dequantized matrix is added), and time.
"""

from __future__ import annotations

import argparse
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.machine import at_least_one, machine, print_and_keep, result_file, versions
from benchmarks.peers.protocol import LIBRARIES
from benchmarks.step import SHAPES
from lora_tune.model.footprint import GIB, Choice, _training, job_of
from lora_tune.model.kernels import fuse as fusing
from lora_tune.model.kernels import rotary
from lora_tune.model.kernels.loss_head import Head, SummedLoss
from lora_tune.recipe import Base, Lora, Train

META = torch.device("meta")
RANK = 16
Mode = Literal["all", "none"]


class Held(TorchDispatchMode):
    """Bytes of all storages that were made inside and are alive; `most` at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.device == META:
                self._count(tensor.untyped_storage())
        return made

    def ignore(self, tensors: Iterator[torch.Tensor]) -> None:
        """What was there before."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._known:
            return
        self._known.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, place, size)

    def _freed(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


class Flash(torch.autograd.Function):
    """The memory of a FlashAttention kernel over (1, heads, tokens, size), without its numbers."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The output."""
        out, scales = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, scales)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """dQ, summed up in float32, dK and dV."""
        q, k, v, _, _ = ctx.saved_tensors
        sums = torch.empty_like(q, dtype=torch.float32)
        d_k, d_v = torch.empty_like(k), torch.empty_like(v)
        return sums.to(q.dtype), d_k, d_v


def _attention(module: nn.Module, q: Any, k: Any, v: Any, mask: Any, **how: Any) -> tuple[torch.Tensor, None]:
    return Flash.apply(q, k, v).transpose(1, 2).contiguous(), None


@contextmanager
def shadows() -> Iterator[None]:
    """Inside, structures are taken for what Llama's are, since tensors without values cannot be asked."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(fusing, "activation_of", lambda parent, layers: "silu"))
        stack.enter_context(patch.object(fusing, "offset_of", lambda module, weight, epsilon: 0.0))
        stack.enter_context(patch.object(rotary, "_rotates_halves", lambda own, *, size, part: True))
        stack.enter_context(patch.object(fusing, "_dtype", lambda x: x.dtype))
        stack.enter_context(patch.object(torch, "autocast", lambda *_, **__: nullcontext()))
        yield


def model_of(layers: int, recomputed: Mode) -> Any:
    """An 8B Llama of so many layers with an adapter, without values."""
    from peft import LoraConfig, get_peft_model

    AttentionInterface.register("shadow", _attention)
    config = LlamaConfig(**SHAPES["8b"] | {"num_hidden_layers": layers}, attn_implementation="shadow")
    with META:
        base = LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(base, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.gradient_checkpointing = recomputed == "all"
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    fusing.fuse(model.train())
    return model


def most_bytes(model: Any, tokens: int) -> int:
    """What a step over one document holds at most, beyond weights and adapter."""
    head = Head(model.get_output_embeddings())
    ids = torch.zeros(1, tokens, dtype=torch.long, device=META)
    rows = torch.zeros(tokens - 1, dtype=torch.long, device=META)
    places = torch.zeros(1, tokens, dtype=torch.long, device=META)
    held = Held()
    held.ignore(tensor for tensor in (*model.parameters(), *model.buffers(), ids, rows, places))
    with held:
        hidden = model.get_base_model().model(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state
        loss = SummedLoss.apply(hidden, head, rows, rows, torch.bfloat16, "gradient") / tokens
        del hidden
        loss.backward()
    model.zero_grad()
    return held.most


def planned_bytes(tokens: int, layers: int, recomputed: Mode) -> float:
    """The plan of the same, of an unquantized base."""
    config = LlamaConfig(**SHAPES["8b"] | {"num_hidden_layers": layers}).to_dict()
    given = Train(max_length=tokens, micro_batch_size=1, packing=False, gradient_checkpointing=recomputed)
    base = Base(name="x", quantize="none", compute_dtype="bfloat16")
    job = job_of(config, base=base, lora=Lora(rank=RANK), train=given, device="cuda")
    parts = _training(job, Choice(1, layers if recomputed == "all" else 0, "adamw"))
    return sum(parts[name] for name in ("gradients", "activations", "loss_head", "buffers"))


def measure(tokens: int, layers: int) -> list[dict[str, Any]]:
    """A row for each way through the model."""
    rows = []
    ways: tuple[Mode, ...] = ("all", "none")
    for recomputed in ways:
        with shadows():
            counted = most_bytes(model_of(layers, recomputed), tokens)
        planned = planned_bytes(tokens, layers, recomputed)
        rows.append({"tokens": tokens, "layers": layers, "recomputed": recomputed,
                     "counted_gib": round(counted / GIB, 3), "planned_gib": round(planned / GIB, 3),
                     "planned_over_counted": round(planned / counted, 3)})  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> int:
    """Count, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=at_least_one, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--layers", type=at_least_one, default=32)
    parser.add_argument("--json", type=result_file)
    given = parser.parse_args()
    rows = [row for tokens in given.tokens for row in measure(tokens, given.layers)]
    print_and_keep({"machine": machine(), "versions": versions("lora_tune", *LIBRARIES), "rows": rows}, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

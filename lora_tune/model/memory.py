"""Will it fit? Bytes of a run by part, from `config.json` and the recipe alone, and the micro-batch that follows.

Formulas: weights by quantization; adapters, gradients and optimizer states by parameter; saved activations as counted
by saved-tensor hooks on transformers 5.23 with peft 0.21.2 (tests repeat the count, within 3 %); temporaries of the
backward pass (4I + 6h per token) and 0.5 GiB for the CUDA context, cuBLAS and fragmentation are estimates.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lora_tune.errors import Problem, ResourceError
from lora_tune.model.shape import Linear, Shape, read_shape
from lora_tune.recipe import Base, Lora, Train

Device = Literal["cuda", "cpu"]
GIB = 2**30
MARGIN = 0.9  # share of the free memory that a plan may use
RUNTIME_GIB = 0.5
MOST_TOKENS = 8_192  # of a packed micro-batch chosen here: dequantizing is 2 % of a step then, and masks stay small
_ROW_LENGTHS = 2  # documents of a micro-batch are folded into rows of at most about this many times max_length
_NF4 = 0.5 + 1 / 64 + 4 / 16384  # bytes: 4 bits, one 8-bit scale per 64, one float32 per 256 scales
_NF4_SINGLE = 0.5 + 4 / 64  # without double quantization: one float32 scale per 64
_OPTIMIZER_BYTES = {  # states per trained parameter
    "auto": 8.0, "adamw": 8.0, "paged_adamw": 8.0, "adamw_8bit": 2.04, "paged_adamw_8bit": 2.04, "lion_8bit": 1.02,
    "adafactor": 0.5, "sgd": 0.0,
}  # fmt: skip
# Saved activations of one decoder layer in bytes per token: factors of h, I, heads x d, kv heads x d and the rank,
# by (bytes of an activation, with dropout or without). Adapters in float32 under autocast save what 16-bit ones do.
_SAVED: dict[tuple[int, bool], tuple[int, int, int, int, int]] = {
    (2, False): (12, 8, 4, 4, 14),
    (2, True): (28, 10, 8, 4, 14),
    (4, False): (16, 16, 8, 8, 28),
    (4, True): (48, 20, 16, 8, 28),
}
_CONTROL_GROUP = Path("/sys/fs/cgroup")
_ADAPTER_BYTES = 4  # of an adapter weight and of its gradient: float32 beside every base


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the memory goes at the micro-batch chosen; `reason` says in one line why that one."""

    parts_gib: dict[str, float]
    peak_gib: float
    budget_gib: float
    micro_batch_size: int
    accumulation: int
    gradient_checkpointing: Literal["all", "none"] | int
    parameters: int
    trainable_parameters: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Job:
    """All that the formulas need, nothing left at `auto`."""

    shape: Shape
    base: Base
    lora: Lora
    train: Train
    device: Device

    @property
    def element(self) -> int:
        """Bytes of an activation and of an unquantized weight."""
        if self.base.compute_dtype == "auto":
            return 2 if self.device == "cuda" else 4
        return 4 if self.base.compute_dtype == "float32" else 2

    @property
    def checkpointed(self) -> int:
        """Layers that keep their input only."""
        asked = self.train.gradient_checkpointing
        if isinstance(asked, int):
            return min(asked, self.shape.layers)
        return 0 if asked == "none" else self.shape.layers


def plan_memory(
    config: Mapping[str, Any], *, base: Base, lora: Lora, train: Train, budget_gib: float, device: Device
) -> MemoryPlan:
    """Choose the micro-batch that fits into 90 % of `budget_gib` (free memory, GiB) and say what takes how much.

    `micro_batch_size: auto` becomes the largest power of two that divides `batch_size`, fits, and has at most 8,192
    tokens where rows are packed (a larger one gains below 2 % and its dense attention mask grows).
    `gradient_checkpointing: auto` becomes `all` on a GPU and `none` on a CPU.

    Raises ResourceError (exit 4) with the cheapest change where nothing fits, UsageError for a config that cannot be
    read.
    """
    job = _job(config, base=base, lora=lora, train=train, device=device)
    sizes = _micro_batches(train)
    fitting = next((micro for micro in sizes if _peak(job, micro) <= MARGIN * budget_gib), None)
    if fitting is None:
        raise ResourceError(_too_large(job, sizes[-1], budget_gib))
    parts = _parts(job, fitting)
    return MemoryPlan(
        parts_gib=parts,
        peak_gib=sum(parts.values()),
        budget_gib=budget_gib,
        micro_batch_size=fitting,
        accumulation=train.batch_size // fitting,
        gradient_checkpointing=_as_word(job.train.gradient_checkpointing),
        parameters=job.shape.parameters,
        trainable_parameters=trainable_parameters(job.shape, lora),
        reason=_reason(job, fitting, sizes, budget_gib),
    )


def _as_word(setting: Literal["auto", "all", "none"] | int) -> Literal["all", "none"] | int:
    return "none" if setting == "auto" else setting


def _job(config: Mapping[str, Any], *, base: Base, lora: Lora, train: Train, device: Device) -> _Job:
    """The formulas' inputs, with `auto` resolved; a base stored quantized keeps its own kind."""
    stored = config.get("quantization_config")
    if isinstance(stored, Mapping):
        double = bool(stored.get("bnb_4bit_use_double_quant"))
        kind = "int8" if stored.get("load_in_8bit") or stored.get("_load_in_8bit") else "nf4"
        base = base.model_copy(update={"quantize": kind, "double_quant": double})
    if train.gradient_checkpointing == "auto":
        train = train.model_copy(update={"gradient_checkpointing": "all" if device == "cuda" else "none"})
    return _Job(read_shape(config), base, lora, train, device)


def _micro_batches(train: Train) -> list[int]:
    """The micro-batches to try, largest first."""
    if train.micro_batch_size != "auto":
        return [train.micro_batch_size]
    powers = [2**power for power in range(train.batch_size.bit_length()) if train.batch_size % 2**power == 0]
    few = [size for size in powers if not train.packing or size * train.max_length <= MOST_TOKENS]
    return sorted(few or [1], reverse=True)


def _peak(job: _Job, micro: int) -> float:
    return sum(_parts(job, micro).values())


def _parts(job: _Job, micro: int) -> dict[str, float]:
    """GiB by part at this micro-batch."""
    tokens = micro * job.train.max_length
    trained = trainable_parameters(job.shape, job.lora)
    parts = {
        "weights": _weights(job),
        "adapters": trained * _ADAPTER_BYTES,
        "gradients": trained * _ADAPTER_BYTES,
        "optimizer": trained * _OPTIMIZER_BYTES[job.train.optimizer],
        "activations": _activations(job, tokens),
        "loss_head": _loss_head(job, tokens),
        "buffers": _buffers(job, tokens),
        "runtime": RUNTIME_GIB * GIB,
    }
    return {name: size / GIB for name, size in parts.items()}


def _weights(job: _Job) -> float:
    """The frozen base: linear layers as quantized; embeddings, head, norms and experts in the compute dtype."""
    shape, quantize = job.shape, job.base.quantize
    rest = shape.embedding_parameters + shape.expert_parameters + shape.other_parameters
    four_bit = _NF4 if job.base.double_quant else _NF4_SINGLE
    per_weight = {"nf4": four_bit, "fp4": four_bit, "int8": 1.0, "none": float(job.element)}[quantize]
    return shape.linear_parameters * per_weight + rest * job.element


def trainable_parameters(shape: Shape, lora: Lora) -> int:
    """Weights of the adapter: A and B of every target, DoRA's magnitudes, modules trained in full, new tokens."""
    count = 0
    for linear in shape.linears:
        if _is_target(linear, lora):
            rank = next((rank for name, rank in lora.rank_pattern.items() if _ends(name, linear.name)), lora.rank)
            count += linear.count * rank * (linear.inputs + linear.outputs)
            count += linear.count * linear.outputs if lora.method == "dora" else 0
    full = {linear.name: linear.parameters for linear in shape.linears}
    full |= dict.fromkeys(("embed_tokens", "wte", "word_embeddings", "lm_head"), shape.vocabulary * shape.hidden)
    count += sum(full.get(name.rsplit(".", 1)[-1], 0) for name in lora.modules_to_save)
    return count + len(lora.new_tokens) * shape.hidden * (1 if shape.tied else 2)


def _is_target(linear: Linear, lora: Lora) -> bool:
    return lora.targets == "all-linear" or any(_ends(name, linear.name) for name in lora.targets)


def _ends(name: str, module: str) -> bool:
    """Whether a name of the recipe (`q_proj`, `self_attn.q_proj`) means modules of this name."""
    return name.rsplit(".", 1)[-1] == module


def _activations(job: _Job, tokens: int) -> float:
    """What the backward pass reads again: every layer's set; of checkpointed layers the input, and one set."""
    layers, checkpointed = job.shape.layers, job.checkpointed
    kept_sets = layers - checkpointed + (1 if checkpointed else 0)
    inputs = checkpointed * tokens * job.shape.hidden * job.element
    one_set = saved_bytes_per_layer(
        job.shape,
        tokens=tokens,
        element=job.element,
        lora=job.lora,
        row_length=_row_length(job, tokens) if _masked(job, tokens) else None,
    )
    return inputs + kept_sets * one_set


def saved_bytes_per_layer(shape: Shape, *, tokens: int, element: int, lora: Lora, row_length: int | None = None) -> int:
    """Bytes that one decoder layer without checkpointing keeps for the backward pass of `tokens` tokens.

    `element` is the bytes of an activation. With `row_length` (tokens per
    row) attention has a mask: keys and values are repeated for grouped queries, and SDPA keeps the mask in the
    compute dtype.
    """
    h, i, hq, kv, r = _SAVED[element, lora.dropout > 0]
    per_token = (
        h * shape.hidden + i * shape.active_intermediate + hq * shape.query + r * lora.rank + 4 * shape.heads + 8
    )
    if row_length is None:
        per_token += kv * shape.key_value
    else:
        per_token += kv * shape.query + element * row_length
    return tokens * per_token


def _loss_head(job: _Job, tokens: int) -> float:
    """On a GPU TRL's fused head in tiles of 4,096 x 32,768; on a CPU all logits, their float32 copy and gradient."""
    shape = job.shape
    if job.device == "cuda":
        return min(tokens, 4096) * min(shape.vocabulary, 32_768) * 2 + tokens * shape.hidden * 4
    return tokens * shape.vocabulary * (job.element + 8)


def _buffers(job: _Job, tokens: int) -> float:
    """Temporaries of one layer's backward pass, weights dequantized for one product, the mask of packed rows."""
    shape = job.shape
    temporaries = tokens * (4 * shape.intermediate + 6 * shape.hidden) * job.element / 2
    dequantized = 0 if job.base.quantize == "none" else shape.largest_linear * job.element
    cast = 2 * trainable_parameters(shape, job.lora) if job.element == 2 else 0  # autocast's copies of the adapters
    merged = 2 * shape.largest_linear * 4 if job.lora.method == "dora" else 0  # DoRA's norm of W + BA in float32
    mask = tokens * _row_length(job, tokens) if _masked(job, tokens) else 0
    return temporaries + dequantized + cast + merged + mask


def _masked(job: _Job, tokens: int) -> bool:
    """Whether attention needs a mask: several documents in one row, or several rows of unequal length."""
    return job.train.packing or tokens > job.train.max_length


def _row_length(job: _Job, tokens: int) -> int:
    return min(tokens, _ROW_LENGTHS * job.train.max_length)


def _too_large(job: _Job, micro: int, budget_gib: float) -> Problem:
    """One line: what is needed, what there is, and the cheapest change after which it fits."""
    key = "train.micro_batch_size" if job.train.micro_batch_size != "auto" else "base.name"
    reason = (
        f"{micro} x {job.train.max_length} tokens need about {_peak(job, micro):.1f} GiB, got "
        f"{MARGIN * budget_gib:.1f} GiB (90 % of {budget_gib:.1f} GiB free)"
    )
    for words, changed in _changes(job):
        smallest = _peak(changed, _micro_batches(changed.train)[-1])
        if smallest <= MARGIN * budget_gib:
            return Problem(reason, f"set {words}: about {smallest:.1f} GiB", key=key)
    least = min([_peak(job, micro), *(_peak(changed, 1) for _, changed in _changes(job))]) / MARGIN
    return Problem(reason, f"take a smaller base, or a device with {least:.1f} GiB free", key=key)


def _changes(job: _Job) -> Iterator[tuple[str, _Job]]:
    """Changes of the recipe that save memory, the cheapest in time and quality first, each on top of those before."""
    adamw = job.device == "cuda" and job.train.optimizer in ("auto", "adamw", "paged_adamw")
    words: list[str] = []
    if job.train.micro_batch_size not in ("auto", 1):
        words.append("train.micro_batch_size: 1")
        job = replace(job, train=job.train.model_copy(update={"micro_batch_size": 1}))
        yield " and ".join(words), job
    if job.checkpointed < job.shape.layers:
        words.append("train.gradient_checkpointing: all")
        job = replace(job, train=job.train.model_copy(update={"gradient_checkpointing": "all"}))
        yield " and ".join(words), job
    if job.base.quantize in ("none", "int8"):
        words.append("base.quantize: nf4")
        job = replace(job, base=job.base.model_copy(update={"quantize": "nf4"}))
        yield " and ".join(words), job
    if adamw:
        words.append("train.optimizer: adamw_8bit")
        job = replace(job, train=job.train.model_copy(update={"optimizer": "adamw_8bit"}))
        yield " and ".join(words), job
    for length in (2048, 1024, 512, 256):
        if length < job.train.max_length:
            job = replace(job, train=job.train.model_copy(update={"max_length": length}))
            yield " and ".join([*words, f"train.max_length: {length}"]), job


def _reason(job: _Job, micro: int, sizes: list[int], budget_gib: float) -> str:
    """Why this micro-batch, in one line."""
    length, peak = job.train.max_length, _peak(job, micro)
    text = f"micro-batch {micro} x {length} tokens: about {peak:.1f} of {budget_gib:.1f} GiB free"
    if job.train.micro_batch_size != "auto":
        return f"{text}, as the recipe says"
    if micro < sizes[0]:
        return f"{text}; {2 * micro} would need {_peak(job, 2 * micro):.1f} GiB and 10 % stay free"
    if job.train.packing and 2 * micro * length > MOST_TOKENS and job.train.batch_size % (2 * micro) == 0:
        return f"{text}; a larger one gains nothing above {MOST_TOKENS} tokens"
    return f"{text}; the largest power of two that divides batch_size {job.train.batch_size}"


def device_budget() -> tuple[Device, float]:
    """Where a run would train, and the GiB that are free there now: of the first visible GPU, else of memory.

    A GPU counts where its driver answers and torch is not a CPU build; torch itself is not imported.
    """
    free = None if _cpu_build() else _free_gpu_bytes()
    if free is not None:
        return "cuda", free / GIB
    import psutil

    return "cpu", min(psutil.virtual_memory().available, _free_of_container()) / GIB


def _cpu_build() -> bool:
    try:
        return "+cpu" in importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False


def _free_gpu_bytes() -> int | None:
    """Free bytes of the first GPU (or MIG slice) in CUDA_VISIBLE_DEVICES; None where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if not visible or visible == "-1":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        if visible.isdigit():
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(visible))
        else:
            handle = pynvml.nvmlDeviceGetHandleByUUID(visible)
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _free_of_container() -> float:
    """Bytes left below the memory limit of the control group (version 2), cached files not counted as used."""
    try:
        limit, used = ((_CONTROL_GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        facts = dict(line.split() for line in (_CONTROL_GROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return float("inf")
    return float("inf") if limit == "max" else max(0, int(limit) - int(used) + int(facts.get("inactive_file", 0)))

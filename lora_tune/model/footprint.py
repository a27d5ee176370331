"""Bytes of a run by part, from the shape of its base and the recipe.

Weights by quantization; adapters, gradients and optimizer states by parameter; kept activations as counted by
saved-tensor hooks (`activations.py`). Temporaries of one layer's backward pass (4I + 6h per token; `pieces.py` where
all layers are recomputed) and 0.5 GiB for the CUDA context, cuBLAS and fragmentation are estimates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lora_tune.errors import Problem, UsageError
from lora_tune.model.activations import (
    Kernels,
    gate_and_up_bytes,
    has_latents,
    input_bytes,
    is_target,
    kept_after_forward,
    rank_of,
    saved_bytes_per_layer,
)
from lora_tune.model.calibration import Calibration
from lora_tune.model.cards import Card
from lora_tune.model.counted_attention import counted_attention, reads_lengths
from lora_tune.model.device import Device
from lora_tune.model.meta_shape import shape_of
from lora_tune.model.pieces import backward_bytes, cache_bytes, evaluation_bytes, keeps_input_alone
from lora_tune.model.shape import Shape
from lora_tune.model.sharding import ADAPTER_BYTES, gathered_units, held_adapter, held_base
from lora_tune.model.strategy import STRATEGIES, Layout
from lora_tune.recipe import Base, Lora, Train

GIB = 2**30
ONE_CARD = Layout()
RUNTIME_GIB = 0.5
_ROW_LENGTHS = 2  # documents of a micro-batch are folded into rows of at most about this many times max_length
_NF4 = 0.5 + 1 / 64 + 4 / 16384  # bytes: 4 bits, one 8-bit scale per 64, one float32 per 256 scales
_NF4_SINGLE = 0.5 + 4 / 64  # without double quantization: one float32 scale per 64
OPTIMIZER_BYTES = {  # states per trained parameter of float32
    "adamw": 8.0, "paged_adamw": 8.0, "adamw_8bit": 2.04, "paged_adamw_8bit": 2.04, "lion_8bit": 1.02,
    "adafactor": 0.5, "sgd": 0.0,
}  # fmt: skip
_ANCHORED = ("pissa", "olora")  # keep frozen anchors as large as what is trained
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "lm_head")
_EVALUATED_TOKENS = 8_192  # of a batch of the held-out loss; halved on a GPU where it does not fit
_LOSS_POSITIONS = 256  # of a row whose log-probabilities are computed at once
_INPUTS_HERE = 3  # that of the last layer, of the one that is recomputed, and the one on its way (`offload.py`)
_LOSS_TILE = {"cpu": 2**26, "cuda": 2**28}  # bytes of the logits that are computed at once
LOSS_BLOCK = {"cpu": 2**18, "cuda": 2**22}  # of them, those that PyTorch works on at once in float32
EXACT = ("weights", "adapters", "gradients", "optimizer")  # parts that are counted, not estimated
# share of a part by which it may be wrong, before anything was measured on a card
_ERROR = {"weights": 0.005, "activations": 0.03, "loss_head": 0.3, "buffers": 0.3, "exchange": 0.3, "runtime": 0.4}


@dataclass(frozen=True, slots=True)
class Choice:
    """What `auto` became: sequences of a micro-batch, how many layers recompute their activations, the optimizer, and
    whether the inputs of those layers wait in the machine's memory.
    """

    micro: int
    checkpointed: int
    optimizer: str
    offload: Literal["none", "checkpoints"] = "none"


@dataclass(frozen=True, slots=True)
class Job:
    """All that the formulas need of a run, whatever is chosen for it."""

    shape: Shape
    base: Base
    lora: Lora
    train: Train
    device: Device
    calibration: Calibration | None = None
    layout: Layout = ONE_CARD
    """How several cards share the run; `train.batch_size` is this card's share of the batch."""
    card: Card | None = None
    """The card that it is planned for, where it is known."""
    reads_lengths: Literal["yes", "no"] = "no"
    """Whether the base's attention can be told the lengths of documents (`counted_attention.py`)."""

    @property
    def element(self) -> int:
        """Bytes of an activation and of an unquantized weight."""
        if self.base.compute_dtype == "auto":
            return 2 if self.device == "cuda" else 4
        return 4 if self.base.compute_dtype == "float32" else 2

    @property
    def kernels(self) -> Kernels:
        """What of the layers computes fused (`model/kernels/`): nothing where they are divided between processes."""
        given = self.train.kernels == "auto" and self.train.compile == "off"
        if not given or STRATEGIES[self.layout.strategy].divided:
            return "off"
        return "norms" if self.base.quantize == "int8" else "auto"


def job_of(
    config: Mapping[str, Any],
    *,
    base: Base,
    lora: Lora,
    train: Train,
    device: Device,
    calibration: Calibration | None = None,
) -> Job:
    """The formulas' inputs from a `config.json` for one card; a base stored quantized keeps its own kind.

    Raises UsageError for a config that cannot be read, or an embedding on the CPU that is the head as well.
    """
    shape = shape_of(config)
    if base.embeddings == "cpu" and shape.tied:
        fix = "set it to device: the table is needed there"
        raise UsageError(Problem("the head of this base is its embedding, got cpu", fix, key="base.embeddings"))
    stored = config.get("quantization_config")
    if isinstance(stored, Mapping):
        double = bool(stored.get("bnb_4bit_use_double_quant"))
        kind = "int8" if stored.get("load_in_8bit") or stored.get("_load_in_8bit") else "nf4"
        base = base.model_copy(update={"quantize": kind, "double_quant": double})
    return Job(shape, base, lora, train, device, calibration, reads_lengths=reads_lengths(config, shape))


def parts_gib(job: Job, choice: Choice) -> dict[str, float]:
    """GiB by part at the moment when most is needed, corrected by what was measured on this card; they add up.

    `activations` are kept from the forward to the backward pass, `loss_head` holds logits and their gradients,
    `buffers` what the peak needs beside them: a layer that is recomputed, temporaries, dequantized weights, masks.
    """
    found = formula_gib(job, choice)
    if job.calibration is None or "peak" not in job.calibration.ratios:
        return found
    counted = sum(found[name] for name in EXACT)
    total, fixed = sum(found.values()), counted + found["runtime"]
    estimated = max(total - fixed, 1e-9)
    factor = min(3.0, max(0.3, (total * job.calibration.ratios["peak"] - fixed) / estimated))
    return {name: size if name in (*EXACT, "runtime") else size * factor for name, size in found.items()}


def formula_gib(job: Job, choice: Choice) -> dict[str, float]:
    """GiB by part as the formulas give them: of training, or of evaluation where that may need more."""
    training, evaluation = (
        {name: size / GIB for name, size in parts(job, choice).items()} for parts in (_training, _evaluation)
    )

    def at_most(parts: dict[str, float]) -> float:
        return sum(parts.values()) + uncertainty_gib(job, parts)

    return training if at_most(training) >= at_most(evaluation) else evaluation


def uncertainty_gib(job: Job, parts: Mapping[str, float]) -> float:
    """By how much the sum of these parts may be wrong; less where this card was measured."""
    peak = sum(parts.values())
    measured = job.calibration if job.calibration and "peak" in job.calibration.ratios else None
    if measured is not None:
        return peak * max(0.01, measured.spread if measured.spread is not None else 0.03)
    known = 1.0 if job.shape.known and not has_latents(job.shape) else 3.0
    return known * sum(share * parts.get(name, 0.0) for name, share in _ERROR.items())


def _held(job: Job, choice: Choice) -> dict[str, float]:
    """Bytes that stay through the whole run; of several cards on the first, with what it gathers or sums up."""
    adapters, full = trained_weights(job.shape, job.lora)
    state = OPTIMIZER_BYTES[choice.optimizer]
    anchors = adapters * ADAPTER_BYTES if job.lora.method in _ANCHORED else 0
    held = {
        "weights": _weights(job),
        "adapters": adapters * ADAPTER_BYTES + full * job.element + anchors,
        "gradients": adapters * ADAPTER_BYTES + full * job.element,
        "optimizer": adapters * state + full * state * job.element / 4,
    }
    cards = job.layout.world
    if cards == 1:
        return held
    if not STRATEGIES[job.layout.strategy].divided:
        return held | {"exchange": held["gradients"]}  # the buckets in which gradients are summed
    share = held_adapter(job.shape, job.lora, cards=cards) / max(held_adapter(job.shape, job.lora, cards=1), 1)
    divided = {name: held[name] * share for name in ("adapters", "gradients", "optimizer")}
    weights = held_base(job.shape, job.base, element=job.element, cards=cards)
    gathered = gathered_units(job.shape, job.base, job.lora, element=job.element)
    return {"weights": weights, **divided, "exchange": gathered}


def _training(job: Job, choice: Choice) -> dict[str, float]:
    """Bytes by part in a training step: at the loss, or in the backward pass of a layer, whichever needs more."""
    tokens = choice.micro * job.train.max_length
    shape, element = job.shape, job.element
    one_set = layer_bytes(job, tokens)
    kept = kept_after_forward(
        shape,
        one_set=one_set,
        tokens=tokens,
        element=element,
        checkpointed=choice.checkpointed,
        kernels=job.kernels,
    )
    layer = _layer_buffers(job, tokens)
    if choice.checkpointed == shape.layers and keeps_input_alone(shape, lora=job.lora, kernels=job.kernels):
        one_set -= tokens * gate_and_up_bytes(shape, element=element)
        layer = backward_bytes(shape, tokens, element=element) + _dequantized(job)
    recomputed = choice.checkpointed * input_bytes(shape, tokens=tokens, element=element)
    recomputed += max(shape.layers - choice.checkpointed, 1) * one_set
    away = offloaded_bytes(job, choice)
    kept, recomputed = kept - away, recomputed - away
    head = _loss_head(job, tokens)
    return _held(job, choice) | {
        "activations": kept,
        "loss_head": head,
        "buffers": max(0.0, recomputed + layer - kept - head) + _lasting_buffers(job, tokens),
        "runtime": RUNTIME_GIB * GIB,
    }


def layer_bytes(job: Job, tokens: int) -> int:
    """Bytes that one layer that is not recomputed keeps for the backward pass of a micro-batch of `tokens`."""
    attention = counted_attention(job, tokens)
    joined = tokens * job.shape.query * job.element if attention == "by document" else 0
    return joined + saved_bytes_per_layer(
        job.shape,
        tokens=tokens,
        element=job.element,
        lora=job.lora,
        row_length=_row_length(job, tokens) if attention == "mask" else None,
        dropout_mask=1 if job.device == "cuda" else None,
        kernels=job.kernels,
    )


def offloaded_bytes(job: Job, choice: Choice) -> int:
    """Bytes of the inputs of checkpointed layers that wait in the machine's memory; three are on the GPU at a time."""
    if choice.offload == "none" or job.device == "cpu":
        return 0
    one = input_bytes(job.shape, tokens=choice.micro * job.train.max_length, element=job.element)
    return max(0, choice.checkpointed - _INPUTS_HERE) * one


def _evaluation(job: Job, choice: Choice) -> dict[str, float]:
    """Bytes by part while the held-out loss is computed, or an answer is generated, between steps.

    On a GPU batches are halved until they fit, so that one row of `max_length` tokens is what must. An answer to a
    prompt as long as that needs its keys and values beside what a pass over it takes.
    """
    shape, element, length = job.shape, job.element, job.train.max_length
    tokens = length if job.device == "cuda" else max(length, _EVALUATED_TOKENS)
    logits = length * shape.vocabulary * element + min(length, _LOSS_POSITIONS) * shape.vocabulary * (element + 8)
    if has_plain_head(job):
        logits = min(logits, int(_loss_tile(job, length)))
    loss, answer = (
        evaluation_bytes(shape, rows, element=element, lora=job.lora, kernels=job.kernels) for rows in (tokens, length)
    )
    cache = cache_bytes(shape, length, element=element)
    answers = answer + cache > loss + logits
    return _held(job, choice) | {
        "gradients": 0.0,
        "activations": float(cache) if answers else 0.0,
        "loss_head": 0.0 if answers else float(logits),
        "buffers": (answer if answers else loss) + _dequantized(job),
        "runtime": RUNTIME_GIB * GIB,
    }


def _weights(job: Job) -> float:
    """The frozen base: linear layers as quantized; embeddings, head, norms and experts in the compute dtype."""
    shape, quantize = job.shape, job.base.quantize
    four_bit = _NF4 if job.base.double_quant else _NF4_SINGLE
    per_weight = {"nf4": four_bit, "fp4": four_bit, "int8": 1.0, "none": float(job.element)}[quantize]
    return shape.linear_parameters * per_weight + _unquantized(job)


def unquantized_gib(job: Job) -> float:
    """GiB of the base that no quantization reaches: embeddings, head, norms and experts."""
    return _unquantized(job) / GIB


def _unquantized(job: Job) -> int:
    """Bytes of it on the device: without the input embedding where that stays in the machine's memory."""
    shape = job.shape
    elsewhere = shape.vocabulary * shape.hidden if job.base.embeddings == "cpu" and job.device == "cuda" else 0
    rest = shape.embedding_parameters + shape.expert_parameters + shape.other_parameters
    return (rest - elsewhere) * job.element


def trainable_parameters(shape: Shape, lora: Lora) -> int:
    """Weights of the adapter: A and B of every target, DoRA's magnitudes, modules trained in full, new tokens."""
    return sum(trained_weights(shape, lora))


def trained_weights(shape: Shape, lora: Lora) -> tuple[int, int]:
    """Weights of adapters and new tokens (float32), and of modules trained in full (in the dtype of the base)."""
    count = 0
    for linear in shape.linears:
        if is_target(linear, lora):
            count += linear.count * rank_of(linear, lora) * (linear.inputs + linear.outputs)
            count += linear.count * linear.outputs if lora.method == "dora" else 0
    full = {linear.name: linear.parameters for linear in shape.linears}
    full |= dict.fromkeys(_EMBEDDINGS, shape.vocabulary * shape.hidden)
    in_full = sum(full.get(name.rsplit(".", 1)[-1], 0) for name in lora.modules_to_save)
    return count + len(lora.new_tokens) * shape.hidden * (1 if shape.tied else 2), in_full


def _loss_head(job: Job, tokens: int) -> float:
    """A tile of logits and the inputs of the head, in whose place their gradient comes (`kernels/loss_head.py`).

    A head that is trained, has new tokens in it or is divided over cards gives all logits: they, their float32 copy and
    its gradient are held at once.
    """
    shape = job.shape
    if has_plain_head(job):
        return max(_loss_tile(job, tokens), 3 * tokens * shape.hidden * job.element)
    return tokens * shape.vocabulary * (job.element + 8)


def has_plain_head(job: Job) -> bool:
    """Whether the loss is computed from the inputs of the head, tile by tile."""
    trained = any(name.rsplit(".", 1)[-1] in _EMBEDDINGS for name in job.lora.modules_to_save)
    return not (trained or job.lora.new_tokens or STRATEGIES[job.layout.strategy].divided)


def _loss_tile(job: Job, tokens: int) -> float:
    """Bytes of a tile of logits, what PyTorch works on of it in float32, and the inputs of the head."""
    wide = 6 if job.base.compute_dtype == "float16" else job.element
    logits = job.shape.vocabulary * loss_tile_tokens(tokens, job.shape.vocabulary, element=wide, device=job.device)
    return logits * wide + 8 * min(logits, LOSS_BLOCK[job.device]) + tokens * job.shape.hidden * job.element


def loss_tile_tokens(tokens: int, vocabulary: int, *, element: int, device: str) -> int:
    """How many tokens have their logits computed at once; `element` is the bytes of a logit."""
    return max(1, min(tokens, _LOSS_TILE.get(device, _LOSS_TILE["cuda"]) // (vocabulary * element)))


def _layer_buffers(job: Job, tokens: int) -> float:
    """What one layer's backward pass needs: temporaries, a dequantized weight, DoRA's norm of W + BA in float32."""
    shape = job.shape
    temporaries = tokens * (4 * shape.active_intermediate + 6 * shape.hidden) * job.element / 2
    merged = 2 * shape.largest_linear * 4 if job.lora.method == "dora" else 0
    return temporaries + _dequantized(job) + merged


def _dequantized(job: Job) -> float:
    return 0.0 if job.base.quantize == "none" else float(job.shape.largest_linear * job.element)


def _lasting_buffers(job: Job, tokens: int) -> float:
    """From the forward pass on: the mask of packed rows, 16-bit copies of adapters, embeddings with new tokens."""
    shape = job.shape
    adapters, _ = trained_weights(shape, job.lora)
    copies = adapters * (2 if job.element == 2 else 0)
    if job.lora.method in _ANCHORED:  # trained and anchored rows are joined into one matrix at every forward pass
        copies = 2 * adapters * job.element
    joined = 2 * shape.vocabulary * shape.hidden * job.element if job.lora.new_tokens else 0
    mask = tokens * _row_length(job, tokens) if counted_attention(job, tokens) == "mask" else 0
    return copies + joined + mask


def _row_length(job: Job, tokens: int) -> int:
    return min(tokens, _ROW_LENGTHS * job.train.max_length)

"""Seconds and FLOP of a step: products of matrices, memory traffic and what the host needs to start them.

Two constants are fitted to published runs of transformers with PEFT and bitsandbytes, not compiled: products reach 70 %
of a card's dense 16-bit throughput, traffic 80 % of its bandwidth. `benchmarks/plan_accuracy.py` prints published runs
beside what comes out: those with fused layers and loss are planned 3 to 5 % slower than they were, stock ones 9 to 19 %
faster. Expect 25 % either way.
"""

from __future__ import annotations

from lora_tune.model.activations import saved_bytes_per_layer
from lora_tune.model.cards import Card
from lora_tune.model.counted_attention import attended
from lora_tune.model.footprint import Choice, Job, has_plain_head, trained_weights
from lora_tune.model.pieces import keeps_input_alone

SPEED_ERROR = 0.25
_PRODUCTS = 0.7  # of the card's TFLOP/s
_TRAFFIC = 0.8  # of its bandwidth
_PASSES = 3  # every kept byte is written once and read about twice, in each of forward, backward (2) and recompute
_HOST_S = {"none": 0.0019, "int8": 0.0035, "nf4": 0.0035, "fp4": 0.0035}  # per layer and pass, from Python and launches
_STEP_S = 0.01  # clipping, optimizer, logging
_RELATIVE = Card("", 0.0, 100.0, 800.0)  # a card of unknown speed: choices need the proportion alone
_CPU = Card("", 0.0, 1.0, 40.0)


def flop_per_token(job: Job, choice: Choice) -> float:
    """FLOP of training on one token: forward 2 N and backward 2 N, 2 N more where a layer is recomputed, but for the
    last product of an MLP that keeps its input alone.

    Of a mixture N counts the experts that a token passes. The head computes its logits and the gradient of its inputs
    (4 V h); one that gives all logits, because it is trained, has new tokens or is divided, is counted with 6 V h,
    which is no less than it takes. Attention has 2 products forward and 5 backward over the keys that are read, masked
    or not.
    """
    shape = job.shape
    recomputed = choice.checkpointed / shape.layers
    experts = shape.active_intermediate - shape.shared_intermediate if shape.routed else 0
    frozen = shape.linear_parameters + 3 * shape.hidden * experts * shape.layers
    adapters, full = trained_weights(shape, job.lora)
    keys = 2 * attended(job, choice) * shape.query * shape.layers
    head = (4 if has_plain_head(job) else 6) * shape.vocabulary * shape.hidden
    again = 2 * recomputed * (frozen - _not_again(job) + keys + adapters)
    return 4 * frozen + head + 7 * keys + 6 * adapters + 2 * full + again


def _not_again(job: Job) -> int:
    """Frozen weights of a recomputed layer that are not multiplied with again, over all layers."""
    if not keeps_input_alone(job.shape, lora=job.lora, kernels=job.kernels):
        return 0
    return sum(linear.parameters for linear in job.shape.linears if linear.name == "down_proj")


def step_seconds(job: Job, choice: Choice, card: Card | None) -> float:
    """Seconds of one optimizer step on this card; on one of unknown speed a number that orders choices alone."""
    speed = card if card and card.tflops else _CPU if job.device == "cpu" else _RELATIVE
    shape, tokens = job.shape, choice.micro * job.train.max_length
    recomputed = choice.checkpointed / shape.layers
    one_set = saved_bytes_per_layer(shape, tokens=tokens, element=job.element, lora=job.lora, kernels=job.kernels)
    kept = shape.layers * one_set
    traffic = _PASSES * (3 + recomputed) * kept
    if job.base.quantize != "none":
        held = 1.0 if job.base.quantize == "int8" else 0.516
        read = (2 + recomputed) * shape.linear_parameters - recomputed * _not_again(job)
        traffic += read * (job.element + held)
    factor = 1.0 if job.element == 2 else 4.0  # float32 products reach about a quarter of the 16-bit rate
    products = tokens * flop_per_token(job, choice) * factor / (_PRODUCTS * speed.tflops * 1e12)
    seconds = products + traffic / (_TRAFFIC * speed.bandwidth_gbs * 1e9)
    if job.device == "cuda":
        seconds = max(seconds, shape.layers * _HOST_S[job.base.quantize] * (1 + recomputed))
    seconds = job.train.batch_size // choice.micro * seconds + _STEP_S
    ratio = job.calibration.step_ratio if job.calibration else None
    return seconds * (ratio or 1.0)

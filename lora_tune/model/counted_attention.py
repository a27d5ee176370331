"""Which attention the plan counts: whether the run will tell it the lengths of packed documents (cold).

`attention.use_varlen` decides it in the run, with the model in hand. Here the config, the recipe and the card have to
do; what they leave open is counted with a mask, which needs more memory and time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from lora_tune.model.activations import has_latents
from lora_tune.model.cards import Card
from lora_tune.model.shape import Shape
from lora_tune.model.strategy import STRATEGIES

if TYPE_CHECKING:
    from lora_tune.model.footprint import Choice, Job

Attention = Literal["by lengths", "by document", "mask", "causal"]
_OWN = ("falcon", "gemma2", "gpt_oss", "stablelm", "qwen3_vl", "qwen3_vl_text")  # compute their own, or do not hand on
_DROPS = ("gpt2", "gpt_bigcode")  # have dropout in their attention where the config does not say 0
_KINDS = {"full_attention", "sliding_attention"}
_LARGEST_HEAD = 256  # of the kernel, which takes multiples of 8


def reads_lengths(config: Mapping[str, Any], shape: Shape) -> Literal["yes", "no"]:
    """Whether attention of a base with this `config.json` can be told the lengths of documents; no where in doubt."""
    text = next((config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), Mapping)), config)
    drops = text.get("attention_dropout") or text.get("attn_pdrop", 0.1 if shape.model_type in _DROPS else 0)
    kinds = text.get("layer_types")
    other = isinstance(kinds, (list, tuple)) and not set(map(str, kinds)) <= _KINDS
    own = shape.model_type in _OWN or not shape.known or has_latents(shape)
    return "no" if own or other or drops else "yes"


def counted_attention(job: Job, tokens: int) -> Attention:
    """Which attention the plan counts for a micro-batch of `tokens`; `base.attention` in docs/attention.md says why.

    by lengths: a kernel computes all documents, each by itself; queries, keys, values and what comes out are kept, as
    of one causal row. by document: SDPA does so for one document after another, and what comes out is kept once more,
    joined. mask: several documents in a row, rows of unequal length or a sliding window; keys and values are repeated
    for grouped queries. causal: one document in a row.

    A card that is not known, or is older than Ampere, is counted with the mask. So is `varlen` where SDPA would repeat
    keys and values, or make a mask of a window, for every document.
    """
    if job.base.attention == "flash_attention_2":
        return "by lengths"
    shape, length = job.shape, job.train.max_length
    window = shape.sliding_window is not None and shape.sliding_window < length
    if job.reads_lengths == "yes" and job.base.attention in ("auto", "varlen"):
        head = shape.query // shape.heads
        recent = job.device == "cuda" and job.element == 2 and _is_ampere(job.card)
        divided = STRATEGIES[job.layout.strategy].divided
        if recent and not divided and head % 8 == 0 and head <= _LARGEST_HEAD:
            return "by lengths"
        shared = job.device == "cpu" or recent or shape.query == shape.key_value
        if job.base.attention == "varlen" and shared and not window:
            return "by document"
    return "mask" if job.train.packing or tokens > length or window else "causal"


def attended(job: Job, choice: Choice) -> float:
    """Keys that a query is multiplied with: a whole sequence under a mask, half of one where attention is causal.

    How long documents are is not known: each is taken to be `max_length`. Under a mask they are folded into rows about
    as long as the longest of them.
    """
    length = job.train.max_length
    return float(length) if counted_attention(job, choice.micro * length) == "mask" else length / 2


def _is_ampere(card: Card | None) -> bool:
    """Whether the card is one of the table with compute capability 8.0 or more: those before it have no bfloat16."""
    return card is not None and card.tflops > 0 and card.sixteen_bit == "bfloat16"

"""The attention that the plan counts is the one that the run takes; head and documents as they are computed now."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
from seldom import often
from test_memory import LLAMA_2, LLAMA_3

from benchmarks.saved_activations import EQUAL_HEADS, FAMILIES, SIZES, saved_bytes, tiny_config
from lora_tune.model.activations import kept_after_forward
from lora_tune.model.cards import CARDS, find_card, usable_gib
from lora_tune.model.counted_attention import attended, counted_attention, reads_lengths
from lora_tune.model.footprint import Choice, Job, job_of, layer_bytes, parts_gib
from lora_tune.model.memory import try_plan
from lora_tune.model.shape import read_shape
from lora_tune.model.speed import flop_per_token, step_seconds
from lora_tune.model.strategy import Layout
from lora_tune.recipe import Base, Lora, Train

ONE = Choice(1, 32, "adamw")
AMPERE = CARDS["rtx3090"]
WINDOWED = LLAMA_3 | {"model_type": "mistral", "sliding_window": 1024}


def job(card: Any = AMPERE, *, config: dict[str, Any] = LLAMA_3, train: Train | None = None, lora: Lora | None = None,
        device: Any = "cuda", layout: Layout | None = None, **base: Any) -> Job:  # fmt: skip
    made = job_of(config, base=Base(name="x", **base), lora=lora or Lora(), train=train or Train(), device=device)
    return replace(made, card=card, layout=layout or Layout())


COUNTED = {
    "an Ampere card": (job(), "by lengths"),
    "a Hopper card": (job(CARDS["h100"]), "by lengths"),
    "float16 there": (job(compute_dtype="float16"), "by lengths"),
    "a sliding window there": (job(config=WINDOWED), "by lengths"),
    "an unpacked sequence there": (job(train=Train(packing=False)), "by lengths"),
    "a Turing card": (job(CARDS["t4"]), "mask"),
    "a card of unknown speed": (job(find_card("24GiB")), "mask"),
    "no card": (job(None), "mask"),
    "float32": (job(compute_dtype="float32"), "mask"),
    "a CPU": (job(None, device="cpu"), "mask"),
    "sdpa": (job(attention="sdpa"), "mask"),
    "eager": (job(attention="eager"), "mask"),
    "sdpa, one document": (job(attention="sdpa", train=Train(packing=False)), "causal"),
    "sdpa, a window": (job(attention="sdpa", config=WINDOWED, train=Train(packing=False)), "mask"),
    "a divided base": (job(layout=Layout("fsdp2", 2)), "mask"),
    "one that is shared whole": (job(layout=Layout("ddp", 2)), "by lengths"),
    "a divided base, varlen": (job(layout=Layout("fsdp2", 2), attention="varlen"), "by document"),
    "flash-attn": (job(attention="flash_attention_2", layout=Layout("fsdp2", 2)), "by lengths"),
    "varlen on a CPU": (job(None, device="cpu", attention="varlen"), "by document"),
    "varlen on a CPU, a window": (job(None, device="cpu", attention="varlen", config=WINDOWED), "mask"),
    "varlen on a Turing card": (job(CARDS["t4"], attention="varlen", config=LLAMA_2), "by document"),
    "varlen there, grouped queries": (job(CARDS["t4"], attention="varlen"), "mask"),
    "dropout in attention": (job(config=LLAMA_3 | {"attention_dropout": 0.1}), "mask"),
    "linear layers": (job(config=LLAMA_3 | {"layer_types": ["linear_attention"] * 32}), "mask"),
    "soft caps": (job(config=LLAMA_3 | {"model_type": "gemma2", "head_dim": 256}), "mask"),
    "heads too large": (job(config=LLAMA_3 | {"head_dim": 512}), "mask"),
    "heads of another width": (job(config=LLAMA_3 | {"head_dim": 100}), "mask"),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_the_attention_that_is_counted(name: str) -> None:
    asked, expected = COUNTED[name]
    assert counted_attention(asked, asked.train.max_length) == expected
    assert attended(asked, ONE) == (2048 if expected == "mask" else 1024)


@pytest.mark.parametrize("micro", [1, 4])
def test_without_a_mask_packed_rows_need_what_causal_ones_do(micro: int) -> None:
    """The mask, and keys and values repeated for grouped queries, stand in neither memory nor speed."""
    choice, packed = Choice(micro, 0, "adamw"), Train(batch_size=4)
    alone = Choice(1, 0, "adamw")
    asked, masked = job(train=packed), job(train=packed, attention="sdpa")
    causal = job(train=Train(batch_size=4, packing=False), attention="sdpa")
    more = parts_gib(masked, choice)["activations"] - parts_gib(asked, choice)["activations"]
    row = min(micro, 2) * 2048
    repeated = 2 * 2 * (4096 - 1024)
    assert more * 2**30 == pytest.approx(32 * micro * 2048 * (repeated + 2 * row))
    masks = parts_gib(masked, choice)["buffers"] - parts_gib(asked, choice)["buffers"]
    assert masks * 2**30 == pytest.approx(micro * 2048 * row, rel=0.01)
    assert parts_gib(asked, alone) == pytest.approx(parts_gib(causal, alone))
    assert flop_per_token(asked, choice) == pytest.approx(flop_per_token(causal, alone))
    assert step_seconds(asked, choice, AMPERE) < step_seconds(masked, choice, AMPERE)


def test_the_card_of_a_plan_says_which() -> None:
    """A plan for a known card, and the larger card that one is sent to, count by that card."""
    base, lora, train = Base(name="x"), Lora(), Train(max_length=16_384, batch_size=1, gradient_checkpointing="all")

    def peak(card: Any, **changed: Any) -> float:
        made = base.model_copy(update=changed)
        return try_plan(LLAMA_3, base=made, lora=lora, train=train, budget_gib=80, device="cuda", card=card).peak_gib

    assert peak(AMPERE) < peak(None) - 0.5 and peak(AMPERE, attention="sdpa") == pytest.approx(peak(None))
    small = try_plan(LLAMA_3, base=base, lora=lora, train=train, budget_gib=8, device="cuda", card=CARDS["t4"])
    larger = {change.words.rpartition(" ")[2]: change.peak_gib for change in small.changes if change.alters == 3}
    assert any(counted_attention(job(CARDS[name]), 2048) == "by lengths" for name in larger)
    for name, gib in larger.items():
        assert gib == pytest.approx(
            try_plan(LLAMA_3, base=base, lora=lora, train=train, budget_gib=usable_gib(CARDS[name]),
                     device="cuda", card=CARDS[name]).peak_gib
        )  # fmt: skip


HEADS = {
    "frozen": (job(), 4),
    "float32 on a CPU": (job(None, device="cpu"), 4),
    "trained": (job(lora=Lora(modules_to_save=("lm_head",))), 6 + 2),  # and the gradient of its weights
    "new tokens": (job(lora=Lora(new_tokens=("<x>",))), 6),
    "divided": (job(layout=Layout("zero3", 2)), 6),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_frozen_head_is_computed_twice_over(name: str) -> None:
    """Logits and the gradient of the hidden states: 4 V h, since no logits are computed again."""
    asked, products = HEADS[name]
    more = replace(asked, shape=replace(asked.shape, vocabulary=2 * asked.shape.vocabulary))
    grown = flop_per_token(more, ONE) - flop_per_token(asked, ONE)
    assert grown == pytest.approx(products * asked.shape.vocabulary * asked.shape.hidden)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_what_documents_one_by_one_keep(family: str, dtype: Literal["bfloat16", "float32"]) -> None:
    """Against what autograd keeps: no mask, keys and values once, what comes out once more."""
    config = tiny_config(family, (128, 320, 4, 2, 32), layers=6)
    real = saved_bytes(config, dtype=dtype, lora=Lora(rank=4), documents=[80, 120], checkpointed=1, attention="varlen")
    train = Train(batch_size=2, micro_batch_size=2, max_length=100)
    asked = job(None, config=config, train=train, lora=Lora(rank=4), device="cpu", attention="varlen",
                compute_dtype=dtype, quantize="none")  # fmt: skip
    assert counted_attention(asked, 200) == "by document"
    ours = kept_after_forward(
        asked.shape, one_set=layer_bytes(asked, 200), tokens=200, element=asked.element, checkpointed=1
    )
    assert ours == pytest.approx(real, rel=0.03)


KINDS = [name for name in FAMILIES if "moe" not in name]


@pytest.mark.parametrize("family", often(KINDS, kept=("llama", "gemma2", "gpt2", "falcon", "stablelm")))
def test_a_base_is_told_lengths_where_the_plan_counts_on_it(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from lora_tune.model.attention import use_varlen

    sizes = EQUAL_HEADS[6] if family in ("gpt2", "gpt_neox", "phi", "falcon", "stablelm") else SIZES[6]
    config = tiny_config(family, sizes, layers=1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    why = use_varlen(model, Base(name="x", attention="varlen"))
    assert reads_lengths(config, read_shape(config)) == ("no" if why else "yes"), why
    if family == "gpt2":
        assert reads_lengths(config | {"attn_pdrop": 0.1}, read_shape(config)) == "no"

"""Saved activations: the plan's count against what saved-tensor hooks see, family by family."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from benchmarks.saved_activations import saved_bytes, tiny_config
from lora_tune.model.activations import kept_after_forward, saved_bytes_per_layer
from lora_tune.model.shape import read_shape
from lora_tune.recipe import Lora

SIZES = (128, 320, 4, 2, 32)
EQUAL = (128, 320, 4, 4, 32)  # as many key-value heads as heads
FAMILIES = {
    "llama": SIZES, "mistral": SIZES, "qwen2": SIZES, "qwen3": SIZES, "gemma": SIZES, "gemma2": SIZES,
    "gemma3_text": SIZES, "phi3": SIZES, "olmo2": SIZES, "glm4": SIZES, "smollm3": SIZES, "cohere": SIZES,
    "gpt2": EQUAL, "gpt_neox": EQUAL, "phi": EQUAL, "starcoder2": SIZES, "stablelm": EQUAL, "falcon": EQUAL,
    "mixtral": SIZES, "qwen3_moe": SIZES, "gpt_oss": SIZES, "qwen2_moe": SIZES, "exaone4": SIZES,
}  # fmt: skip
WIDTH: dict[str, Literal["bfloat16", "float32"]] = {"2": "bfloat16", "4": "float32"}


def planned(
    config: dict[str, Any],
    *,
    documents: list[int],
    element: int,
    lora: Lora,
    checkpointed: int,
    kernels: Literal["auto", "off"] = "auto",
) -> int:
    shape, tokens = read_shape(config), sum(documents)
    row_length = tokens if len(documents) > 1 else None
    one_set = saved_bytes_per_layer(
        shape, tokens=tokens, element=element, lora=lora, row_length=row_length, kernels=kernels
    )
    return kept_after_forward(
        shape, one_set=one_set, tokens=tokens, element=element, checkpointed=checkpointed, kernels=kernels
    )


@pytest.mark.parametrize("checkpointed", [0, 6], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_16_bit_pass_keeps(family: str, quantize: Literal["none", "nf4"], checkpointed: int) -> None:
    config = tiny_config(family, FAMILIES[family], layers=6)
    lora = Lora(rank=4)
    real = saved_bytes(
        config, dtype="bfloat16", lora=lora, documents=[200], quantize=quantize,
        checkpointed="all" if checkpointed else "none",
    )  # fmt: skip
    assert planned(config, documents=[200], element=2, lora=lora, checkpointed=checkpointed) == pytest.approx(
        real, rel=0.03
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_packed_rows_keep_in_16_and_32_bit(family: str) -> None:
    config = tiny_config(family, FAMILIES[family], layers=6)
    lora, documents = Lora(rank=4), [80, 120]
    for element, dtype in ((2, WIDTH["2"]), (4, WIDTH["4"])):
        real = saved_bytes(config, dtype=dtype, lora=lora, documents=documents, checkpointed=1)
        assert planned(config, documents=documents, element=element, lora=lora, checkpointed=1) == pytest.approx(
            real, rel=0.03
        )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "gpt_neox", "qwen2_moe"])
def test_what_pefts_path_keeps(family: str) -> None:
    """With `train.kernels: off`, in 16 bit with one layer checkpointed."""
    config, lora = tiny_config(family, FAMILIES[family], layers=6), Lora(rank=4)
    real = saved_bytes(config, dtype="bfloat16", lora=lora, documents=[200], checkpointed=1, kernels="off")
    found = planned(config, documents=[200], element=2, lora=lora, checkpointed=1, kernels="off")
    assert found == pytest.approx(real, rel=0.03)
    assert found > planned(config, documents=[200], element=2, lora=lora, checkpointed=1)


METHODS = {
    "plain": Lora(rank=4),
    "rslora": Lora(rank=4, method="rslora"),
    "dropout": Lora(rank=4, dropout=0.1),
    "dora": Lora(rank=4, method="dora"),
    "attention alone": Lora(rank=4, targets=("q_proj", "v_proj")),
    "feed-forward alone": Lora(rank=4, targets=("up_proj", "down_proj")),
    "other ranks": Lora(rank=4, rank_pattern={"q_proj": 32, "down_proj": 64}),
}


@pytest.mark.parametrize("name", METHODS)
def test_what_other_methods_and_targets_keep(name: str) -> None:
    """DoRA forms W + BA for a moment, whatever the number of tokens: two lengths show what grows with them."""
    lora, found = METHODS[name], []
    for length in (200, 400):
        more, fewer = (tiny_config("llama", SIZES, layers=layers) for layers in (4, 2))
        real = [saved_bytes(config, dtype="bfloat16", lora=lora, documents=[length]) for config in (more, fewer)]
        ours = [planned(config, documents=[length], element=2, lora=lora, checkpointed=0) for config in (more, fewer)]
        found.append((ours[0] - ours[1], real[0] - real[1]))
    (few, few_real), (many, many_real) = found
    assert many - few == pytest.approx(many_real - few_real, rel=0.03)

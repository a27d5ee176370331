"""Attention by document: equal to each document alone, bounds in every layer, kept out where it computes otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training_kit as kit
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lora_tune.model import attention
from lora_tune.model.base import checkpoint_layers
from lora_tune.recipe import Base, Train
from lora_tune.training.batches import IGNORED, FlatCollator

SIZE = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
ASKED = Base(name="x", attention="varlen")
COMPUTED: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {}, "olmo2": {}, "phi3": {}, "gemma": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}  # fmt: skip
NO_OTHER_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
KEPT_OUT: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": ({}, "eager"),
    "gpt_oss": ({"num_local_experts": 2, "num_experts_per_tok": 1}, "eager"),
    "llama": ({"attention_dropout": 0.1}, "dropout"),
    "gpt2": ({"attn_pdrop": 0.0, **NO_OTHER_DROPOUT}, ""),
    "gpt2 as it is": (NO_OTHER_DROPOUT, "dropout"),
    "qwen3_next": ({"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
                    "shared_expert_intermediate_size": 16}, "linear_attention"),
}  # fmt: skip
COLLATE = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)


def model_of(family: str, settings: dict[str, Any]) -> Any:
    """A random model of a family, in float32 and evaluation mode."""
    family = family.split()[0]
    torch.manual_seed(3)
    sizes = dict(SIZE) if family != "gpt2" else {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **settings)).eval()


def packed() -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Documents, the shortest of one token, and the batch of all of them."""
    draw = torch.Generator().manual_seed(7)
    documents = [torch.randint(3, 96, (length,), generator=draw) for length in (9, 1, 14, 6)]
    ids = [token for document in documents for token in document.tolist()]
    return documents, FlatCollator(COLLATE, 0)(
        [{"input_ids": ids, "labels": ids, "seq_lengths": [len(document) for document in documents]}]
    )


def summed_loss(model: Any, batch: dict[str, Any], labels_BT: torch.Tensor) -> torch.Tensor:
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1], labels_BT[0, 1:], reduction="sum")


@pytest.mark.parametrize("family", COMPUTED)
def test_packed_documents_are_computed_as_each_alone(family: str) -> None:
    """Logits to 1e-6 and all gradients, with bounds in every layer; the same with layers computed twice."""
    model = model_of(family, COMPUTED[family])
    documents, batch = packed()
    with torch.no_grad():
        alone = torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in documents])
    alone_loss = sum(summed_loss(model, {"input_ids": ids[None]}, ids[None]) for ids in documents if len(ids) > 1)
    alone_loss.backward()  # type: ignore[union-attr]
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert attention.use_varlen(model, ASKED) == "" and attention.is_used(model)
    with torch.no_grad():
        found = model(**batch, use_cache=False).logits[0]
    torch.testing.assert_close(found, alone, atol=1e-6, rtol=0)
    for layers in ("none", "all"):
        checkpoint_layers(model.train(), layers)
        model.zero_grad()
        summed_loss(model, batch, batch["labels"]).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert float((gradient - expected[name]).norm()) <= 1e-5 * float(expected[name].norm()) + 1e-7, name


def test_every_layer_is_told_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def watch(*inputs: Any, **rest: Any) -> Any:
        seen.append(rest)
        return attention.on_attention(*inputs, **rest)

    model = model_of("llama", {})
    assert attention.use_varlen(model, ASKED) == ""
    AttentionInterface.register(attention.NAME, watch)
    try:
        model(**packed()[1], use_cache=False)
    finally:
        AttentionInterface.register(attention.NAME, attention.on_attention)
    assert [call["cu_seq_lens_q"].tolist() for call in seen] == [[0, 9, 10, 24, 30]] * 2
    assert {call["max_length_q"] for call in seen} == {14}


@pytest.mark.parametrize("family", KEPT_OUT)
def test_a_model_that_would_compute_otherwise_keeps_its_own_attention(family: str) -> None:
    options, said = KEPT_OUT[family]
    model = model_of(family, options)
    own = model.config._attn_implementation
    reason = attention.use_varlen(model, ASKED)
    assert said in reason
    assert attention.is_used(model) == (not reason) and (model.config._attn_implementation == own) == bool(reason)


def test_a_layer_that_is_not_told_fails_instead_of_mixing_documents() -> None:
    part = torch.randn(1, 2, 5, 8)
    empty = torch.empty(1, 1, 0, 0, dtype=torch.bool)
    with pytest.raises(ValueError, match="not told the bounds"):
        attention.on_attention(torch.nn.Module(), part, part, part, empty)


def test_evaluations_and_answers_are_sdpas_bit_for_bit() -> None:
    model = model_of("mistral", {"sliding_window": 4})
    ids, mask = torch.randint(3, 96, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            answer = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
            return [model(input_ids=ids, attention_mask=mask).logits, model(input_ids=ids).logits, answer]

    own = outputs()
    assert attention.use_varlen(model, ASKED) == ""
    assert all(torch.equal(one, two) for one, two in zip(own, outputs(), strict=True))


@pytest.mark.parametrize("asked", ["auto", "sdpa", "eager"])
def test_without_a_gpu_it_is_taken_only_where_it_is_asked_for(asked: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU auto takes it")
    model = model_of("llama", {})
    assert attention.use_varlen(model, Base(name="x", attention=asked)) == "" and not attention.is_used(model)


def test_a_training_has_the_losses_of_one_with_a_mask(tiny_base: Path, tmp_path: Path) -> None:
    """Packed rows, with a last micro-batch of its own size; `FoldedCollator` is the other side."""
    train, found = Train(batch_size=4, micro_batch_size=2, max_steps=3, learning_rate=5e-3, warmup=0), []
    for asked in ("sdpa", "varlen"):
        model = kit.adapter(tiny_base, spread=0.05)
        attention.use_varlen(model, Base(name="x", attention=asked))
        trainer = kit.trainer(tmp_path / asked, tiny_base, kit.rows(10, pack=3), train=train, model=model)
        batch = next(iter(trainer.get_train_dataloader()))
        assert ("cu_seq_lens_q" in batch) == (asked == "varlen")
        trainer.train()
        found.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(found[0]) == 3 and found[0] == pytest.approx(found[1], abs=2e-6)


def test_batches_of_one_size_train_the_same_tokens() -> None:
    model = model_of("qwen3", {})
    assert attention.use_varlen(model, ASKED) == ""
    rows = [{"input_ids": ids, "labels": ids, "seq_lengths": lengths} for ids, lengths in
            (([5, 6, 7, 8, 9], [3, 2]), ([11, 12], [2]))]  # fmt: skip
    losses = {}
    for row_tokens, tokens in ((None, 7), (3, 7), (5, 10), (6, 12)):
        batch = FlatCollator(COLLATE, 0, row_tokens)(rows)
        assert batch["input_ids"].shape == (1, tokens) == batch["labels"].shape == batch["position_ids"].shape
        assert int((batch["labels"] != IGNORED).sum()) == 4 and int(batch["cu_seq_lens_q"][-1]) == tokens
        losses[row_tokens] = model(**batch, use_cache=False).loss.item()
    assert all(loss == pytest.approx(losses[None], abs=1e-6) for loss in losses.values())
    fewer = FlatCollator(COLLATE, 0, 6)([{"input_ids": [3, 4], "labels": [3, 4], "seq_lengths": [1, 1]}, rows[1]])
    whole = FlatCollator(COLLATE, 0, 6)(rows)
    assert all(fewer[name].shape == whole[name].shape for name in ("input_ids", "cu_seq_lens_q"))


LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


@settings(max_examples=25)
@given(lengths=LENGTHS, keys=st.integers(1, 3), groups=st.integers(1, 3), window=st.none() | st.integers(1, 8),
       seed=st.integers(0, 99))  # fmt: skip
def test_documents_of_any_length_heads_and_windows(
    lengths: list[int], keys: int, groups: int, window: int | None, seed: int
) -> None:
    """Against scores written out; the stand-in of the kernel gets what the kernel's description asks for."""
    torch.manual_seed(seed)
    total, heads = sum(lengths), keys * groups
    query, key, value = (torch.randn(1, count, total, 8, dtype=torch.float64) for count in (heads, keys, keys))
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    steps = torch.arange(total)
    away = steps[:, None] - steps[None]
    seen = (owner[:, None] == owner[None]) & (away >= 0) & (away < (window or total))
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * 0.3
    exact = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value.repeat_interleave(groups, 1)
    found = attention.by_document(query, key, value, bounds_D=bounds, scale=0.3, window=window)
    torch.testing.assert_close(found, exact.transpose(1, 2))


def like_2_13(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *, return_aux: Any = None,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """What PyTorch 2.13 describes, through SDPA; heads must be equal unless it is told."""
    assert query.dim() == 3 and cu_seq_q.dtype == torch.int32 and max_q >= int(cu_seq_q.diff().max())
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    assert window_size[1] == 0
    window = None if window_size[0] < 0 else window_size[0] + 1
    parts = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
    return attention.by_document(*parts, bounds_D=cu_seq_q, scale=scale, window=window)[0]


def like_2_11(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *, return_aux: Any = None,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:  # fmt: skip
    """The same without a word for grouped queries."""
    return like_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def grouped_2_11(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:  # fmt: skip
    """One that takes fewer heads of keys without saying so."""
    options = {"scale": scale, "window_size": window_size, "enable_gqa": query.shape[1] != key.shape[1]}
    return like_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)


@pytest.mark.parametrize(("kernel", "groups"), [(like_2_11, "repeated"), (grouped_2_11, "taken"), (like_2_13, "told")])
@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_is_asked_as_each_release_describes_it(
    kernel: Any, groups: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_kernel", lambda: kernel)
    monkeypatch.setattr(attention, "_is_new_enough", lambda device: True)
    monkeypatch.setattr(attention, "_is_for_kernel", lambda query, value, dtype: True)
    monkeypatch.setattr(attention._Ready, "kernel", None)
    monkeypatch.setattr(attention._Ready, "groups", "told")
    assert attention._make_ready(torch.device("cpu"))
    assert attention._Ready.groups == groups
    query, key = torch.randn(1, 6, 11, 8), torch.randn(1, 2, 11, 8)
    bounds = torch.tensor([0, 4, 11], dtype=torch.int32)
    empty = torch.empty(1, 1, 0, 0, dtype=torch.bool)
    given = {"cu_seq_lens_q": bounds, "max_length_q": 7, "scaling": 0.2, "sliding_window": window, "dropout": 0.0}
    found, _ = attention.on_attention(torch.nn.Module(), query, key, key, empty, **given)
    torch.testing.assert_close(
        found, attention.by_document(query, key, key, bounds_D=bounds, scale=0.2, window=window), atol=1e-6, rtol=0
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 5])
def test_the_kernel_gives_what_each_document_gives(dtype: torch.dtype, window: int | None) -> None:
    torch.manual_seed(1)
    parts = [torch.randn(1, heads, 60, 64, device="cuda", dtype=dtype, requires_grad=True) for heads in (8, 2, 2)]
    bounds = torch.tensor([0, 1, 20, 60, 60], dtype=torch.int32, device="cuda")
    flat = [part[0].transpose(0, 1) for part in parts]
    assert attention._make_ready(torch.device("cuda"))
    kernel = attention.by_kernel(*flat, bounds_D=bounds, longest=64, window=window)[None]
    own = attention.by_document(*parts, bounds_D=bounds, window=window)
    for found, expected in zip(
        [kernel, *torch.autograd.grad(kernel.float().square().sum(), parts)],
        [own, *torch.autograd.grad(own.float().square().sum(), parts)],
        strict=True,
    ):
        assert float((found - expected).float().norm()) <= 2e-2 * float(expected.float().norm())

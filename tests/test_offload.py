"""Inputs of checkpointed layers and the embedding in the machine's memory: the same numbers, and a plan that counts."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import training_kit as kit
from test_memory import LLAMA_3, plan
from transformers import AutoConfig, AutoModelForCausalLM

from lora_tune.errors import RecipeError, ResourceError, UsageError
from lora_tune.model.base import checkpoint_layers, load_base
from lora_tune.model.choice import cheapest_changes
from lora_tune.model.footprint import job_of
from lora_tune.model.methods import SavedAdapter, check_start
from lora_tune.model.offload import HostEmbedding, Store, keep_embedding_on_host, offload_checkpoints
from lora_tune.model.source import find_base
from lora_tune.model.strategy import conflicts
from lora_tune.recipe import Base, Lora, Recipe, Train

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
LONG = Train(micro_batch_size=4, packing=False, gradient_checkpointing="all", optimizer="adamw", max_length=4096)


def steps(model: Any, *, dtype: torch.dtype) -> list[torch.Tensor]:
    """Losses and gradients of three batches of unequal size, the last one with an evaluation before it."""
    found = []
    for number, length in enumerate((9, 17, 5)):
        ids = torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(number))
        if number == 2:
            with torch.no_grad():
                model.eval()(input_ids=ids)
                model.train()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_loss_and_gradients_are_the_same_numbers(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL)).train()
    expected = steps(model, dtype=dtype)
    for layers, moved in (("all", 3), (3, 2), (2, 1), (1, 0)):
        checkpoint_layers(model, layers)  # type: ignore[arg-type]
        recomputed = steps(model, dtype=dtype)
        store = offload_checkpoints(model)
        found = steps(model, dtype=dtype)
        assert all(torch.equal(one, other) for one, other in zip(found, recomputed, strict=True))
        torch.testing.assert_close(found, expected)
        assert store.moved == 3 * moved, "each micro-batch sends away all inputs but the last"
        assert len(store.free) <= max(moved, 1), "memory is used again"


def test_two_inputs_are_on_the_device_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six layers: in the backward pass the one of the layer that is computed again, and the next on its way."""
    torch.manual_seed(2)
    sizes = SMALL | {"num_hidden_layers": 6}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).train()
    model.enable_input_require_grads()
    checkpoint_layers(model, "all")
    offload_checkpoints(model)
    seen: list[weakref.ref[torch.Tensor]] = []
    together: list[int] = []
    sent_for, get = Store._sent_for, Store.get

    def watched(store: Store, kept: Any) -> torch.Tensor:
        copy = sent_for(store, kept)
        seen.append(weakref.ref(copy))
        return copy

    def counted(store: Store, kept: Any) -> torch.Tensor:
        found = get(store, kept)
        together.append(len({id(found), *(id(one()) for one in seen if one() is not None)}))
        return found

    monkeypatch.setattr(Store, "_sent_for", watched)
    monkeypatch.setattr(Store, "get", counted)
    ids = torch.randint(3, 96, (2, 8))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert together == [2, 2, 2, 2, 2, 1]


def test_two_forward_passes_before_their_backward_passes_do_not_mix() -> None:
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL)).train()
    batches = [torch.randint(3, 96, (1, 8)) for _ in range(2)]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for ids in batches]
        for loss in losses:
            loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    checkpoint_layers(model, "all")
    expected = gradients()
    offload_checkpoints(model)
    assert all(torch.equal(*pair) for pair in zip(gradients(), expected, strict=True))


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_training_takes_the_same_steps(tiny_base: Path, tmp_path: Path, quantize: Any) -> None:
    """Both at once, over packed rows in micro-batches, with the fused layers: losses and weights bit by bit."""
    ended = []
    for where in ("device", "cpu"):
        base = Base(name=str(tiny_base), quantize=quantize, compute_dtype="float32", embeddings=where)  # type: ignore[arg-type]
        model = kit.adapter(tiny_base, base=base, spread=0.05)
        checkpoint_layers(model, "all")
        if where == "cpu":
            store = offload_checkpoints(model)
        train = Train(batch_size=4, micro_batch_size=2, max_steps=3)
        trained = kit.trainer(tmp_path / where, tiny_base, kit.rows(12, pack=2), train=train, model=model)
        trained.train()
        ended.append([kit.losses(trained), [p.tolist() for p in model.parameters() if p.requires_grad]])
    assert ended[0] == ended[1] and store.moved == 6


def test_the_table_of_an_embedding_stays_where_it_is(tiny_base: Path) -> None:
    base = Base(name=str(tiny_base), quantize="none", compute_dtype="float32", embeddings="cpu")
    model = load_base(find_base(base), base)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, HostEmbedding) and not list(embedding.parameters())
    model.to("meta")
    assert embedding.weight.device.type == "cpu" and model.device.type == "meta"
    tied = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL, tie_word_embeddings=True))
    with pytest.raises(UsageError, match="same table"):
        keep_embedding_on_host(tied)


def test_a_plan_counts_what_goes_away() -> None:
    kept, away = (plan(LLAMA_3, train=LONG.model_copy(update={"offload": to})) for to in ("none", "checkpoints"))
    assert kept.peak_gib - away.peak_gib == pytest.approx(29 * 16_384 * 4096 * 2 / 2**30, rel=0.01)
    assert "of inputs in the machine's memory" in away.reason and (kept.offload, away.offload) == (
        "none",
        "checkpoints",
    )
    on_cpu = plan(LLAMA_3, base=Base(name="x", embeddings="cpu"), train=LONG)
    assert kept.parts_gib["weights"] - on_cpu.parts_gib["weights"] == pytest.approx(128_256 * 4096 * 2 / 2**30)
    with pytest.raises(UsageError, match="the head of this base is its embedding"):
        plan(LLAMA_3 | {"tie_word_embeddings": True}, base=Base(name="x", embeddings="cpu"))


def test_auto_sends_inputs_away_only_where_nothing_else_fits() -> None:
    long = LONG.model_copy(update={"gradient_checkpointing": "auto", "optimizer": "auto"})
    found = {gib: plan(LLAMA_3, train=long, gib=gib) for gib in (13.0, 24.0, 80.0)}
    assert [one.offload for one in found.values()] == ["checkpoints", "none", "none"]
    with pytest.raises(ResourceError):
        plan(LLAMA_3, train=long.model_copy(update={"offload": "none"}), gib=13.0)
    assert plan(LLAMA_3, train=long, gib=1000.0, device="cpu").offload == "none"
    assert found[13.0].resolved["offload"] == "checkpoints"


def test_what_would_make_it_fit_names_both() -> None:
    train = LONG.model_copy(update={"offload": "none"})
    job = job_of(LLAMA_3, base=Base(name="x"), lora=Lora(), train=train, device="cuda")
    words = " ".join(str(change) for gib in (12.0, 14.0) for change in cheapest_changes(job, gib, card=None))
    assert "train.offload: auto" in words and "base.embeddings: cpu" in words


@pytest.mark.parametrize(("section", "values", "key"), [
    ("train", {"offload": "checkpoints", "gradient_checkpointing": "none"}, "train.offload"),
    ("train", {"offload": "checkpoints", "compile": "layers"}, "train.offload"),
    ("lora", {"new_tokens": ("<x>",)}, "base.embeddings"),
    ("lora", {"modules_to_save": ("embed_tokens",)}, "base.embeddings"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(section: str, values: dict[str, Any], key: str) -> None:
    sections: dict[str, Any] = {"base": {"name": "x", "embeddings": "cpu"}, "data": [{"source": "y"}], "output": "z"}
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        Recipe.model_validate(sections | {section: values})


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_a_divided_base_keeps_both_where_they_are(strategy: Any) -> None:
    base, train = Base(name="x", embeddings="cpu"), Train(offload="checkpoints")
    keys = {problem.key for problem in conflicts(strategy, base=base, lora=Lora(), train=train)}
    assert {"base.embeddings", "train.offload"} <= keys


@pytest.mark.parametrize("trains", [{"trainable_token_indices": [3]}, {"modules_to_save": ["model.embed_tokens"]}])
def test_an_adapter_that_trains_the_embedding_is_no_start_where_it_is_kept_frozen(trains: dict[str, Any]) -> None:
    start = SavedAdapter({"peft_type": "LORA", **trains}, {})
    with pytest.raises(RecipeError, match="embeddings"):
        check_start(start, Base(name="x", embeddings="cpu"))
    check_start(start, Base(name="x"))
    check_start(SavedAdapter({"peft_type": "LORA"}, {}), Base(name="x", embeddings="cpu"))

"""What the plan says of work by pieces, beside what PyTorch allocates for it on the CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import shadow_step
from benchmarks.recompute import Side, peak_bytes
from lora_tune.model import pieces
from lora_tune.model.footprint import Choice, Job, _training, job_of
from lora_tune.model.kernels import plain
from lora_tune.model.pieces import piece_tokens
from lora_tune.recipe import Base, Lora, Train

SHAPE = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 4096}  # fmt: skip
LENGTHS = (1024, 2048)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Proportions of an 8B Llama."""
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16().save_pretrained(folder)  # type: ignore[arg-type]
    return folder


@pytest.fixture(autouse=True)
def as_short_as_those_of_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2 * 448 * 128)
    monkeypatch.setattr(plain, "_WHOLE", 0)


def job(tokens: int, **train: Any) -> Job:
    config = LlamaConfig(**SHAPE).to_dict()  # type: ignore[arg-type]
    given = Train(max_length=tokens, micro_batch_size=1, packing=False, gradient_checkpointing="all", **train)
    base = Base(name="x", quantize="none", compute_dtype="bfloat16", attention="varlen")
    return job_of(config, base=base, lora=Lora(), train=given, device="cpu")


def planned_step(tokens: int, **train: Any) -> float:
    """Bytes beyond what lies there between steps."""
    parts = _training(job(tokens, **train), Choice(1, 3, "adamw"))
    return sum(parts[name] for name in ("gradients", "activations", "loss_head", "buffers"))


def test_a_step_with_all_layers_recomputed_takes_what_is_planned(base: Path) -> None:
    side = Side("pieces", base, "none")
    side.step(64)
    taken = [peak_bytes(partial(side.step, tokens)) for tokens in LENGTHS]
    assert [planned_step(tokens) for tokens in LENGTHS] == pytest.approx(taken, rel=0.12)


def test_with_gate_and_up_kept_more_is_planned_and_taken(base: Path) -> None:
    found = []
    for name, kernels in (("peft", "off"), ("pieces", "auto")):
        side = Side(name, base, "none")
        side.step(64)
        found.append((planned_step(1024, kernels=kernels), peak_bytes(partial(side.step, 1024))))
    (planned_whole, taken_whole), (planned, taken) = found
    assert taken_whole > 1.3 * taken and planned_whole > 1.3 * planned


def test_a_further_token_of_an_evaluation_takes_what_is_planned(base: Path) -> None:
    """Beside it stands what SDPA works in on a CPU, whatever the length."""
    side, shape = Side("pieces", base, "none"), job(64).shape
    long = LENGTHS[-1]
    taken = peak_bytes(partial(side.evaluate, 2 * long)) - peak_bytes(partial(side.evaluate, long))
    planned = [
        pieces.evaluation_bytes(shape, tokens, element=2, lora=Lora(), kernels="auto") for tokens in (long, 2 * long)
    ]
    assert planned[1] - planned[0] == pytest.approx(taken, rel=0.05)


@pytest.mark.parametrize("recomputed", ["all", "none"])
def test_a_step_at_the_shape_of_an_8b_model_holds_what_is_planned(
    recomputed: shadow_step.Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real functions on tensors without values: every storage counted."""
    monkeypatch.undo()
    with shadow_step.shadows():
        model = shadow_step.model_of(3, recomputed)
        counted = [shadow_step.most_bytes(model, tokens) for tokens in (8192, 32768)]
    planned = [shadow_step.planned_bytes(tokens, 3, recomputed) for tokens in (8192, 32768)]
    assert planned == pytest.approx(counted, rel=0.1)


@given(tokens=st.integers(0, 100_000), width=st.integers(1, 100_000), element=st.sampled_from([2, 4, 8]))
def test_pieces_are_equal_and_none_is_too_large(tokens: int, width: int, element: int) -> None:
    size = piece_tokens(tokens, width, element=element)
    most = max(1, pieces.PIECE_BYTES // (width * element))
    assert 1 <= size <= max(most, 1)
    count = max(1, -(-tokens // size))
    assert count == max(1, -(-tokens // most)) or size * count - tokens < count

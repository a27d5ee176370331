"""The same data give the same loss and gradient however they are batched, accumulated, packed and folded."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import training_kit as kit
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tune.recipe import Train
from lora_tune.training.batches import FoldedCollator, fold

DOCUMENTS = kit.documents(8, seed=11, longest=30)
# the same eight documents as one optimizer step: how they are grouped into rows
PACKINGS: dict[str, Sequence[Sequence[int]]] = {
    "one a row": [[n] for n in range(8)],
    "two a row": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "uneven": [[0, 1, 2, 3], [4], [5, 6], [7]],
}


@pytest.fixture(scope="module")
def reference(tiny_base: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of all documents, each alone through the plain model: the definition."""
    model = kit.adapter(tiny_base, spread=0.05)
    trained = sum(label != -100 for document in DOCUMENTS for label in document["labels"][1:])
    total = torch.zeros(())
    for document in DOCUMENTS:
        logits_TV = model(torch.tensor([document["input_ids"]])).logits[0]
        total = total + F.cross_entropy(logits_TV[:-1], torch.tensor(document["labels"][1:]), reduction="sum")
    loss = total / trained
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_step(
    base: Path, folder: Path, data: Dataset, *, micro: int, fold_rows: bool = True
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of the first optimizer step of a real training over `data`."""
    model = kit.adapter(base, spread=0.05)
    train = Train(batch_size=len(data), micro_batch_size=micro, max_steps=1, warmup=0, max_grad_norm=1e9)
    trainer = kit.trainer(folder, base, data, train=train, model=model)
    if not fold_rows:
        trainer.data_collator = trainer.data_collator.flat
    gradients: dict[str, torch.Tensor] = {}

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    handle = trainer.create_optimizer().register_step_pre_hook(keep)
    trainer.train()
    handle.remove()
    return trainer.state.log_history[0]["loss"], gradients


@pytest.mark.parametrize("fold_rows", [True, False], ids=["folded", "flat"])
@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("packing", PACKINGS)
def test_loss_and_gradient_are_those_of_the_documents(
    tiny_base: Path,
    tmp_path: Path,
    reference: tuple[float, dict[str, torch.Tensor]],
    packing: str,
    micro: int,
    fold_rows: bool,
) -> None:
    data = kit.packed([DOCUMENTS[n] for n in group] for group in PACKINGS[packing])
    loss, gradients = one_step(tiny_base, tmp_path, data, micro=micro, fold_rows=fold_rows)
    expected, expected_gradients = reference
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    worst = max((gradients[name] - expected_gradients[name]).abs().max() for name in gradients)
    assert worst <= 1e-5 * largest


def test_micro_batches_count_by_tokens_and_not_by_number(tiny_base: Path, tmp_path: Path) -> None:
    """One document trains 1 token, the other 29: the loss is the mean over 30 tokens, not over 2 micro-batches."""
    few = {"input_ids": list(range(10, 40)), "labels": [-100] * 29 + [39], "seq_lengths": [30], "rows": [[0, 1]]}
    many = few | {"labels": list(range(10, 40)), "rows": [[0, 2]]}
    alone = [
        one_step(tiny_base, tmp_path / str(n), Dataset.from_list([row]), micro=1)[0]
        for n, row in enumerate((few, many))
    ]
    both, _ = one_step(tiny_base, tmp_path / "both", Dataset.from_list([few, many]), micro=1)
    assert both == pytest.approx((alone[0] + 29 * alone[1]) / 30, rel=1e-5)
    assert abs(both - (alone[0] + alone[1]) / 2) > 1e-3


def test_a_micro_batch_without_a_trained_token_adds_nothing(tiny_base: Path, tmp_path: Path) -> None:
    silent = {"input_ids": [9, 8, 7], "labels": [-100] * 3, "seq_lengths": [3], "rows": [[0, 2]]}
    alone, gradients = one_step(tiny_base, tmp_path / "a", kit.packed([[DOCUMENTS[0]]]), micro=1)
    both, with_silent = one_step(
        tiny_base, tmp_path / "b", kit.packed([[DOCUMENTS[0]], [silent]]), micro=1, fold_rows=True
    )
    assert both == pytest.approx(alone, rel=1e-6)
    assert all(torch.allclose(gradients[name], with_silent[name], rtol=1e-5, atol=1e-9) for name in gradients)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.sampled_from([16, 64, 4096]))
def test_folding_places_every_document_once_and_wastes_little(lengths: list[int], hidden_size: int) -> None:
    places, rows, capacity = fold(lengths, hidden_size=hidden_size)
    taken = sorted((row * capacity + offset, length) for (row, offset), length in zip(places, lengths, strict=True))
    assert all(start + length <= following for (start, length), (following, _) in pairwise(taken))
    assert all(offset + length <= capacity for (_, offset), length in zip(places, lengths, strict=True))
    assert {row for row, _ in places} == set(range(rows))
    assert rows * capacity <= 1.25 * sum(lengths)
    flat = sum(lengths) * (6 * hidden_size + sum(lengths))
    assert rows * capacity * (6 * hidden_size + capacity) <= flat


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=8))
def test_folded_batches_hold_the_same_documents(lengths: list[int]) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    made = [
        {"input_ids": list(range(4 + 40 * n, 4 + 40 * n + length)), "labels": [-100] + [n + 1] * (length - 1)}
        for n, length in enumerate(lengths)
    ]
    rows = [row | {"seq_lengths": [len(row["input_ids"])]} for row in made]
    batch = FoldedCollator(DataCollatorForLanguageModeling(0, padding_free=True), pad_id=0, hidden_size=4)(rows)
    found = set()
    for ids_C, labels_C, positions_C in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = [*(positions_C == 0).nonzero().flatten().tolist(), len(positions_C)]
        assert starts[0] == 0
        for start, end in pairwise(starts):
            assert positions_C[start:end].tolist() == list(range(end - start))
            kept = ids_C[start:end] != 0
            assert (labels_C[start:end][~kept] == -100).all()
            found.add((tuple(ids_C[start:end][kept].tolist()), tuple(labels_C[start:end][kept].tolist())))
    assert found == {(tuple(row["input_ids"]), tuple(row["labels"])) for row in made}

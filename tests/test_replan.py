"""Out of memory: the same step again in smaller micro-batches, nothing lost, and a resumed run goes on as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import training_kit as kit
from transformers import TrainerCallback

from lora_tune.errors import ResourceError
from lora_tune.model.kernels import choice
from lora_tune.recipe import Lora, Train
from lora_tune.training import checkpoint
from lora_tune.training.evaluations import Evaluation
from lora_tune.training.progress import TrainingDisplay, read_metrics
from lora_tune.training.replan import Replan, is_out_of_memory, next_smaller, shortage_of
from lora_tune.training.resume import RunFacts

CUDA = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.07 GiB is free."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."
)
SHORT = (torch.OutOfMemoryError(CUDA), MemoryError(), RuntimeError(CPU), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"))
SETTINGS: dict[str, Any] = {"batch_size": 8, "micro_batch_size": 4, "max_steps": 6, "learning_rate": 5e-3, "warmup": 2}
DROPOUT = Lora(rank=4, alpha=8.0, dropout=0.1)


class Short:
    """Memory that does not suffice for more than `rows` documents at once, from the first such call of `step` on."""

    def __init__(self, *, rows: int, step: int, where: str = "forward", error: BaseException = SHORT[0]) -> None:
        self.rows, self.step, self.where, self.error = rows, step, where, error
        self.refused: list[int] = []

    def into(self, trainer: Any) -> Any:
        """Watch what goes through the layers of this trainer."""
        layer = trainer.model.base_model.model.model.layers[0]
        run: Callable[..., Any] = trainer.micro_step

        def watch(model: Any, inputs: dict[str, Any], divisor: Any) -> Any:
            documents = int((inputs["position_ids"] == 0).sum())
            late = trainer.state.global_step + 1 >= self.step
            if not late or documents <= self.rows:
                return run(model, inputs, divisor)

            def refuse(*_: Any) -> None:
                self.refused.append(trainer.state.global_step + 1)
                raise type(self.error)(*self.error.args)

            if self.where == "forward":
                handle = layer.register_forward_hook(refuse)
            elif self.where == "head":
                handle = trainer.model.get_output_embeddings().register_forward_hook(refuse)
            else:  # half way through the backward pass: the last layer's gradients are there already
                handle = layer.register_forward_hook(lambda *call: call[2].register_hook(refuse) and None)
            try:
                return run(model, inputs, divisor)
            finally:
                handle.remove()

        trainer.micro_step = watch
        return trainer


def make(base: Path, folder: Path, *, lora: Lora | None = None, **changes: Any) -> Any:
    """A trainer over 21 documents, three steps an epoch, the last of them short."""
    model = kit.adapter(base, lora=lora, spread=0.05)
    trainer = kit.trainer(folder, base, kit.rows(21), train=Train(**SETTINGS | changes), model=model)
    return trainer.for_run(RunFacts(report=lambda line: None))


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run that has memory enough."""
    trainer = make(tiny_base, tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


@pytest.mark.parametrize(("where", "rows"), [("forward", 1), ("head", 3), ("backward", 1), ("backward", 3)])
def test_the_step_is_repeated_with_the_same_batch_and_the_same_loss(
    tiny_base: Path, tmp_path: Path, whole: Any, where: str, rows: int
) -> None:
    short = Short(rows=rows, step=2, where=where)
    trainer = short.into(make(tiny_base, tmp_path))
    seen: list[list[int]] = []
    begin = trainer.begin_step

    def watch(numbers: list[int]) -> None:
        seen.append(list(numbers))
        begin(numbers)

    trainer.begin_step = watch
    trainer.train()
    size = {3: 2, 1: 1}[rows]
    assert trainer.micro_batch_size == size and set(short.refused) == {2}
    assert losses(trainer) == pytest.approx(losses(whole), abs=1e-5)
    assert seen == [whole._sampler.order(step // 3)[step % 3 * 8 : step % 3 * 8 + 8] for step in range(6)]
    assert kit.losses(trainer)[0] == kit.losses(whole)[0]
    for name, weight in kit.weights(whole.model).items():
        assert torch.allclose(kit.weights(trainer.model)[name], weight, atol=1e-4)


@pytest.mark.parametrize("error", SHORT, ids=lambda error: type(error).__name__)
def test_every_kind_of_shortage_is_known_and_others_are_not(tiny_base: Path, tmp_path: Path, error: Exception) -> None:
    assert is_out_of_memory(error) and not is_out_of_memory(RuntimeError("shapes do not agree"))
    trainer = Short(rows=3, step=1, error=error).into(make(tiny_base, tmp_path, max_steps=1))
    trainer.train()
    assert trainer.micro_batch_size == 2
    other = Short(rows=3, step=1, error=RuntimeError("shapes do not agree")).into(make(tiny_base, tmp_path / "other"))
    with pytest.raises(RuntimeError, match="do not agree"):
        other.train()


@pytest.mark.parametrize(
    ("where", "part"), [("forward", "activations"), ("head", "loss_head"), ("backward", "activations")]
)
def test_the_part_is_named_and_written_down(tiny_base: Path, tmp_path: Path, where: str, part: str) -> None:
    said: list[str] = []
    trainer = Short(rows=3, step=2, where=where).into(make(tiny_base, tmp_path, max_steps=3, save_every=1))
    trainer.for_run(RunFacts(report=said.append, display=TrainingDisplay(tmp_path, style="none")))
    trainer.train()
    (replan,) = trainer.replans
    words = {"activations": "activations of the layers", "loss_head": "logits of the loss head"}[part]
    reason = f"out of memory at micro-batch 4: {words}, 1.50 GiB more"
    assert replan == Replan(step=2, micro_batch_size=2, accumulation=4, reason=reason)
    assert said == [
        f"out of memory at micro-batch 4 ({words}, 1.50 GiB more): step 2 is repeated with micro-batch 2 \
and accumulation 4, the same batch"
    ]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["replan"]["micro_batch_size"] for row in rows if "replan" in row] == [2]
    assert [row["micro_batch_size"] for row in rows if "loss" in row] == [4, 2, 2]
    found = checkpoint.read(tmp_path / "checkpoints" / "step-00000002")
    assert found.run["resolved"]["replans"] == [asdict(replan)]


def test_the_optimizer_is_named_and_never_repeated(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its states do not depend on the micro-batch, and some weights may have moved: nothing is saved."""

    class Full(TrainerCallback):
        """No memory for the states that the first step makes."""

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            def refuse(*_: Any, **__: Any) -> None:
                raise torch.OutOfMemoryError(CUDA)

            monkeypatch.setattr(torch, "zeros_like", refuse)

    trainer = make(tiny_base, tmp_path)
    trainer.add_callback(Full())
    with pytest.raises(ResourceError) as caught:
        trainer.train()
    assert caught.value.exit_code == 4 and "states of the optimizer" in str(caught.value)
    assert "adamw_8bit" in str(caught.value) and checkpoint.steps(tmp_path) == []


def test_at_micro_batch_1_it_ends_with_a_checkpoint_and_goes_on_from_there(
    tiny_base: Path, tmp_path: Path, whole: Any
) -> None:
    trainer = Short(rows=0, step=3).into(make(tiny_base, tmp_path, lora=None))
    with pytest.raises(ResourceError) as caught:
        trainer.train()
    assert caught.value.exit_code == 4
    message = str(caught.value)
    assert "step 3: out of memory at micro-batch 1 (activations of the layers" in message
    assert "gradient_checkpointing" in message and "the checkpoint of step 2 stays" in message
    again = make(tiny_base, tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.micro_batch_size == 1 and again.state.global_step == 6
    assert losses(again) == pytest.approx(losses(whole)[2:], abs=1e-5)


def test_an_evaluation_that_does_not_fit_says_so_and_keeps_the_step(tiny_base: Path, tmp_path: Path) -> None:
    def measure(model: Any) -> dict[str, float]:
        raise torch.OutOfMemoryError(CUDA)

    model, train = kit.adapter(tiny_base), Train(**SETTINGS)
    plan = Evaluation(every=2, measure=measure)
    trainer = kit.trainer(tmp_path, tiny_base, kit.rows(21), train=train, model=model, evaluation=plan)
    with pytest.raises(ResourceError, match=r"step 2: out of memory \(evaluation, 1.50 GiB more\)"):
        trainer.train()
    assert checkpoint.steps(tmp_path) == [2]


@pytest.mark.parametrize("lora", [DROPOUT], ids=["dropout"])
def test_a_run_killed_after_a_replan_is_the_same_run(tiny_base: Path, tmp_path: Path, lora: Lora | None) -> None:
    """Resumed from before, at and after the re-planned step; the stored micro-batch is taken, to the last bit."""
    kept = {"save_every": 1, "keep_checkpoints": 9}
    replanned = Short(rows=3, step=3).into(make(tiny_base, tmp_path / "run", lora=lora, **kept))
    replanned.train()
    for step in (3, 4):
        name = Path("checkpoints") / f"step-{step:08d}"
        shutil.copytree(tmp_path / "run" / name, tmp_path / f"from {step}" / name)
        again = make(tiny_base, tmp_path / f"from {step}", lora=lora, **kept)
        again.train(resume_from_checkpoint=True)
        assert again.micro_batch_size == 2 and again.replans == replanned.replans
        assert kit.losses(again) == kit.losses(replanned)[step:]
        assert kit.same(kit.weights(again.model), kit.weights(replanned.model))
        assert again.state.epoch == replanned.state.epoch
    earlier = Path("checkpoints") / "step-00000002"
    shutil.copytree(tmp_path / "run" / earlier, tmp_path / "before" / earlier)
    again = Short(rows=3, step=3).into(make(tiny_base, tmp_path / "before", lora=lora, **kept))
    again.train(resume_from_checkpoint=True)
    assert kit.losses(again) == kit.losses(replanned)[2:]


def test_a_repeated_step_draws_the_same_numbers_every_time(tiny_base: Path, tmp_path: Path) -> None:
    """With dropout the masks have the shape of the micro-batch: not those of the larger one, but always the same."""
    runs = [Short(rows=3, step=2).into(make(tiny_base, tmp_path / name, lora=DROPOUT)) for name in ("a", "b")]
    small = make(tiny_base, tmp_path / "small", lora=DROPOUT, micro_batch_size=2)
    for trainer in (*runs, small):
        trainer.train()
    assert kit.losses(runs[0]) == kit.losses(runs[1])
    assert losses(runs[0]) == pytest.approx(losses(small), rel=0.2)


def test_a_smaller_micro_batch_divides_what_the_larger_one_divided() -> None:
    for size in range(2, 200):
        smaller = next_smaller(size)
        assert size % smaller == 0 and smaller <= size / 2
        assert size % 2 or smaller == size // 2


def test_where_the_message_says_nothing_the_amount_is_left_out() -> None:
    head = torch.nn.Linear(2, 2)
    try:
        raise MemoryError
    except MemoryError as error:
        assert str(shortage_of(error, head=head)) == "activations of the layers"


def test_a_repeated_step_begins_without_the_buffers_of_kernels(tiny_base: Path, tmp_path: Path) -> None:
    trainer = make(tiny_base, tmp_path)
    place = (torch.device("cpu"), torch.float32, 0)
    choice._BUFFERS[place] = torch.empty(1)
    trainer.forget_gradients()
    assert place not in choice._BUFFERS

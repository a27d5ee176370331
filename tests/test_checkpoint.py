"""Checkpoints: whole or not there, without pickle, and a resumed training is the same training to the last bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import training_kit as kit

from lora_tune.errors import CheckFailed, LoraTuneError, UsageError
from lora_tune.model.base import checkpoint_layers
from lora_tune.model.methods import parameter_groups
from lora_tune.recipe import Base, Lora, Train
from lora_tune.training import checkpoint
from lora_tune.training.evaluations import Evaluation
from lora_tune.training.identity import check_identity
from lora_tune.training.resume import RunFacts

FLOAT32: dict[str, Any] = {"quantize": "none", "compute_dtype": "float32"}
DROPOUT = Lora(rank=4, alpha=8.0, dropout=0.1)


def write(text: str) -> checkpoint.Writer:
    def write_text(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write_text


def save(folder: Path, step: int, *, keep: int = 2, text: str = "{}") -> Path:
    return checkpoint.save(folder, step, {"run.json": write(text), "a.json": write(f"[{step}]")}, keep=keep)


def test_the_newest_are_kept_by_step_whatever_the_clock_says(tmp_path: Path) -> None:
    import os

    for step in (5, 10, 15):
        folder = save(tmp_path, step)
        os.utime(folder, (10**9 - step * 10**6, 10**9 - step * 10**6))
    assert checkpoint.steps(tmp_path) == [15, 10]
    found = checkpoint.newest(tmp_path, report=pytest.fail)
    assert found is not None and found.step == 15


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("offset", [-3600, 0, 3600])
def test_rotation_follows_the_steps_under_a_wrong_clock(
    tmp_path: Path, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock goes back or forth by an hour between saves, or all folders have one time: the newest step stays."""
    import os
    import time

    now = time.time()
    for number, step in enumerate((2, 4, 6, 8), 1):
        folder = save(tmp_path, step)
        when = now + offset * number
        for path in (*folder.iterdir(), folder):
            os.utime(path, (when, when))
        assert checkpoint.steps(tmp_path) == [s for s in (8, 6, 4, 2) if step - 4 < s <= step]
    monkeypatch.setattr(time, "time", lambda: now - 10**6)
    found = checkpoint.newest(tmp_path, report=pytest.fail)
    assert found is not None and found.step == 8


def test_an_older_valid_checkpoint_stays_while_newer_ones_are_damaged(tmp_path: Path) -> None:
    """`keep` counts valid ones: as long as there are fewer, nothing that can be resumed is deleted."""
    save(tmp_path, 5)
    for step in (10, 15):
        (save(tmp_path, step) / "a.json").write_text("damaged")
    save(tmp_path, 20)
    assert checkpoint.steps(tmp_path) == [20, 15, 10, 5]
    save(tmp_path, 25)
    assert checkpoint.steps(tmp_path) == [25, 20]


def test_what_is_set_aside_is_never_written_over(tmp_path: Path) -> None:
    save(tmp_path, 5, keep=9)
    for text in ("first", "second"):
        (save(tmp_path, 10, keep=9) / "a.json").write_text(text)
        found = checkpoint.newest(tmp_path, report=lambda line: None)
        assert found is not None and found.step == 5
    kept = tmp_path / "checkpoints"
    assert (kept / "damaged-step-00000010" / "a.json").read_text() == "first"
    assert (kept / "damaged-step-00000010.2" / "a.json").read_text() == "second"


def test_a_damaged_checkpoint_of_the_same_step_is_replaced_and_a_valid_one_stays(tmp_path: Path) -> None:
    first = save(tmp_path, 5, text='{"n": 1}')
    assert save(tmp_path, 5, text='{"n": 2}') == first and checkpoint.read(first).run == {"n": 1}
    (first / "a.json").unlink()
    assert checkpoint.read(save(tmp_path, 5, text='{"n": 3}')).run == {"n": 3}
    assert "damaged-step-00000005" in names(tmp_path)


def test_a_checkpoint_of_another_run_is_passed_over(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    save(ours, 5)
    shutil.copytree(save(theirs, 10), ours / "checkpoints" / "step-00000010")
    assert checkpoint.read(ours / "checkpoints" / "step-00000010").run_id != (
        (ours / "checkpoints" / "run.id").read_text()
    )
    said: list[str] = []
    found = checkpoint.newest(ours, report=said.append)
    assert found is not None and found.step == 5
    assert len(said) == 1 and "step 10" in said[0] and "another run" in said[0]
    assert names(ours) == ["foreign-step-00000010", "run.id", "step-00000005"]


@pytest.mark.parametrize("damage", ["", "0" * 32, "\x00" * 32, None])
def test_a_damaged_run_id_costs_no_checkpoint(tmp_path: Path, damage: str | None) -> None:
    """The checkpoints know their run as well; what stands in the small file decides only between several."""
    before = checkpoint.read(save(tmp_path, 5)).run_id
    save(tmp_path, 10)
    path = tmp_path / "checkpoints" / "run.id"
    path.unlink() if damage is None else path.write_text(damage)
    found = checkpoint.newest(tmp_path, report=pytest.fail)
    assert found is not None and (found.step, found.run_id) == (10, before)
    save(tmp_path, 15)
    assert checkpoint.steps(tmp_path)[0] == 15


@pytest.mark.parametrize("file", ["run.json", "a.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "bit", "older"])
def test_a_damaged_checkpoint_is_set_aside_and_the_older_one_taken(tmp_path: Path, file: str, damage: str) -> None:
    older, newer = save(tmp_path, 5, text='{"n": 5}'), save(tmp_path, 10, text='{"n": 10}')
    path, content = newer / file, (newer / file).read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "older":
        shutil.copy(older / file, path)
    else:
        flipped = content[:3] + bytes([content[3] ^ 1]) + content[4:]
        path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "bit": flipped}[damage])
    said: list[str] = []
    found = checkpoint.newest(tmp_path, report=said.append)
    assert found is not None and found.step == 5 and found.run == {"n": 5}
    assert len(said) == 1 and "step 10" in said[0] and file in said[0]
    assert (tmp_path / "checkpoints" / "damaged-step-00000010").is_dir()


def test_when_all_are_damaged_it_says_so_and_stops(tmp_path: Path) -> None:
    (save(tmp_path, 5) / "a.json").unlink()
    for _ in range(2):  # asked again, it says so again: nothing was moved away
        with pytest.raises(CheckFailed, match="no checkpoint of this run is valid"):
            checkpoint.newest(tmp_path, report=pytest.fail)


def test_a_save_that_was_killed_or_failed_leaves_the_older_ones(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    save(tmp_path, 5)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 10, {"run.json": write("{}"), "big": full}, keep=1)
    (tmp_path / "checkpoints" / ".writing-step-00000010").mkdir()
    assert checkpoint.steps(tmp_path) == [5]
    save(tmp_path, 15)
    assert names(tmp_path) == ["run.id", "step-00000005", "step-00000015"]


def test_a_changed_run_is_refused_field_by_field() -> None:
    before = {"train": {"learning_rate": 2e-4, "epochs": 1.0}, "data": ["a", "b"]}
    check_identity(before, json.loads(json.dumps(before)))
    with pytest.raises(UsageError) as caught:
        check_identity(before, {"train": {"learning_rate": 2e-3, "epochs": 1.0}, "data": ["a"]})
    assert [problem.key for problem in caught.value.problems] == ["data", "train.learning_rate"]
    assert "0.0002" in str(caught.value) and "0.002" in str(caught.value)


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout, packed, accumulated, two epochs": {
        "lora": DROPOUT,
        "pack": 3,
        "train": {"epochs": 2.0, "micro_batch_size": 1, "max_steps": None},
    },
    "bfloat16": {"base": {"quantize": "none", "compute_dtype": "bfloat16"}, "lora": DROPOUT},
    "nf4": {"base": {"quantize": "nf4", "double_quant": False, "compute_dtype": "bfloat16"}, "lora": DROPOUT},
    "nf4 double, packed, dora, evaluated": {
        "base": {"quantize": "nf4", "compute_dtype": "bfloat16"},
        "lora": Lora(rank=4, alpha=8.0, method="dora"),
        "pack": 2,
        "evaluate": True,
    },
    "evaluated, dropout, neftune": {"lora": DROPOUT, "evaluate": True, "train": {"neftune_alpha": 5.0}},
    "rslora, float32 nf4": {
        "base": {"quantize": "nf4", "compute_dtype": "float32"},
        "lora": Lora(rank=4, method="rslora"),
    },
    "nf4, packed": {"base": {"quantize": "nf4", "double_quant": False}, "lora": DROPOUT, "pack": 3},
    "fp4 double": {"base": {"quantize": "fp4", "compute_dtype": "bfloat16"}, "lora": DROPOUT},
    "int8": {"base": {"quantize": "int8", "compute_dtype": "bfloat16"}, "lora": DROPOUT},
    "pissa, two epochs": {"lora": Lora(rank=4, alpha=8.0, method="pissa"), "train": {"epochs": 2.0, "max_steps": None}},
    "olora": {"lora": Lora(rank=4, alpha=8.0, method="olora"), "train": {"epochs": 2.0, "max_steps": None}},
    "modules to save, accumulated": {
        "lora": Lora(rank=4, alpha=8.0, modules_to_save=("lm_head",)),
        "train": {"micro_batch_size": 1},
    },
    "new tokens on nf4": {"base": {"quantize": "nf4"}, "lora": Lora(rank=4, alpha=8.0, new_tokens=("<x>",))},
    "lora+, recomputed layers": {"lora": Lora(rank=4, alpha=8.0, dropout=0.1, plus_ratio=16.0), "checkpointed": True},
    "evaluated nf4, adamw_8bit, accumulated, two epochs": {
        "base": {"quantize": "nf4", "compute_dtype": "bfloat16"},
        "lora": DROPOUT,
        "evaluate": True,
        "train": {"optimizer": "adamw_8bit", "micro_batch_size": 1, "epochs": 2.0, "max_steps": None},
    },
    "inverse_sqrt, weight decay, one row at a time": {
        "train": {"schedule": "inverse_sqrt", "weight_decay": 0.1, "batch_size": 1, "micro_batch_size": 1}
    },
    "adamw_8bit": {"train": {"optimizer": "adamw_8bit"}},
    "paged_adamw": {"train": {"optimizer": "paged_adamw"}},
    "paged_adamw_8bit on nf4": {"base": {"quantize": "nf4"}, "train": {"optimizer": "paged_adamw_8bit"}},
    "adafactor": {"train": {"optimizer": "adafactor"}},
    "lion_8bit": {"train": {"optimizer": "lion_8bit"}},
    "sgd": {"train": {"optimizer": "sgd", "learning_rate": 0.1}},
}


def make(name: str, base: Path, folder: Path) -> Any:
    """The trainer of a configuration, new from the base on."""
    given = CONFIGURATIONS[name]
    settings: dict[str, Any] = {
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 5e-3,
        "keep_checkpoints": 9,
    }
    settings |= {"save_every": 2, "schedule": "cosine", "warmup": 2} | given.get("train", {})
    frozen = Base(**{"name": str(base)} | FLOAT32 | given.get("base", {}))
    model = kit.adapter(base, base=frozen, lora=given.get("lora"))
    evaluation = None
    if given.get("evaluate"):
        ids = torch.arange(10, 30)[None]

        def measure(model: Any) -> dict[str, float]:
            torch.rand(3)
            return {"loss": float(model(input_ids=ids, labels=ids).loss)}

        evaluation = Evaluation(every=1, measure=measure, keep="best")
    data = kit.rows(14, pack=given.get("pack", 1))
    if given.get("checkpointed"):
        checkpoint_layers(model, "all")
    train, lora = Train(**settings), given.get("lora")
    trainer = kit.trainer(folder, base, data, train=train, model=model, evaluation=evaluation)
    if lora and lora.plus_ratio:
        trainer.for_run(RunFacts(groups=lambda: parameter_groups(model, lora=lora, train=train)))
    return trainer


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_resumed_training_is_the_same_training(tiny_base: Path, tmp_path: Path, name: str) -> None:
    whole = make(name, tiny_base, tmp_path / "whole")
    whole.train()
    resumed_at = 4
    kept = Path("checkpoints") / f"step-{resumed_at:08d}"
    shutil.copytree(tmp_path / "whole" / kept, tmp_path / "again" / kept)

    again = make(name, tiny_base, tmp_path / "again")
    torch.rand(7)  # whatever happened before must not matter
    again.train(resume_from_checkpoint=True)
    assert len(kit.losses(whole)) > resumed_at
    assert kit.losses(again) == kit.losses(whole)[resumed_at:]
    assert kit.same(kit.weights(again.model), kit.weights(whole.model))
    if whole.evaluations:
        assert again.evaluations.standing == whole.evaluations.standing


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "nf4", "nf4 double, packed, dora, evaluated", "paged_adamw_8bit on nf4"])
def test_a_resumed_training_on_a_gpu_is_the_same_to_rounding(tiny_base: Path, tmp_path: Path, name: str) -> None:
    whole = make(name, tiny_base, tmp_path / "whole")
    whole.train()
    kept = Path("checkpoints") / "step-00000004"
    shutil.copytree(tmp_path / "whole" / kept, tmp_path / "again" / kept)
    again = make(name, tiny_base, tmp_path / "again")
    again.train(resume_from_checkpoint=True)
    found = [float.fromhex(loss) for loss in kit.losses(again)]
    assert found == pytest.approx([float.fromhex(loss) for loss in kit.losses(whole)[4:]], rel=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "polynomial", "inverse_sqrt"])
@pytest.mark.parametrize("more", [9, 5], ids=["more", "fewer"])
def test_other_steps_where_they_are_allowed_follow_the_schedule_of_the_new_number(
    tiny_base: Path, tmp_path: Path, schedule: str, more: int
) -> None:
    """The steps before keep the learning rate that they had; from the resumed one on it is that of the new number."""

    def started(folder: str, steps: int, allowed: tuple[str, ...] = ()) -> Any:
        train = Train(batch_size=4, micro_batch_size=2, max_steps=steps, learning_rate=5e-3, warmup=1, save_every=4)
        train = train.model_copy(update={"schedule": schedule, "keep_checkpoints": 9})
        model = kit.adapter(tiny_base, lora=DROPOUT)
        trainer = kit.trainer(tmp_path / folder, tiny_base, kit.rows(40), train=train, model=model)
        return trainer.for_run(RunFacts(allowed=allowed))

    def rates(trainer: Any) -> list[float]:
        return [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]

    whole = started("whole", more)
    whole.train()
    started("run", 7).train()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000007")
    with pytest.raises(UsageError, match=r"steps\.total_steps"):
        started("run", more).train(resume_from_checkpoint=True)
    again = started("run", more, ("train.max_steps",))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == more and rates(again) == pytest.approx(rates(whole)[4:], rel=1e-12, abs=1e-30)
    if schedule in ("constant", "inverse_sqrt"):  # which do not look at the number of steps
        assert kit.losses(again) == kit.losses(whole)[4:]
        assert kit.same(kit.weights(again.model), kit.weights(whole.model))
    with pytest.raises(UsageError, match=f"3 steps are asked for, but the checkpoint has {more} behind it"):
        started("run", 3, ("train.max_steps",)).train(resume_from_checkpoint=True)


def test_an_epoch_boundary_and_a_finished_run_resume_too(tiny_base: Path, tmp_path: Path) -> None:
    def started(folder: str) -> Any:
        train = Train(batch_size=4, micro_batch_size=2, epochs=2.0, learning_rate=5e-3, keep_checkpoints=9)
        model = kit.adapter(tiny_base, lora=DROPOUT)
        return kit.trainer(tmp_path / folder, tiny_base, kit.rows(9), train=train, model=model)

    whole = started("whole")
    whole.train()
    assert checkpoint.steps(tmp_path / "whole") == [6, 3]
    for step in (3, 6):
        kept = Path("checkpoints") / f"step-{step:08d}"
        shutil.copytree(tmp_path / "whole" / kept, tmp_path / f"from {step}" / kept)
        again = started(f"from {step}")
        again.train(resume_from_checkpoint=True)
        assert kit.losses(again) == kit.losses(whole)[step:]
        assert kit.same(kit.weights(again.model), kit.weights(whole.model))


def test_what_a_checkpoint_holds(tiny_base: Path, tmp_path: Path) -> None:
    trainer = kit.trainer(tmp_path, tiny_base, kit.rows(4), train=Train(batch_size=4, micro_batch_size=4))
    trainer.for_run(RunFacts(identity={"seed": 1}, resolved={"micro_batch_size": 4}))
    trainer.train()
    found = checkpoint.newest(tmp_path, report=pytest.fail)
    assert found is not None
    resolved = {"micro_batch_size": 4, "accumulation": 1, "steps": 1, "replans": []}
    assert found.run["identity"] == {"seed": 1} and found.run["resolved"] == resolved
    assert {path.suffix for path in found.folder.iterdir()} == {".safetensors", ".json"}
    for path in found.folder.glob("*.json"):
        json.loads(path.read_text())
        assert str(tmp_path) not in path.read_text()


def test_another_run_or_another_adapter_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    train = Train(batch_size=4, micro_batch_size=4, max_steps=3, save_every=1)

    def started(identity: dict[str, Any], *, lora: Lora | None = None, steps: Train = train) -> Any:
        model = kit.adapter(tiny_base, lora=lora)
        trainer = kit.trainer(tmp_path, tiny_base, kit.rows(4), train=steps, model=model)
        return trainer.for_run(RunFacts(identity=identity))

    started({"seed": 1}).train()
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000003")
    with pytest.raises(UsageError, match="seed: was 1 when the run started, got 2"):
        started({"seed": 2}).train(resume_from_checkpoint=True)
    with pytest.raises(UsageError, match=r"steps\.total_steps: was 3"):
        started({"seed": 1}, steps=train.model_copy(update={"max_steps": 9})).train(resume_from_checkpoint=True)
    with pytest.raises(LoraTuneError):
        started({"seed": 1}, lora=Lora(rank=4, targets=("q_proj",))).train(resume_from_checkpoint=True)


def test_without_a_checkpoint_a_resumed_run_starts_at_the_beginning(tiny_base: Path, tmp_path: Path) -> None:
    said: list[str] = []
    trainer = kit.trainer(tmp_path, tiny_base, kit.rows(4), train=Train(batch_size=4, micro_batch_size=4))
    trainer.for_run(RunFacts(report=said.append)).train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1 and said == ["there is no checkpoint yet: training starts at step 0"]

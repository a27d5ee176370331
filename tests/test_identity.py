"""Only the same run is resumed: every change is refused by name, and the safe ones may be allowed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from lora_tune.cli import main
from lora_tune.errors import UsageError
from lora_tune.model.source import find_base
from lora_tune.recipe_file import read_recipe
from lora_tune.run import _prepare
from lora_tune.training.identity import SAFE, check_allowed, check_identity, run_identity

RECIPE = """\
base: {name: base, quantize: none, compute_dtype: float32}
data: [{source: rows.jsonl, format: messages}]
lora: {rank: 4, alpha: 8}
train: {max_steps: 6, batch_size: 4, micro_batch_size: 2, max_length: 128, save_every: 2, learning_rate: 1e-3}
eval: {hold_out: 4, metrics: [loss], samples: 0}
output: out
"""


def rows(count: int = 24) -> list[dict[str, Any]]:
    turns = [(f"What is {number} and {number + 2}?", f"It is {2 * number + 2}.") for number in range(count)]
    return [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]


def write_rows(made: list[dict[str, Any]]) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


@pytest.fixture
def place(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with recipe, data and base, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    Path("base").symlink_to(tiny_base)
    write_rows(rows())
    yield tmp_path


def identity(*overrides: str) -> dict[str, Any]:
    """The identity of the recipe here, as it comes back from a checkpoint."""
    recipe = read_recipe(Path("recipe.yaml"), overrides=overrides).recipe
    source = find_base(recipe.base)
    chat, prepared = _prepare(recipe, source)
    return json.loads(json.dumps(run_identity(recipe, source, prepared, chat)))


def edited() -> None:
    made = rows()
    made[7]["messages"][1]["content"] = "It is 17."
    write_rows(made)


def other_base(**changes: Any) -> Callable[[], None]:
    def write() -> None:
        Path("base").unlink()
        tiny.write_base(Path("base"), **changes)

    return write


# what changes between the run and its continuation: overrides or an act, the fields that are named
CHANGES: dict[str, tuple[tuple[str, ...] | Callable[[], None], set[str]]] = {
    "row edited": (edited, {"content.0.rows.jsonl"}),
    "half the rows": (lambda: write_rows(rows(12)), {"content.0.rows.jsonl"}),
    "rows reversed": (lambda: write_rows(rows()[::-1]), {"content.0.rows.jsonl"}),
    "another base": (other_base(seed=2), {"base.fingerprint"}),
    "a wider base": (other_base(config={"hidden_size": 96, "head_dim": 24}), {"base.fingerprint"}),
    "another template": (other_base(chat_template=tiny.CHATML + " "), {"template"}),
    "learning rate x 10": (("train.learning_rate=1e-2",), {"train.learning_rate"}),
    "seed": (("seed=43",), {"seed"}),
    "batch size": (("train.batch_size=8",), {"train.batch_size"}),
    "micro-batch": (("train.micro_batch_size=1",), {"train.micro_batch_size"}),
    "more steps": (("train.max_steps=12",), {"train.max_steps"}),
    "fewer steps": (("train.max_steps=5",), {"train.max_steps"}),
    "epochs": (("train.epochs=3",), {"train.epochs"}),
    "max_length": (("train.max_length=120",), {"train.max_length"}),
    "packing": (("train.packing=false",), {"train.packing"}),
    "dropout": (("lora.dropout=0.1",), {"lora.dropout"}),
    "layers not fused": (("train.kernels=off",), {"train.kernels"}),
    "alpha x 4": (("lora.alpha=32",), {"lora.alpha"}),
    "rslora": (("lora.method=rslora",), {"lora.method"}),
    "rank": (("lora.rank=8",), {"lora.rank"}),
    "targets": (("lora.targets=[q_proj]",), {"lora.targets"}),
    "modules_to_save": (("lora.modules_to_save=[lm_head]",), {"lora.modules_to_save"}),
    "4-bit": (("base.quantize=nf4",), {"base.quantize"}),
    "bfloat16": (("base.compute_dtype=bfloat16",), {"base.compute_dtype"}),
    "schedule": (("train.schedule=constant",), {"train.schedule"}),
    "warm-up": (("train.warmup=2",), {"train.warmup"}),
    "optimizer": (("train.optimizer=sgd",), {"train.optimizer"}),
    "loss_on": (("loss_on=all",), {"loss_on"}),
    "held-out rows": (("eval.hold_out=6",), {"eval.hold_out"}),
    "when to save": (("train.save_every=3",), {"train.save_every"}),
    "when to evaluate": (("eval.every=2",), {"eval.every"}),
    "a limit": (("limits.duplicates=0",), {"limits.duplicates"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named_and_allowed_only_where_it_is_safe(place: Path, name: str) -> None:
    before = identity()
    change, fields = CHANGES[name]
    if callable(change):
        change()
    now = identity(*(() if callable(change) else change))
    with pytest.raises(UsageError) as caught:
        check_identity(before, now)
    assert {problem.key for problem in caught.value.problems} == fields, str(caught.value)
    safe = {field for field in fields if field in SAFE or field.split(".")[0] in SAFE}
    assert all((f"--allow-change {field}" in str(caught.value)) == (field in safe) for field in fields)
    if safe:
        check_identity(before, now, allowed=fields)
        check_allowed(fields)
    else:
        with pytest.raises(UsageError):
            check_identity(before, now, allowed=fields)
        with pytest.raises(UsageError, match="cannot change in a run"):
            check_allowed(fields)


def test_what_only_moved_is_the_same_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity()
    moved = place.parent / "moved"
    place.rename(moved)
    monkeypatch.chdir(moved)
    check_identity(before, identity("output=elsewhere", "track=[tensorboard]"))


def test_an_edit_that_keeps_time_and_size_is_found(place: Path) -> None:
    """As `cp -p`, `rsync -t` and `tar x` leave a file: the same name, size and time, and other rows."""
    import os

    before, stamp = identity(), Path("rows.jsonl").stat()
    text = Path("rows.jsonl").read_text()
    Path("rows.jsonl").write_text(text.replace("It is 8.", "It is 9."))
    os.utime("rows.jsonl", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert Path("rows.jsonl").stat().st_size == stamp.st_size
    with pytest.raises(UsageError, match=r"rows\.jsonl"):
        check_identity(before, identity())


def test_other_versions_are_refused_or_allowed_by_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity()
    before["versions"]["torch"] = "1.0"
    with pytest.raises(UsageError, match=r"versions\.torch: was '1\.0' .*--allow-change versions\.torch"):
        check_identity(before, identity())
    for allowed in ("versions", "versions.torch"):
        check_identity(before, identity(), allowed=[allowed])
    with pytest.raises(UsageError):
        check_identity(before, identity(), allowed=["versions.peft"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--resume", "--allow-change", "train.learning_rate"], "the steps so far were taken with the old value"),
        (["--resume", "--allow-change", "train.max_step"], "did you mean train.max_steps"),
        (["--resume", "--allow-change", "base.name"], "the base that it was trained on"),
        (["--allow-change", "train.max_steps"], "goes with --resume"),
    ],
)
def test_an_unsafe_key_is_refused_with_its_reason(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(["run", "recipe.yaml", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not Path("out").exists()

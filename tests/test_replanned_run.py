"""A whole run in which memory falls short: through the command, killed, resumed, and told in manifest and card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import warm
from test_replan import CUDA

from lora_tune import run as run_module
from lora_tune.adapter.folder import read_manifest
from lora_tune.errors import Interrupted
from lora_tune.model import calibration
from lora_tune.model.cards import CARDS
from lora_tune.model.device import Machine
from lora_tune.recipe import Base, Lora, Train
from lora_tune.recipe_file import RecipeFile
from lora_tune.training import preflight
from lora_tune.training.planned import Planned
from lora_tune.training.progress import read_metrics
from lora_tune.training.replan import ReplanningTrainer

RECIPE = """\
base: {{name: {base}, quantize: none, compute_dtype: float32}}
data: [{{source: rows.jsonl, format: prompt_completion}}]
lora: {{rank: 4, alpha: 8, dropout: 0.1}}
train: {{max_steps: 6, batch_size: 4, micro_batch_size: 4, max_length: 96, save_every: 2, packing: false}}
eval: {{hold_out: 4, samples: 0}}
output: out
"""


@pytest.fixture(autouse=True)
def _warm_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is verified in a fork, not in a new process, which takes most of a run's time."""
    monkeypatch.setattr("subprocess.run", warm.instead)


@pytest.fixture
def recipe(recipe_from: Callable[..., RecipeFile], tiny_base: Path, tmp_path: Path) -> Callable[..., RecipeFile]:
    lines = [json.dumps({"prompt": f"Question {n}?", "completion": f"Answer {n}."}) + "\n" for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    return lambda *overrides: recipe_from(RECIPE.format(base=tiny_base), *overrides)


def short_of_memory(monkeypatch: pytest.MonkeyPatch, *, from_step: int, rows: int) -> list[int]:
    """From this step on no micro-batch of more rows fits; returns the steps in which one was refused."""
    refused: list[int] = []
    inner = ReplanningTrainer._run

    def run(self: Any, model: Any, batches: Any, divisor: Any) -> Any:
        if self.state.global_step + 1 >= from_step and self.micro_batch_size > rows:
            refused.append(self.state.global_step + 1)
            raise torch.OutOfMemoryError(CUDA)
        return inner(self, model, batches, divisor)

    monkeypatch.setattr(ReplanningTrainer, "_run", run)
    return refused


def test_a_run_short_of_memory_is_told_everywhere_and_resumes_to_the_last_bit(
    recipe: Callable[..., RecipeFile], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = short_of_memory(monkeypatch, from_step=3, rows=1)
    run_module.run(recipe("output=whole"))
    assert refused == [3, 3]
    told = capsys.readouterr().err
    assert "preflight, " in told and "step 3 is repeated with micro-batch 1 and accumulation 4" in told

    # killed in step 6, after the checkpoint of step 4
    inner, lost = ReplanningTrainer.begin_step, Interrupted(15, "killed")

    def killed(self: Any, rows: Any) -> None:
        if self.state.global_step == 5:
            raise lost
        inner(self, rows)

    monkeypatch.setattr(ReplanningTrainer, "begin_step", killed)
    with pytest.raises(Interrupted):
        run_module.run(recipe())
    monkeypatch.setattr(ReplanningTrainer, "begin_step", inner)
    refused.clear()
    run_module.run(recipe(), mode="resume")
    assert refused == [], "a resumed run tries the micro-batch again that did not fit"
    assert "preflight" not in capsys.readouterr().err.partition("killed")[2]

    losses = [
        [row["loss_hex"] for row in read_metrics(Path(folder) / "metrics.jsonl") if "loss" in row]
        for folder in ("whole", "out")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    weights = [(Path(folder) / "adapter_model.safetensors").read_bytes() for folder in ("whole", "out")]
    assert weights[0] == weights[1]
    for folder in ("whole", "out"):
        training = read_manifest(Path(folder)).training
        assert (training.micro_batch_size, training.accumulation, training.batch_size) == (1, 4, 4)
        assert [(replan.step, replan.micro_batch_size) for replan in training.replans] == [(3, 2), (3, 1)]
        assert "out of memory at micro-batch 4" in training.replans[0].reason
        assert "from step 3 on" in (Path(folder) / "README.md").read_text()


def test_without_a_preflight_the_run_is_the_same(
    recipe: Callable[..., RecipeFile], capsys: pytest.CaptureFixture[str]
) -> None:
    run_module.run(recipe("output=without", "train.max_steps=2"), preflight="off")
    assert "preflight" not in capsys.readouterr().err
    run_module.run(recipe("output=with", "train.max_steps=2"))
    assert "preflight" in capsys.readouterr().err
    first, second = ((Path(name) / "adapter_model.safetensors").read_bytes() for name in ("without", "with"))
    assert first == second


# --- what the next plan learns of it ----------

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
GPU = Machine("cuda", "NVIDIA GeForce RTX 4090", 22.0, 24.0, CARDS["rtx4090"])
CPU = Machine("cpu", "cpu", 22.0, 24.0, None)
TRAIN = Train(micro_batch_size=2, batch_size=16, gradient_checkpointing="all", optimizer="adamw")


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    monkeypatch.setenv("LORA_TUNE_CACHE", str(tmp_path / "cache"))
    return Planned(LLAMA, Base(name="x"), Lora(), TRAIN)


def test_what_was_measured_corrects_the_next_plan(planned: Planned) -> None:
    before = planned.at(2, machine=GPU)
    measured = before.peak_gib - before.parts_gib["runtime"] + 1.5
    assert before.step_s is not None
    planned.remember(measured, micro_batch_size=2, step_s=before.step_s * 1.3, machine=GPU)
    after = planned.at(2, machine=GPU)
    assert after.peak_gib == pytest.approx(before.peak_gib + 1.5, rel=0.01)
    assert after.step_s == pytest.approx(before.step_s * 1.3)
    for _ in range(3):  # the same again corrects nothing more
        planned.remember(measured, micro_batch_size=2, step_s=before.step_s * 1.3, machine=GPU)
    assert planned.at(2, machine=GPU).peak_gib == pytest.approx(after.peak_gib)
    assert planned.at(2, machine=GPU).step_s == pytest.approx(before.step_s * 1.3)


def test_shorter_rows_are_compared_with_a_plan_of_their_length(planned: Planned) -> None:
    half = planned.at(2, tokens=2048, machine=GPU)
    assert half.peak_gib < planned.at(2, machine=GPU).peak_gib
    planned.remember(half.peak_gib - half.parts_gib["runtime"], micro_batch_size=2, tokens=2048, machine=GPU)
    known = calibration.read("rtx4090")
    assert known is not None and known.ratios["peak"] == pytest.approx(1, abs=1e-6)


def test_an_evaluation_that_takes_what_is_free_teaches_nothing(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batches are halved until they fit: a plan corrected by them would refuse the run that has just been made."""
    plan = planned.at(2, tokens=4096, machine=GPU)
    training = plan.peak_gib - plan.parts_gib["runtime"]
    measured = preflight.Measured(
        how="GPU memory allocated",
        micro_batch_size=2,
        tokens=4096,
        peaks_gib={"training": training, "evaluation": training + 4, "generation": training + 6},
        weights_gib=plan.parts_gib["weights"],
        step_s=plan.step_s or 0.0,
        checkpoint_bytes=1,
        checkpoint_s=0.1,
        seconds=1.0,
    )
    monkeypatch.setattr(preflight, "try_out", lambda *_, **__: measured)
    monkeypatch.setattr(preflight, "this_machine", lambda: GPU)
    told: list[str] = []
    trainer: Any = SimpleNamespace(facts=SimpleNamespace(report=told.append))
    preflight.check_before_training(trainer, planned, chat=None, held_out=())  # type: ignore[arg-type]
    known = calibration.read("rtx4090")
    assert known is not None and known.ratios["peak"] == pytest.approx(1, abs=1e-6) and known.step_ratio is not None
    assert "generation" in told[1]


def test_a_plan_of_an_evaluation_is_not_compared_with_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_TUNE_CACHE", str(tmp_path / "cache"))
    wide = LLAMA | {"num_hidden_layers": 1, "vocab_size": 1_000_000}
    planned = Planned(wide, Base(name="x", quantize="none"), Lora(), TRAIN.model_copy(update={"micro_batch_size": 1}))
    plan = planned.at(1, machine=GPU)
    assert not plan.parts_gib["gradients"]
    planned.remember(9.0, micro_batch_size=1, step_s=plan.step_s, machine=GPU)
    known = calibration.read("rtx4090")
    assert known is not None and known.ratios == {} and known.step_ratio is not None


def test_resident_memory_of_a_cpu_teaches_nothing(planned: Planned) -> None:
    planned.remember(9.0, micro_batch_size=2, machine=CPU)
    assert calibration.read("cpu") is None

"""The end of a run: everything that the adapter folder tells, and the proof by a process that knows nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tune.adapter.folder import Manifest, ScoreRecord
from lora_tune.errors import CheckFailed, Problem
from lora_tune.model.source import BaseSource
from lora_tune.recipe import Recipe
from lora_tune.terminal import activity
from lora_tune.training.place import leave_alone
from lora_tune.training.room import free_room
from lora_tune.training.team import here

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_tune.adapter.write import FinishedRun
    from lora_tune.data.chat_template import ChatTemplate
    from lora_tune.data.pipeline import Prepared
    from lora_tune.evaluation.scores import Comparison


def write_folder(
    recipe: Recipe,
    source: BaseSource,
    prepared: Prepared,
    *,
    chat: ChatTemplate,
    model: PeftModel,
    comparison: Comparison,
    reason: str,
) -> Manifest | None:
    """Everything that the adapter folder tells about this run; of several processes the first one writes it."""
    folder = Path(recipe.output)
    if here().first:
        free_room(folder)
    with activity(f"writing {folder}"), _put_together(model):
        from lora_tune.adapter.vectors import make_test_vectors, precision
        from lora_tune.adapter.write import FinishedRun, write_run
        from lora_tune.model.base import compute_dtype
        from lora_tune.model.methods import saved_adapter
        from lora_tune.training.record import training_record

        dtype = str(compute_dtype(recipe.base)).removeprefix("torch.")
        precise = precision(device=model.device.type, compute_dtype=dtype, quantize=recipe.base.quantize)
        run = FinishedRun(
            recipe=recipe,
            source=source,
            compute_dtype=dtype,
            adapter=saved_adapter(model, lora=recipe.lora, source=source),
            chat=chat,
            identities=prepared.identities,
            ledger=prepared.ledger.as_json(),
            training=training_record(folder, recipe, model=model, prepared=prepared).because(reason),
            vectors=make_test_vectors(model, chat, made_on=precise),
            scores={name: ScoreRecord(**asdict(score)) for name, score in comparison.scores.items()},
            samples=comparison.samples,
        )
        team = here()
        if not team.divided:  # how many rows are measured depends on the time, and the others would wait
            _draw_report(folder, run, prepared, model=model, comparison=comparison)
        return write_run(folder, run) if team.first else None


@contextmanager
def _put_together(model: PeftModel) -> Iterator[None]:
    from lora_tune.model.divided import gathered

    with gathered(model):
        yield


def _draw_report(
    folder: Path, run: FinishedRun, prepared: Prepared, *, model: PeftModel, comparison: Comparison
) -> None:
    """Write `report.html`, with the training rows that stay hard; nothing of the run changes."""
    from lora_tune.evaluation.hard_rows import hard_rows, time_for
    from lora_tune.evaluation.report_facts import facts_of_run
    from lora_tune.evaluation.report_page import write_report
    from lora_tune.training.metrics_file import read_metrics

    seconds = time_for(run.training.seconds or 0.0)
    hard = hard_rows(model, prepared.documents, chat=run.chat, seed=run.recipe.seed, seconds=seconds)
    steps = read_metrics(folder / "metrics.jsonl")
    write_report(folder, facts_of_run(folder, run, comparison, steps=steps, hard=hard))


def prove(folder: Path, recipe: Recipe, *, trust_remote_code: str | None) -> None:
    """Load the folder on its base in a fresh process and replay the test vectors. Raises CheckFailed."""
    leave_alone()  # DeepSpeed's variable as well: that process is alone
    with activity(f"verifying {folder} in a fresh process"):
        command = [sys.executable, "-m", "lora_tune", "adapters", "verify", str(folder)]
        command += ["--base", recipe.base.name, "--json"]
        command += ["--trust-remote-code", trust_remote_code] if trust_remote_code else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        answer = json.loads(done.stdout) if done.stdout.startswith("{") else {"problems": []}
        reasons = [Problem(**problem) for problem in answer["problems"]]
        ended = Problem(f"verification ended with {done.returncode}: {done.stderr.strip()[-300:]}", file=str(folder))
        raise CheckFailed(reasons or [ended])

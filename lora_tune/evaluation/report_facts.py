"""The facts of a report: from a run that has just finished, or from an adapter folder that is evaluated again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_tune import __version__
from lora_tune.adapter.card import held_in, repeat_commands
from lora_tune.adapter.folder import BaseRecord, DataRecord, Manifest
from lora_tune.adapter.write import FinishedRun, library_versions, stored_recipe
from lora_tune.evaluation.hard_rows import HardRows
from lora_tune.evaluation.report_page import ReportFacts
from lora_tune.evaluation.scores import Comparison

_COMMIT = 12  # letters of a commit that are shown


def facts_of_run(
    folder: Path,
    run: FinishedRun,
    comparison: Comparison,
    *,
    steps: Sequence[Mapping[str, Any]],
    hard: HardRows | None = None,
) -> ReportFacts:
    """What the report of a run tells; `steps` are the lines of `metrics.jsonl`."""
    base = run.recipe.base
    return ReportFacts(
        name=folder.resolve().name,
        tool=f"lora_tune {__version__}",
        base=_base(run.source.name, run.source.revision),
        held=held_in(base.quantize, compute_dtype=run.compute_dtype, double="on" if base.double_quant else "off"),
        training=run.training,
        data=tuple(DataRecord(**_known(asdict(identity))) for identity in run.identities),
        ledger=run.ledger,
        comparison=comparison,
        steps=steps,
        recipe=stored_recipe(run.recipe, source=run.source, identities=run.identities),
        libraries=library_versions(),
        seed=run.recipe.seed,
        hard=hard,
        commands=repeat_commands(run.source.kind),
    )


def facts_of_folder(
    folder: Path, manifest: Manifest, comparison: Comparison, *, steps: Sequence[Mapping[str, Any]], command: str
) -> ReportFacts:
    """What a report tells of an adapter that was evaluated again, by `command`.

    It has no rows that stay hard, and the account of the data is that of the training.
    """
    base: BaseRecord = manifest.base
    return ReportFacts(
        name=folder.resolve().name,
        tool=manifest.tool,
        base=_base(base.name, base.revision),
        held=held_in(base.quantize, compute_dtype=base.compute_dtype, double="on" if base.double_quant else "off"),
        training=manifest.training,
        data=manifest.data,
        ledger=manifest.ledger,
        comparison=comparison,
        steps=steps,
        recipe=(folder / "recipe.yaml").read_text(encoding="utf-8", errors="replace"),
        libraries=manifest.libraries,
        seed=manifest.seed,
        commands={**repeat_commands(base.kind), **dict.fromkeys(("scores", "tasks", "samples"), command)},
    )


def _base(name: str, revision: str | None) -> str:
    return f"{name} at revision {revision[:_COMMIT]}…" if revision else name


def _known(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: identity[name] for name in DataRecord.model_fields if name in identity}

"""What was measured beside what was planned, card by card: it makes the next plan more exact.

One JSON file, `calibration.json` in the user's cache folder (`LORA_TUNE_CACHE` names another), holds the last eight
measurements of every card with every set of library versions. It is a memory, not a record: a damaged file, or one of
other versions, is as if nothing had been measured.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

_FILE = "calibration.json"
_KEPT = 8  # measurements of a card
_LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
_BELIEVED = (0.2, 5.0)  # ratios outside are an error of measurement, not of the plan


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured over predicted on one card, with the libraries installed now.

    `ratios` holds the median by part of `MemoryPlan.parts_gib`, and of `peak`; `spread` is how far single measurements
    of the peak lie from that median (a share of it), None with one measurement alone; `step_ratio` the median for
    seconds per step, None where no step was timed; `runs` how many measurements there are.
    """

    card: str
    libraries: str
    ratios: dict[str, float]
    spread: float | None
    step_ratio: float | None
    runs: int


def calibration_file() -> Path:
    """Where measurements are kept; the folder need not exist."""
    folder = os.environ.get("LORA_TUNE_CACHE") or platformdirs.user_cache_dir("lora_tune", appauthor=False)
    return Path(folder) / _FILE


def libraries() -> str:
    """The versions on which memory and speed depend, such as `torch 2.13.0, transformers 5.23.0, …`."""
    found = []
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def read(card: str) -> Calibration | None:
    """What was measured on this card (its name, as `cards.py` or the driver gives it) with these library versions."""
    versions = libraries()
    runs = [run for run in _stored().get(card, {}).get(versions, []) if _is_run(run)]
    if not runs:
        return None
    parts = sorted({name for run in runs for name in _ratios(run.get("ratios"))})
    by_part = {name: [_ratios(run.get("ratios"))[name] for run in runs if name in _ratios(run.get("ratios"))]
               for name in parts}  # fmt: skip
    steps = [run["step_ratio"] for run in runs if _is_ratio(run.get("step_ratio"))]
    peaks = by_part.get("peak", [])
    middle = statistics.median(peaks) if peaks else 1.0
    return Calibration(
        card=card,
        libraries=versions,
        ratios={name: statistics.median(values) for name, values in by_part.items()},
        spread=max(abs(value / middle - 1) for value in peaks) if len(peaks) > 1 else None,
        step_ratio=statistics.median(steps) if steps else None,
        runs=len(runs),
    )


def remember(
    card: str,
    *,
    predicted: Mapping[str, float],
    measured: Mapping[str, float],
    step_s: tuple[float, float] | None = None,
) -> None:
    """Add one measurement: GiB by part (names of `MemoryPlan.parts_gib`, or `peak`); what one side lacks is left out.

    `predicted` must come from the formulas alone (`MemoryPlan.formula_gib`; as `peak` the sum of it), not from a plan
    that was corrected by an earlier measurement; a measured `peak` holds the runtime as well. `step_s` is
    (predicted, measured) seconds of one optimizer step. A cache folder that cannot be written is no error: the next
    plan is as exact as this one was.
    """
    ratios = {name: measured[name] / predicted[name] for name in predicted.keys() & measured.keys() if predicted[name]}
    run: dict[str, Any] = {"ratios": {name: ratio for name, ratio in sorted(ratios.items()) if _is_ratio(ratio)}}
    if step_s is not None and step_s[0] > 0 and _is_ratio(step_s[1] / step_s[0]):
        run["step_ratio"] = step_s[1] / step_s[0]
    if not run["ratios"] and "step_ratio" not in run:
        return
    stored = _stored()
    runs = stored.setdefault(card, {}).setdefault(libraries(), [])
    runs[:] = [*runs, run][-_KEPT:]
    _write(stored)


def _write(stored: Mapping[str, Any]) -> None:
    """Replace the file in one step, so that a plan that reads meanwhile sees the old or the new one."""
    path = calibration_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_FILE)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(stored, file, indent=1, sort_keys=True)
            os.replace(name, path)
        except OSError:
            Path(name).unlink(missing_ok=True)
    except OSError:
        return


def _stored() -> dict[str, dict[str, list[Any]]]:
    """The file's content, without what has another shape: {card: {library versions: [measurement, …]}}."""
    try:
        found = json.loads(calibration_file().read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    cards = found.items() if isinstance(found, dict) else ()
    return {
        card: {versions: runs for versions, runs in sets.items() if isinstance(runs, list)}
        for card, sets in cards
        if isinstance(sets, dict)
    }


def _is_run(run: Any) -> bool:
    """Whether a measurement says anything that can be believed."""
    return isinstance(run, dict) and bool(_ratios(run.get("ratios")) or _is_ratio(run.get("step_ratio")))


def _ratios(found: Any) -> dict[str, float]:
    return {name: ratio for name, ratio in found.items() if _is_ratio(ratio)} if isinstance(found, dict) else {}


def _is_ratio(value: Any) -> bool:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return plain and _BELIEVED[0] <= value <= _BELIEVED[1]

"""From where a run starts: from nothing, from its newest checkpoint, or not at all because it is finished."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from lora_tune.adapter.claim import Mode
from lora_tune.adapter.folder import MANIFEST, damaged_files
from lora_tune.errors import CheckFailed, Problem, UsageError
from lora_tune.training.checkpoint import Checkpoint, newest
from lora_tune.training.identity import check_identity, differences


@dataclass(frozen=True, slots=True)
class Start:
    """What a run begins with: its identity, the changes that are allowed, the checkpoint that it goes on from.

    `finished` says that there is nothing left to do; `mode` is how the run was asked for.
    """

    mode: Mode = "new"
    identity: Mapping[str, Any] = field(default_factory=dict)
    allowed: Collection[str] = ()
    found: Checkpoint | None = None
    finished: bool = False


def find_start(
    folder: Path, identity: Mapping[str, Any], *, mode: Mode, allowed: Collection[str], report: Callable[[str], None]
) -> Start:
    """Look at what the claimed run folder holds, before anything large is loaded.

    A finished run goes on where an allowed change, such as more steps, leaves it something to do, and so does one of
    whose files one is damaged.

    Raises:
        UsageError: the run was started with another recipe, data, base or version; every difference is named.
        CheckFailed: there are checkpoints, and all of them are damaged.
    """
    if mode != "resume":
        return Start(mode, identity)
    damaged = damaged_files(folder) if (folder / MANIFEST).exists() else [MANIFEST]
    finished = not damaged
    try:
        found = newest(folder, report=report)
    except CheckFailed:
        if not finished:  # a finished run needs its checkpoints no more
            raise
        found = None
    if found is not None:
        check_identity(found.run["identity"], identity, allowed=allowed)
        finished = finished and not differences(found.run["identity"], identity)
    if damaged and (folder / MANIFEST).exists():
        if found is None:
            reason = f"{damaged[0]} is damaged, and no checkpoint is there to write it again from"
            raise CheckFailed(Problem(reason, "start again with --overwrite", str(folder)))
        report(f"{damaged[0]} is damaged: the folder is written again from the newest checkpoint")
    elif found is None and not finished:
        report("there is no checkpoint yet: training starts at step 0")
    if found is not None and not finished:
        _refuse_fewer_steps(found, identity)
    return Start(mode, identity, allowed, found, finished)


def _refuse_fewer_steps(found: Checkpoint, identity: Mapping[str, Any]) -> None:
    train = identity.get("train", {})
    if train.get("budget") or not train:
        return
    total = train["max_steps"] or ceil(train["epochs"] * found.run["steps"]["steps_per_epoch"])
    if total < found.step:
        reason = f"{total} steps are asked for, but the checkpoint has {found.step} behind it"
        raise UsageError(Problem(reason, "ask for more, or start a new run", key="train.max_steps"))

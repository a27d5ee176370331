"""From where a run starts: from nothing, from its newest checkpoint, or not at all because it is finished."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_tune.adapter.claim import Mode
from lora_tune.adapter.folder import MANIFEST
from lora_tune.errors import CheckFailed
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

    A finished run goes on where an allowed change, such as more steps, leaves it something to do; it then counts as
    unfinished again.

    Raises:
        UsageError: the run was started with another recipe, data, base or version; every difference is named.
        CheckFailed: there are checkpoints, and all of them are damaged.
    """
    if mode != "resume":
        return Start(mode, identity)
    finished = (folder / MANIFEST).exists()
    try:
        found = newest(folder, report=report)
    except CheckFailed:
        if not finished:  # a finished run needs its checkpoints no more
            raise
        found = None
    if found is not None:
        check_identity(found.run["identity"], identity, allowed=allowed)
        finished = finished and not differences(found.run["identity"], identity)
    elif not finished:
        report("there is no checkpoint yet: training starts at step 0")
    if not finished:
        (folder / MANIFEST).unlink(missing_ok=True)
    return Start(mode, identity, allowed, found, finished)

"""`lora-tune serve --engine vllm | sglang | llama.cpp`: the command of another engine, printed or started and checked.

Without `--start` the command is printed, for the user's own supervisor. With it the engine is started, must answer,
must be fed the words of training and speak OpenAI's API; then it runs until a signal.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_tune.errors import CheckFailed, Interrupted, Problem
from lora_tune.interrupts import Stop, signal_name
from lora_tune.recipe import Base
from lora_tune.serving.engine_process import LIMITS, Checked, check_engine, running
from lora_tune.serving.engines import EngineCommand, EngineName, Wanted, plan_engine

LOG = "engine.log"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Start:
    """Whether the engine is started, for how long it is waited for, and whether it stays when it was checked."""

    how: Literal["print", "start", "check"] = "print"
    wait_s: float = 600.0


def serve_engine(
    engine: EngineName, adapters: Mapping[str, Path], *, base: Base, wanted: Wanted, start: Start, say: Say
) -> dict[str, Any]:
    """Plan, print and, where it is asked for, start and check an engine; "check" ends it after that.

    Returns what `--json` prints. Raises: CheckFailed where an adapter cannot be served there as trained, its words
    part, or a check fails; Interrupted at the signal that ends it; UsageError, ResourceError as `running`.
    """
    command = plan_engine(engine, adapters, base=base, wanted=wanted)
    facts: dict[str, Any] = {
        "engine": engine,
        "command": command.text(),
        "url": command.url,
        "models": list(dict.fromkeys(command.names.values())),
        "notes": list(command.notes),
    }
    for note in command.notes:
        say(f"# {note}")
    say(command.text())
    if start.how == "print":
        return facts
    with running(command, log=wanted.folder / LOG, wait_s=start.wait_s) as process:
        checked = check_engine(command)
        facts |= checked.as_json()
        _tell(checked, command, say)
        if checked.failed:
            raise CheckFailed(checked.failed)
        if start.how == "start":
            say(f"serving {', '.join(dict.fromkeys(command.names.values()))} at {command.url}; Ctrl-C ends it")
            _until_signal(process, command)
    return facts


def _tell(checked: Checked, command: EngineCommand, say: Say) -> None:
    for model, found in checked.parity.items():
        say(f"{model}: {found}")
    say(f"what that shows: {checked.proof}")
    for model, checks in checked.conformance.items():
        passed = sum(check.outcome == "passed" for check in checks)
        missing = [check.name for check in checks if check.outcome == "not offered"]
        without = f"; not offered: {', '.join(missing)}" if missing else ""
        say(f"{model}: {passed} of {len(checks)} checks of OpenAI's API passed{without}")
    if LIMITS[command.server]:
        say(f"known of this engine: {'; '.join(dict.fromkeys(LIMITS[command.server].values()))}")


def _until_signal(process: subprocess.Popen[bytes], command: EngineCommand) -> None:
    """Wait for the engine's end, or a signal, at which it is ended. Raises: Interrupted, CheckFailed."""
    try:
        code = process.wait()
    except Stop as stopped:
        raise Interrupted(stopped.number, f"stopped by {signal_name(stopped.number)}: the engine has ended") from None
    raise CheckFailed(Problem(f"{command.engine} ended by itself with exit code {code}", f"see {LOG}"))

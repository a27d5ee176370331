"""`lora-tune doctor`: is this machine ready; every finding one line with what to do. Exit 1 when something will fail.

First what is known without torch (CHECKS in model/conditions.py), then what a recipe asks of the machine, then torch
and 4-bit arithmetic, really run. No connection is made but with --hub.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lora_tune.errors import LoraTuneError, Problem, ResourceError, Severity
from lora_tune.model.conditions import CHECKS, Finding
from lora_tune.model.machine import GIB, Machine, hub_cache, look
from lora_tune.model.missing import missing_problems
from lora_tune.recipe_file import RecipeFile, read_recipe
from lora_tune.terminal import activity, print_json, printable, results, run_app

app = typer.Typer(help="Look whether this machine is ready.", add_completion=False)
_MARKS = {"ok": "✓", "note": "–", "warning": "!", "error": "✗"}
_STYLES = {"ok": "green", "note": "dim", "warning": "yellow", "error": "red"}
_SEVERITIES: dict[str, Severity] = {"note": "note", "warning": "warning", "error": "error"}
Found = list[tuple[str, Finding]]


@app.command()
def command(
    recipe: Annotated[Path | None, typer.Option(help="Look also whether this recipe will run here.")] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Connect to the hub as well.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look whether this machine is ready: versions, GPU, 4-bit arithmetic, memory, disk, hub, bad combinations."""
    file = read_recipe(recipe) if recipe else None
    machine = look(Path(file.recipe.output if file else "adapters"))
    found: Found = []
    for name, check, doing in _checks(machine, file, hub="tried" if hub else "left alone"):
        start = time.monotonic()
        if doing:
            with activity(doing):
                new = list(check())
        else:
            new = list(check())
        found += [(name, finding) for finding in new]
        if not as_json:
            _print(name, new, seconds=time.monotonic() - start)
    errors = [finding for _, finding in found if finding.verdict == "error"]
    if as_json:
        _print_json(found, machine)
    else:
        warnings = sum(finding.verdict == "warning" for _, finding in found)
        verdict = "ready" if not errors else "not ready"
        results().print(f"{verdict}: {len(errors)} errors, {warnings} warnings")
    raise typer.Exit(1 if errors else 0)


def _checks(
    machine: Machine, file: RecipeFile | None, *, hub: str
) -> Iterator[tuple[str, Callable[[], Iterable[Finding]], str]]:
    """Name, check and what it is doing (of those that take long), the quick ones first."""
    for name, check in CHECKS.items():
        yield name, partial(check, machine), ""
    if file is not None:
        yield "recipe", partial(recipe_fits, file, machine), ""
    if hub == "tried":
        yield "hub answers", partial(hub_answers, file, machine), "asking the hub"
    from lora_tune.model.four_bit import four_bit_works, torch_works

    yield "torch", partial(torch_works, machine), "importing torch"
    yield "4 bit", partial(four_bit_works, machine), "running a base in 4 bit"


def recipe_fits(file: RecipeFile, machine: Machine) -> Iterator[Finding]:
    """The base is at hand or may be downloaded, its training fits into memory, and what it writes onto the disk."""
    from lora_tune.model.hub import is_repository_id
    from lora_tune.model.source import find_base

    recipe, name = file.recipe, file.recipe.base.name
    for one in missing_problems(recipe.base, recipe.train):
        yield Finding("error", f"{one.key}: {one.reason}", one.fix)
    cached = hub_cache() / f"models--{name.replace('/', '--')}"
    on_hub = not name.startswith("builtin:") and not Path(name).is_dir() and is_repository_id(name)
    if on_hub and not any(cached.glob("snapshots/*/config.json")):
        if machine.is_offline:
            yield Finding("error", f"{name} is not in the cache, and the hub is switched off", "unset HF_HUB_OFFLINE")
        else:
            yield Finding("note", f"{name} is not in the cache yet: it will be downloaded", "lora-tune plan tells more")
        return
    base = recipe.base
    if on_hub:  # as a folder, so that the hub is not asked
        newest = max(cached.glob("snapshots/*/config.json"), key=lambda path: path.stat().st_mtime)
        base = base.model_copy(update={"name": str(newest.parent), "revision": None})
    try:
        source = find_base(base)
    except LoraTuneError as error:
        yield from (Finding("error", one.reason, one.fix) for one in error.problems)
        return
    yield from _plan_fits(file, machine, config=source.config)
    if on_hub and not any(cached.glob("snapshots/*/*.safetensors")):
        yield Finding("note", f"the weights of {name} are not in the cache yet: they will be downloaded")


def _plan_fits(file: RecipeFile, machine: Machine, *, config: dict[str, object]) -> Iterator[Finding]:
    from lora_tune.model.device import this_machine
    from lora_tune.model.memory import plan_here

    recipe = file.recipe
    device = this_machine().device
    try:
        plan = plan_here(config, base=recipe.base, lora=recipe.lora, train=recipe.train)
    except ResourceError as error:
        yield from (Finding("error", one.reason, one.fix) for one in error.problems)
        return
    yield Finding("ok", f"{recipe.base.name} on {device}: {plan.reason}")
    # in float32: adapter and two moments for each checkpoint, one more while it is written, and the adapter itself
    needed = (12 * (recipe.train.keep_checkpoints + 1) + 4) * plan.trainable_parameters / GIB
    for place in machine.places:
        if place.what == "output" and place.free_gib < needed:
            said = f"checkpoints and adapter take {needed:.1f} GiB, {place.free_gib:.1f} are free in {place.path}"
            yield Finding("error", said, "make room, or lower train.keep_checkpoints")


def hub_answers(file: RecipeFile | None, machine: Machine) -> Iterator[Finding]:
    """Ask the hub for the base of the recipe, or for any: whether it answers, and whether there is access."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    name = file.recipe.base.name if file else ""
    asked = name if "/" in name and not Path(name).exists() else "Qwen/Qwen2.5-7B"
    start = time.monotonic()
    try:
        HfApi().model_info(asked, timeout=10)
    except OfflineModeIsEnabled:
        yield Finding("error", "the hub is switched off", "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE")
    except (HfHubHTTPError, HTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        fix = "check network, proxy and HF_ENDPOINT; a gated base needs its terms accepted and HF_TOKEN"
        yield Finding("error", f"{asked}: {reason}", fix)
    else:
        yield Finding("ok", f"{asked}: answered in {time.monotonic() - start:.1f} s")


def _print(name: str, found: Iterable[Finding], *, seconds: float) -> None:
    """The findings of one check: a row each in a terminal, else a line."""
    from rich.table import Table
    from rich.text import Text

    if not results().is_terminal:
        for finding in found:
            fix = f"; {finding.fix}" if finding.fix else ""
            results().print(printable(f"{_MARKS[finding.verdict]} {name:<11} {finding.said}{fix}"))
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(width=1)
    table.add_column(width=11)
    table.add_column(overflow="fold")
    for finding in found:
        said = Text(printable(finding.said), style="" if finding.verdict == "ok" else _STYLES[finding.verdict])
        if seconds > 0.5:
            said.append(f" ({seconds:.1f} s)", style="dim")
        if finding.fix:
            said.append(f"; {printable(finding.fix)}", style="bold" if finding.verdict == "error" else "")
        table.add_row(Text(_MARKS[finding.verdict], style=_STYLES[finding.verdict]), name, said)
    results().print(table, soft_wrap=False)


def _print_json(found: Found, machine: Machine) -> None:
    code = 1 if any(finding.verdict == "error" for _, finding in found) else 0
    problems = [
        Problem(f"{name}: {finding.said}", finding.fix, severity=_SEVERITIES[finding.verdict])
        for name, finding in found
        if finding.verdict != "ok"
    ]
    checks = [{"check": name, **asdict(finding)} for name, finding in found]
    print_json({"exit_code": code, "checks": checks, "machine": asdict(machine)}, problems)


if __name__ == "__main__":
    sys.exit(run_app(app, name="python -m lora_tune.doctor"))

"""`lora-tune adapters list | verify`: what adapter folders there are, and whether one is what it says it is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_tune.adapter.folder import CONFIG, MANIFEST, read_manifest
from lora_tune.errors import CheckFailed, Problem, UsageError
from lora_tune.recipe import Base
from lora_tune.terminal import activity, number_text, print_json, print_problems, print_table, results, run_app

app = typer.Typer(help="Look at adapter folders and verify them.", no_args_is_help=True, add_completion=False)


@app.command("list")
def list_folders(
    directory: Annotated[Path, typer.Argument(help="The folder that holds adapter folders.")] = Path("adapters"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the adapter folders below a folder: base, method, rows trained on, scores."""
    if not directory.is_dir():
        raise UsageError(Problem("no such folder", "name the folder that holds adapter folders", str(directory)))
    found: list[dict[str, Any]] = []
    problems: list[Problem] = []
    for folder in sorted(path.parent for path in directory.glob(f"*/{CONFIG}")):
        try:
            found.append(_line(folder))
        except CheckFailed as error:
            problems += error.problems
    if as_json:
        print_json({"exit_code": 0, "adapters": found}, problems)
        return
    columns = ("name", "base", "method", "steps", "rows", "scores (base → adapter)")
    print_table(
        "", columns, [[line[key] for key in ("name", "base", "method", "steps", "rows", "scores")] for line in found]
    )
    print_problems(problems)


def _line(folder: Path) -> dict[str, Any]:
    """One row of the list. Raises: CheckFailed where the manifest is damaged."""
    if not (folder / MANIFEST).exists():
        return {"name": folder.name, "base": None, "method": None, "steps": None, "rows": None, "scores": "no manifest"}
    manifest = read_manifest(folder)
    scores = [f"{name} {score.base:.3g} → {score.adapter:.3g}" for name, score in manifest.scores.items()]
    rows = manifest.training.rows or sum(item.rows for item in manifest.data)
    base, training = manifest.base.name, manifest.training
    return {
        "name": folder.name,
        "base": base,
        "method": training.method,
        "steps": training.steps,
        "rows": rows,
        "scores": ", ".join(scores),
    }


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="The adapter folder.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Where its base is: a folder, hub id or builtin: name.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Files, hashes and tensors only; nothing is loaded.")] = False,
    trust_remote_code: Annotated[
        str | None, typer.Option(metavar="REPO", help="Run the code that comes with this base; name its repository.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check files, hashes and tensors of an adapter folder, then load it on its base and replay its test vectors."""
    from lora_tune.adapter.verify import Depth, verify_folder

    with activity(f"verifying {folder}"):
        depth: Depth = "quick" if quick else "full"
        held = _held_base(folder, base)
        report = verify_folder(folder, base=held, depth=depth, trust_remote_code=trust_remote_code)
    code = 1 if report.errors else 0
    if as_json:
        print_json({"exit_code": code, **report.facts}, report.problems)
    else:
        print_problems(report.problems)
        if code == 0:
            results().print(_verdict(folder, report.facts))
    raise typer.Exit(code)


def _held_base(folder: Path, name: str | None) -> Base | None:
    """The base named on the command line, held as the manifest says, or as stored where there is no manifest."""
    from lora_tune.adapter.verify import base_of

    if name is None:
        return None
    try:
        return base_of(read_manifest(folder), name=name)
    except CheckFailed:
        return Base(name=name, quantize="none")  # the checks name what is wrong with the manifest


def _verdict(folder: Path, facts: Mapping[str, Any]) -> str:
    parts = [f"{folder}: ok: {facts['method']}, rank {facts['rank']}, {number_text(facts['parameters'])} parameters"]
    replay = facts.get("replay")
    if replay:
        parts.append(
            f"replayed as {replay['precision']}: base {replay['base']:.2g}, adapter {replay['adapter']:.2g} nats from "
            f"training (at most {replay['tolerance']:g}), effect of the adapter {replay['effect']:.3g} nats"
        )
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(run_app(app, name="python -m lora_tune.adapters"))

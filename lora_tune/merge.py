"""`lora-tune merge ADAPTER --output DIR`: fold an adapter into its base shard by shard, measured before it is written.

1. verify the adapter, 2. rows to measure on, 3. what the adapter answers as it was trained (on its quantized base),
against what it would answer folded into the base as stored, and into what the 4-bit weights stand for, 4. the nearest
is chosen, or refused beyond `--max-kl`, 5. a transformers folder is written. No step holds the whole base in memory,
but for bases whose files are arranged otherwise than the model, and for new tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_tune.adapter.merge_card import loss_text, merge_table
from lora_tune.adapter.merge_job import Method, Mixture, Precision, merge_folders, prepare_merge
from lora_tune.adapter.new_folder import new_folder
from lora_tune.errors import Problem, UsageError
from lora_tune.terminal import activity, print_json, print_problems, print_table, results, run_app

app = typer.Typer(help="Fold an adapter into its base and prove it.", add_completion=False)


@app.command()
def merge(
    adapters: Annotated[list[Path], typer.Argument(help="The adapter folder; several are combined first.")],
    output: Annotated[Path, typer.Option("--output", help="The new folder of the merged model.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Where its base is: a folder, hub id or builtin: name.")
    ] = None,
    precision: Annotated[
        Precision, typer.Option("--base-precision", help="Fold into the base as stored, or as its 4-bit weights say.")
    ] = Precision.auto,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Rows to measure on, such as the held-out ones; else the test vectors."),
    ] = None,
    max_kl: Annotated[
        float, typer.Option("--max-kl", help="Refuse beyond this divergence from the adapter as trained (nats).", min=0)
    ] = 0.1,
    method: Annotated[Method, typer.Option("--combine", help="How several adapters become one.")] = Method.linear,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Weight of each adapter, such as 0.7,0.3; equal shares without it.")
    ] = None,
    density: Annotated[float, typer.Option(help="Share of numbers that ties and dare keep.", min=0.01, max=1)] = 0.5,
    seed: Annotated[int, typer.Option(help="Of what dare drops.", min=0)] = 42,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fold an adapter into its base, in bounded memory, measured against the adapter as it was trained."""
    if output.exists():
        raise UsageError(Problem("is there already", "name a new folder", str(output), key="--output"))
    mixture = Mixture(method, _shares(weights, len(adapters)), density, seed)
    job, problems = prepare_merge(tuple(adapters), base_name=base, data=data)
    with activity(f"merging into {output}"), new_folder(output) as scratch:
        facts = merge_folders(job, scratch, mixture=mixture, precision=precision, max_kl=max_kl)
    if as_json:
        print_json({"exit_code": 0, "output": str(output), **facts}, problems)
        return
    print_problems(problems)
    _show(facts)
    results().print(f"{output}: merged into the {facts['chosen']} base, {facts['dtype']}")


def _shares(text: str | None, count: int) -> tuple[float, ...]:
    """The weights that were typed, or equal shares. Raises: UsageError for anything but numbers."""
    if text is None:
        return (1 / count,) * count
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != count or not all(abs(weight) < 100 for weight in weights):
        raise UsageError(f"--weights must be {count} numbers such as 0.7,0.3, got {text!r}", "one for each adapter")
    return weights


def _show(facts: dict[str, Any]) -> None:
    columns = ("merged into", "KL (nats)", "worst KL", "same top token", "loss on answers")
    rows = [
        [name, f"{one['kl']:.2e}", f"{one['worst_kl']:.2e}", f"{one['top1']:.2%}", loss_text(one["loss"])]
        for name, one in merge_table(facts)
    ]
    for name, one in facts.get("from_each", {}).items():
        rows.append([f"from {name} alone", f"{one['kl']:.2e}", f"{one['worst_kl']:.2e}", f"{one['top1']:.2%}", "–"])
    positions = facts["candidates"][facts["chosen"]]["positions"]
    print_table(
        f"against the adapter as trained, at {positions} positions (its loss: {loss_text(facts['loss_as_trained'])})",
        columns,
        rows,
    )


if __name__ == "__main__":
    sys.exit(run_app(app, name="python -m lora_tune.merge"))

"""`lora-tune export ADAPTER --to TARGET --output DIR`: the adapter in a layout that another engine runs as trained.

1. check the adapter and find its base, 2. write the target's files beside the output, 3. render held-out conversations
with the target's own template engine: they must equal the training ids token for token, stop tokens included, 4. move
the files to the output. What fails leaves nothing behind.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_tune.adapter.export_job import OUTPUT, Job, Written
from lora_tune.adapter.export_targets import TARGETS
from lora_tune.adapter.new_folder import new_folder
from lora_tune.errors import CheckFailed, LoraTuneError, Problem, UsageError
from lora_tune.terminal import activity, print_json, print_problems, results, run_app

app = typer.Typer(help="Write an adapter in the layout of another engine.", add_completion=False)

_MERGING = ("merged", "gguf-merged", "ollama")


class Dtype(StrEnum):
    """Number formats of the tensors that are written."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def command(
    folder: Annotated[Path, typer.Argument(help="The adapter folder.")],
    to: Annotated[str, typer.Option("--to", metavar="TARGET", help=f"The layout to write: {', '.join(TARGETS)}.")],
    output: Annotated[Path, typer.Option("--output", help="The new folder.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Where its base is: a folder, hub id or builtin: name.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Held-out rows, to compare words on; else those of the run.")
    ] = None,
    rows: Annotated[int, typer.Option(help="How many of them.", min=1)] = 16,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Number format, float32 if not given; the rounding error is measured and shown."),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", help="Refuse a merged model beyond this divergence, 0.1 nats.", min=0)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an adapter in the layout of another engine, proven to be fed the words that it was trained on."""
    if to not in TARGETS:
        raise UsageError(Problem(f"no such layout, got {to!r}", f"the layouts are {', '.join(TARGETS)}", key="--to"))
    _refuse_idle(to, dtype=dtype, max_kl=max_kl)
    if output.exists():
        raise UsageError(Problem("is there already", "name a new folder", str(output), key="--output"))
    number_format = dtype or Dtype.float32
    job, problems = _prepare(
        folder, base_name=base, dtype=number_format, max_kl=0.1 if max_kl is None else max_kl, data=data
    )
    with activity(f"exporting {folder} as {to}"), new_folder(output) as scratch:
        written = TARGETS[to](job, scratch)
        words, notes = _compare_words(job, written, to=to, rows=rows)
    facts = {"to": to, **written.facts, "parity": words}
    if as_json:
        print_json({"exit_code": 0, "output": output.name, **facts}, [*problems, *notes])
        return
    print_problems([*problems, *notes])
    results().print(f"{output}: {_numbers(facts)}")
    for line in written.how:
        results().print(line.replace(OUTPUT, shlex.quote(str(output))))


def _refuse_idle(to: str, *, dtype: Dtype | None, max_kl: float | None) -> None:
    """Raises: UsageError for an option that this layout has no use for."""
    if dtype is not None and to == "merged":
        raise UsageError(Problem("a merged model keeps the number format of its base", "leave it out", key="--dtype"))
    if max_kl is not None and to not in _MERGING:
        raise UsageError(Problem(f"nothing is merged for {to}", "leave it out", key="--max-kl"))


def _prepare(
    folder: Path, *, base_name: str | None, dtype: Dtype, max_kl: float, data: Path | None
) -> tuple[Job, list[Problem]]:
    """The checked folder, its base where it is at hand, and its words. Raises: CheckFailed, UsageError."""
    from lora_tune.adapter.at_hand import held_for, words_of
    from lora_tune.adapter.verify import base_of, verify_folder
    from lora_tune.model.source import find_base

    held = held_for(folder, base_name) if base_name is not None else None
    with activity(f"verifying {folder}"):
        report = verify_folder(folder, base=held, depth="quick")
    if report.errors:
        raise CheckFailed(report.errors)
    manifest = report.subject.manifest
    if held is None and manifest is not None and manifest.base.kind != "local":
        held = base_of(manifest)
    try:
        source = find_base(held) if held is not None else None
    except LoraTuneError:
        if base_name is not None:
            raise
        source = None  # a hub base that is not here; a target that needs it says so
    job = Job(
        folder=folder,
        subject=report.subject,
        dtype=dtype.value,
        chat=words_of(folder, base=source.folder if source else None),
        source=source,
        base=held if source else None,
        max_kl=max_kl,
        data=data,
    )
    return job, list(report.problems)


def _compare_words(job: Job, written: Written, *, to: str, rows: int) -> tuple[dict[str, Any] | None, list[Problem]]:
    """What was compared, and what is to be said of it. Raises: CheckFailed where the words part."""
    from lora_tune.adapter.parity import check_parity, held_out_conversations

    if written.render is None or job.chat is None:
        reason = "its words were not compared with training: it has no tokenizer with a chat template"
        return None, [Problem(reason, "render prompts as its author did", str(job.folder), severity="warning")]
    conversations = held_out_conversations(job.folder, job.chat, rows=rows, data=job.data)
    found = check_parity(job.chat, written.render, conversations, stop_ids=written.stop_ids, target=to)
    notes = []
    if found.rows == found.fixed:
        reason = f"the held-out rows are not at hand: words were compared on {found.fixed} fixed conversations"
        notes.append(Problem(reason, "give rows with --data", str(job.folder), severity="note"))
    return {**asdict(found), "text": str(found)}, notes


def _numbers(facts: dict[str, Any]) -> str:
    """The numbers of an export for people."""
    parts = []
    if "rank" in facts:
        parts.append(f"rank {facts['rank']}, scale 1 in every module, {facts['dtype']}")
        parts.append(f"largest relative change of an update {facts['largest_relative_error']:.1e}")
    elif "summary" in facts:
        parts.append(str(facts["summary"]))
    if facts["parity"] is not None:
        parts.append(str(facts["parity"]["text"]))
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(run_app(app, name="python -m lora_tune.export"))

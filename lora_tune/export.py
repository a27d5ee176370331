"""`lora-tune export ADAPTER --to canonical`: the adapter in a layout that another engine reads as it was trained."""

from __future__ import annotations

import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_tune.adapter.folder import (
    CONFIG,
    FILES,
    MANIFEST,
    WEIGHTS,
    read_manifest,
    write_file,
    write_json,
    write_manifest,
)
from lora_tune.adapter.new_folder import new_folder
from lora_tune.errors import Problem, UsageError
from lora_tune.terminal import activity, print_json, results, run_app

app = typer.Typer(help="Write an adapter in the layout of another engine.", add_completion=False)


class Target(StrEnum):
    """Layouts that can be written."""

    canonical = "canonical"


class Dtype(StrEnum):
    """Number formats of the tensors that are written."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def export_canonical(folder: Path, output: Path, *, dtype: Dtype) -> dict[str, Any]:
    """Write the adapter with one rank and a scale of 1, which every engine reads alike; returns what was measured.

    The other files of the folder come along, the manifest with new hashes: `adapters verify` proves the copy by the
    test vectors of the original.

    Raises:
        CheckFailed: the folder fails a check, or has parts that are no B·A (DoRA, modules trained in full, tokens).
        UsageError: the output is there already, or cannot be written.
    """
    from safetensors.torch import save

    from lora_tune.adapter.canonical import canonical
    from lora_tune.adapter.load import read_adapter

    if output.exists():
        raise UsageError(Problem("is there already", "name a new folder", str(output), key="--output"))
    saved = read_adapter(folder)
    form = canonical(saved, dtype=dtype.value)
    facts = {"to": "canonical", "rank": form.rank, "dtype": dtype.value, "largest_relative_error": form.error}
    with new_folder(output) as scratch:
        for name in FILES:
            if name not in (CONFIG, WEIGHTS, MANIFEST) and (folder / name).is_file():
                shutil.copyfile(folder / name, scratch / name, follow_symlinks=True)
        write_json(scratch, CONFIG, form.adapter.config)
        write_file(scratch, WEIGHTS, save(dict(form.adapter.tensors), {"format": "pt"}))
        if (folder / MANIFEST).exists():
            write_manifest(scratch, read_manifest(folder))
    return facts


@app.command()
def command(
    folder: Annotated[Path, typer.Argument(help="The adapter folder.")],
    to: Annotated[Target, typer.Option("--to", help="The layout to write.")],
    output: Annotated[Path, typer.Option("--output", help="The new folder.")],
    dtype: Annotated[
        Dtype, typer.Option(help="Number format; the rounding error is measured and shown.")
    ] = Dtype.float32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an adapter in a layout that every engine reads as it was trained."""
    with activity(f"exporting {folder} as {to.value}"):
        facts = export_canonical(folder, output, dtype=dtype)
    if as_json:
        print_json({"exit_code": 0, "output": output.name, **facts})
        return
    results().print(
        f"{output}: rank {facts['rank']}, scale 1 in every module, {facts['dtype']}; largest relative change of "
        f"an update {facts['largest_relative_error']:.1e}\nits proof: lora-tune adapters verify {output}"
    )


if __name__ == "__main__":
    sys.exit(run_app(app, name="python -m lora_tune.export"))

"""`lora-tune merge ADAPTER --output DIR`: fold an adapter into its full-precision base, and measure what that changes.

1. verify the adapter, 2. answer its test prompts as trained (quantized base and adapter), 3. load the base as stored,
put the adapter on and fold it in, 4. answer the same prompts again and compare, 5. write a transformers folder.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_tune.adapter.folder import VECTORS, Manifest, read_manifest, read_part
from lora_tune.errors import CheckFailed, Problem, UsageError
from lora_tune.recipe import Base
from lora_tune.terminal import activity, print_json, print_problems, results, run_app

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lora_tune.data.chat_template import ChatTemplate
    from lora_tune.model.source import BaseSource

app = typer.Typer(help="Fold an adapter into its base and prove it.", add_completion=False)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="The adapter folder.")],
    output: Annotated[Path, typer.Option("--output", help="The new folder of the merged model.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Where its base is: a folder, hub id or builtin: name.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fold an adapter into its full-precision base, measured against the adapter as it was trained."""
    facts, problems = _merge(adapter, output=output, base_name=base)
    if as_json:
        print_json({"exit_code": 0, "output": str(output), **facts}, problems)
        return
    print_problems(problems)
    for reference, measured in facts["against"].items():
        results().print(
            f"against {reference.replace('_', ' ')}: KL {measured['kl']:.3g} nats (worst {measured['worst_kl']:.3g}), "
            f"same most likely token at {measured['top1']:.1%} of {measured['positions']} positions"
        )
    results().print(f"{output}: merged, {facts['dtype']}")


def _merge(folder: Path, *, output: Path, base_name: str | None) -> tuple[dict[str, Any], list[Problem]]:
    """The page: verify, measure as trained, merge, measure, write. Returns what `merge.json` holds, and warnings."""
    from lora_tune.adapter.verify import recorded_base, verify_folder
    from lora_tune.model.source import find_base

    if output.exists():
        raise UsageError(Problem("is there already", "name a new folder", str(output), key="--output"))
    trained_base = recorded_base(folder, name=base_name)
    with activity(f"verifying {folder}"):
        report = verify_folder(folder, base=trained_base, depth="quick")
    if report.errors:
        raise CheckFailed(report.errors)
    manifest, source = read_manifest(folder), find_base(trained_base)
    chat = _chat(folder)
    prompts = _prompts(folder, source, chat)
    with activity("answering the test prompts as trained"):
        as_trained = _answers(source, trained_base, folder, prompts)
    with activity("merging"):
        merged, unmerged = _merged(source, _stored_base(trained_base, source), folder, prompts)
        measured = _measure(merged, prompts, as_trained=as_trained, unmerged=unmerged)
    facts = {**_identity(manifest, folder), "dtype": str(merged.dtype).removeprefix("torch."), "against": measured}
    with activity(f"writing {output}"):
        _write(merged, chat, output=output, facts=facts)
    return facts, list(report.problems)


def _prompts(folder: Path, source: BaseSource, chat: ChatTemplate) -> list[list[int]]:
    """The ids of the test vectors' prompts with their continuations."""
    from lora_tune.adapter.vectors import vector_ids

    rows = source.config.get("vocab_size") or source.config.get("text_config", {}).get("vocab_size", 0)
    vocabulary = max(rows, len(chat.tokenizer))  # new tokens follow the base's own
    return vector_ids(read_part(folder, VECTORS), vocabulary=vocabulary, where=str(folder / VECTORS))


def _stored_base(base: Base, source: BaseSource) -> Base:
    """The base as its files hold it, unquantized, in their dtype."""
    stored = source.config.get("dtype") or source.config.get("torch_dtype")
    dtype = stored if stored in ("bfloat16", "float16", "float32") else "float32"
    return base.model_copy(update={"quantize": "none", "compute_dtype": dtype})


def _answers(source: BaseSource, base: Base, folder: Path, prompts: list[list[int]]) -> torch.Tensor:
    """Log-probabilities (positions, V) of the adapter on its base, held as `base` says."""
    from lora_tune.adapter.load import load_adapter
    from lora_tune.model.base import load_base
    from lora_tune.model.merging import position_log_probs

    model = load_adapter(load_base(source, base), folder)
    return position_log_probs(model, prompts)


def _merged(
    source: BaseSource, base: Base, folder: Path, prompts: list[list[int]]
) -> tuple[PreTrainedModel, torch.Tensor]:
    """The merged model, and what its adapter answered on the same base before it was folded in."""
    from lora_tune.adapter.load import load_adapter
    from lora_tune.model.base import load_base
    from lora_tune.model.merging import merge_into, position_log_probs

    model = load_adapter(load_base(source, base), folder)
    unmerged = position_log_probs(model, prompts)
    return merge_into(model), unmerged


def _measure(
    merged: PreTrainedModel, prompts: list[list[int]], *, as_trained: torch.Tensor, unmerged: torch.Tensor
) -> dict[str, Any]:
    from lora_tune.model.merging import divergence, position_log_probs

    answers = position_log_probs(merged, prompts)
    references = {"adapter_as_trained": as_trained, "adapter_on_the_same_base": unmerged}
    return {name: asdict(divergence(reference, answers)) for name, reference in references.items()}


def _identity(manifest: Manifest, folder: Path) -> dict[str, Any]:
    return {
        "adapter": folder.resolve().name,
        "adapter_sha256": manifest.files["adapter_model.safetensors"].sha256,
        "base": manifest.base.model_dump(mode="json"),
    }


def _chat(folder: Path) -> ChatTemplate:
    from lora_tune.data.chat_template import load_chat_template
    from lora_tune.model.tokenizer import read_tokenizer

    return load_chat_template(read_tokenizer(folder, name=folder.name))


def _write(model: PreTrainedModel, chat: ChatTemplate, *, output: Path, facts: dict[str, Any]) -> None:
    """Write model, tokenizer and `merge.json` beside the output, then rename: the folder appears whole or not."""
    from lora_tune.adapter.write import write_tokenizer

    chat.align(model)
    model.config._name_or_path = ""  # transformers would keep where the base lay
    try:
        output.resolve().parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.resolve().parent)
    except OSError as error:
        raise UsageError(Problem(f"cannot be written: {error.strerror}", "name another folder", str(output))) from None
    with beside, _no_progress_bars():
        scratch = Path(beside.name) / "model"
        model.save_pretrained(scratch)
        write_tokenizer(scratch, chat.tokenizer)
        (scratch / "merge.json").write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.rename(scratch, output)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


if __name__ == "__main__":
    sys.exit(run_app(app, name="python -m lora_tune.merge"))

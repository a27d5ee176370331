"""`lora-tune merge ADAPTER --output DIR`: fold an adapter into its base shard by shard, measured before it is written.

1. verify the adapter, 2. rows to measure on, 3. what the adapter answers as it was trained (on its quantized base),
against what it would answer folded into the base as stored, and into what the 4-bit weights stand for, 4. the nearest
is chosen, or refused beyond `--max-kl`, 5. a transformers folder is written. No step holds the whole base in memory,
but for bases whose files are arranged otherwise than the model, and for new tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_tune.adapter.folder import VECTORS, Manifest, read_manifest, read_part
from lora_tune.adapter.merge_card import loss_text, merge_card, merge_table
from lora_tune.adapter.new_folder import new_folder
from lora_tune.errors import CheckFailed, Problem, UsageError
from lora_tune.recipe import Base
from lora_tune.terminal import activity, print_json, print_problems, print_table, results, run_app

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_tune.data.chat_template import ChatTemplate
    from lora_tune.model.fidelity import Comparison, Row
    from lora_tune.model.methods import SavedAdapter
    from lora_tune.model.source import BaseSource

app = typer.Typer(help="Fold an adapter into its base and prove it.", add_completion=False)


class Precision(StrEnum):
    """Which base the adapter is folded into."""

    auto = "auto"
    stored = "stored"
    dequantized = "dequantized"


@dataclass(frozen=True, slots=True)
class Job:
    """One merge: the verified folders, their base as trained and where it lies, and the words to measure with."""

    folders: tuple[Path, ...]
    output: Path
    manifest: Manifest
    trained: Base
    source: BaseSource
    chat: ChatTemplate
    rows: tuple[Row, ...]


class Method(StrEnum):
    """How several adapters become one."""

    linear = "linear"
    svd = "svd"
    ties = "ties"
    dare_linear = "dare_linear"
    dare_ties = "dare_ties"


@dataclass(frozen=True, slots=True)
class Mixture:
    """How several adapters are combined before they are folded in."""

    method: Method
    weights: tuple[float, ...]
    density: float
    seed: int


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
    job, problems = _prepare(tuple(adapters), output=output, base_name=base, data=data)
    facts = _merge(job, Mixture(method, _shares(weights, len(adapters)), density, seed), precision, max_kl=max_kl)
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


def _prepare(
    folders: tuple[Path, ...], *, output: Path, base_name: str | None, data: Path | None
) -> tuple[Job, list[Problem]]:
    """Everything that is checked before a weight is read."""
    from lora_tune.adapter.verify import recorded_base, verify_folder
    from lora_tune.model.source import find_base

    if output.exists():
        raise UsageError(Problem("is there already", "name a new folder", str(output), key="--output"))
    problems: list[Problem] = []
    for folder in folders:
        trained = recorded_base(folder, name=base_name)
        with activity(f"verifying {folder}"):
            report = verify_folder(folder, base=trained, depth="quick")
        if report.errors:
            raise CheckFailed(report.errors)
        problems += report.problems
    first = folders[0]
    trained = recorded_base(first, name=base_name)
    source, chat = find_base(trained), _chat(first)
    rows = _given_rows(data, chat) if data else _vector_rows(first, source, chat)
    return Job(folders, output, read_manifest(first), trained, source, chat, rows), problems


def _adapter(job: Job, mixture: Mixture) -> SavedAdapter:
    """The adapter to fold in: the one that was named, or the combination of several."""
    from lora_tune.adapter.combine import combined
    from lora_tune.adapter.load import read_adapter

    if len(job.folders) == 1:
        return read_adapter(job.folders[0])
    with activity(f"combining {len(job.folders)} adapters"):
        return combined(
            job.folders,
            job.source,
            weights=mixture.weights,
            method=mixture.method.value,
            density=mixture.density,
            seed=mixture.seed,
        )


def _merge(job: Job, mixture: Mixture, precision: Precision, *, max_kl: float) -> dict[str, Any]:
    """Measure, choose, write; returns what `merge.json` holds."""
    from lora_tune.adapter.folding import folds_of
    from lora_tune.adapter.load import read_adapter
    from lora_tune.model.fidelity import change_for, compare_candidates, distances
    from lora_tune.model.fold_writer import write_folded
    from lora_tune.model.streaming import quantized_names, sketch, stored_names

    saved = _adapter(job, mixture)
    model = sketch(job.source)
    names = stored_names(model, job.source)
    if names is None or saved.config.get("trainable_token_indices"):
        if len(job.folders) > 1:
            raise UsageError("several adapters of this base cannot be merged", "merge one of them")
        return _merge_whole(job, max_kl=max_kl)
    folds = folds_of(saved)
    with activity("measuring the merge, layer by layer"):
        found = compare_candidates(model, job.source, names, folds=folds, base=job.trained, rows=job.rows)
    kinds = {candidate.name: candidate for candidate in found.candidates}
    wanted = found.best().name if precision is Precision.auto else precision.value
    if wanted not in kinds:
        reason = "the adapter was trained on an unquantized base"
        raise UsageError(Problem(reason, "use --base-precision stored", key="--base-precision"))
    chosen = kinds[wanted]
    _refuse_far(job, chosen.divergence.kl, max_kl)
    stored_dtype = _stored_dtype(job.source)
    facts = {**_identity(job), "dtype": stored_dtype, "chosen": chosen.name, **_measured(found)}
    if len(job.folders) > 1:
        each = {folder.resolve().name: folds_of(read_adapter(folder)) for folder in job.folders}
        apart = distances(model, job.source, names, folds=folds, others=each, base=job.trained, rows=job.rows)
        facts |= {"combined": _mixture(job, mixture), "from_each": {name: asdict(one) for name, one in apart.items()}}
    quantized = quantized_names(model) if job.trained.quantize != "none" else frozenset()
    change = change_for(chosen.name, folds, job.trained, quantized)  # type: ignore[arg-type]  # of the two words
    with activity(f"writing {job.output}"), new_folder(job.output) as scratch:
        write_folded(job.source, scratch, names, change=change)
        _write_words(job, model, scratch, dtype=stored_dtype)
        _write_facts(scratch, facts)
    return facts


def _mixture(job: Job, mixture: Mixture) -> dict[str, Any]:
    weights = {folder.resolve().name: weight for folder, weight in zip(job.folders, mixture.weights, strict=True)}
    random = (
        {"density": mixture.density, "seed": mixture.seed}
        if "dare" in mixture.method or "ties" in mixture.method
        else {}
    )
    return {"method": mixture.method.value, "weights": weights, **random}


def _merge_whole(job: Job, *, max_kl: float) -> dict[str, Any]:
    """The same for bases that are not folded tensor by tensor, with all of it in memory, through PEFT."""
    from lora_tune.adapter.load import load_adapter
    from lora_tune.model.base import load_base
    from lora_tune.model.merging import divergence, merge_into, position_log_probs

    ids = [row.ids for row in job.rows]
    with activity("answering as trained"):
        as_trained = position_log_probs(load_adapter(load_base(job.source, job.trained), job.folders[0]), ids)
    dtype = _stored_dtype(job.source)
    stored = job.trained.model_copy(update={"quantize": "none", "compute_dtype": dtype})
    with activity("merging"):
        merged = merge_into(load_adapter(load_base(job.source, stored), job.folders[0]))
        measured = divergence(as_trained, position_log_probs(merged, ids))
    _refuse_far(job, measured.kl, max_kl)
    candidates = {"stored": {**asdict(measured), "loss": None}}
    facts = {**_identity(job), "dtype": dtype, "chosen": "stored", "loss_as_trained": None, "candidates": candidates}
    with activity(f"writing {job.output}"), new_folder(job.output) as scratch:
        job.chat.align(merged)
        merged.config._name_or_path = ""  # transformers would keep where the base lay
        with _no_progress_bars():
            merged.save_pretrained(scratch)
        _write_tokenizer(job, scratch)
        _write_facts(scratch, facts)
    return facts


def _measured(found: Comparison) -> dict[str, Any]:
    kinds = {one.name: {**asdict(one.divergence), "loss": one.loss} for one in found.candidates}
    again = found.requantized
    return {
        "loss_as_trained": found.loss_as_trained,
        "candidates": kinds,
        "requantized": {**asdict(again.divergence), "loss": again.loss} if again else None,
    }


def _refuse_far(job: Job, kl: float, max_kl: float) -> None:
    if kl > max_kl:
        reason = f"merged, it would answer {kl:.3g} nats (KL) from the adapter as trained, at most {max_kl:g}"
        raise CheckFailed(Problem(reason, "serve the adapter unmerged, or allow it with --max-kl", str(job.folders[0])))


def _vector_rows(folder: Path, source: BaseSource, chat: ChatTemplate) -> tuple[Row, ...]:
    """The prompts of the test vectors with their continuations; none of their tokens is an answer."""
    from lora_tune.adapter.vectors import vector_ids
    from lora_tune.model.fidelity import Row

    rows = source.config.get("vocab_size") or source.config.get("text_config", {}).get("vocab_size", 0)
    vocabulary = max(rows, len(chat.tokenizer))  # new tokens follow the base's own
    found = vector_ids(read_part(folder, VECTORS), vocabulary=vocabulary, where=str(folder / VECTORS))
    return tuple(Row(tuple(ids), (False,) * len(ids)) for ids in found)


def _given_rows(data: Path, chat: ChatTemplate) -> tuple[Row, ...]:
    """The rows of a data file, rendered as in training, with their answers marked. Raises: DataError, UsageError."""
    from lora_tune.data.chat_template import TokenRow
    from lora_tune.data.checking import read_conversations
    from lora_tune.model.fidelity import MOST_POSITIONS, Row
    from lora_tune.recipe import DataSource

    source = DataSource(source=str(data.resolve()), max_rows=64)
    conversations = read_conversations([source], hold_out=0, seed=0).train
    parts = [
        part for parts in chat.rows(conversations, loss_on="assistant") if isinstance(parts, list) for part in parts
    ]
    rows = [
        Row(tuple(map(int, part.input_ids)), tuple(map(bool, part.mask)))
        for part in parts
        if isinstance(part, TokenRow) and len(part.input_ids) <= MOST_POSITIONS
    ]
    if not rows:
        raise UsageError(
            Problem("holds no row that can be rendered", "name the held-out rows", str(data), key="--data")
        )
    return tuple(rows)


def _stored_dtype(source: BaseSource) -> str:
    """The dtype of the base's files."""
    stored = source.config.get("dtype") or source.config.get("torch_dtype")
    return stored if stored in ("bfloat16", "float16", "float32") else "float32"


def _identity(job: Job) -> dict[str, Any]:
    return {
        "adapter": " + ".join(folder.resolve().name for folder in job.folders),
        "adapter_sha256": job.manifest.files["adapter_model.safetensors"].sha256,
        "base": job.manifest.base.model_dump(mode="json"),
    }


def _chat(folder: Path) -> ChatTemplate:
    from lora_tune.data.chat_template import load_chat_template
    from lora_tune.model.tokenizer import read_tokenizer

    return load_chat_template(read_tokenizer(folder, name=folder.name))


def _write_words(job: Job, model: PreTrainedModel, folder: Path, *, dtype: str) -> None:
    """Configuration, generation settings, tokenizer and template; the end of an answer is that of training."""
    import torch

    job.chat.align(model)
    model.config._name_or_path = ""  # transformers would keep where the base lay
    model.config.dtype = getattr(torch, dtype)
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    _write_tokenizer(job, folder)


def _write_tokenizer(job: Job, folder: Path) -> None:
    from lora_tune.adapter.write import write_tokenizer

    write_tokenizer(folder, job.chat.tokenizer)


def _write_facts(folder: Path, facts: dict[str, Any]) -> None:
    (folder / "merge.json").write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(merge_card(facts), encoding="utf-8")


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

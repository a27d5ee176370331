"""One merge from checked folders to a model folder: measured against the adapter as trained, then written.

What the adapter answers as it was trained (on its quantized base) is compared with what it would answer folded into the
base as stored, and into what the 4-bit weights stand for; the nearest is taken, or refused. No step holds the whole
base in memory, but for bases whose files are arranged otherwise than the model, and for new tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tune.adapter.folder import MANIFEST, VECTORS, WEIGHTS, file_record, read_manifest, read_part
from lora_tune.adapter.merge_card import merge_card
from lora_tune.errors import CheckFailed, Problem, UsageError
from lora_tune.recipe import Base
from lora_tune.terminal import activity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_tune.data.chat_template import ChatTemplate
    from lora_tune.model.fidelity import Comparison, Row
    from lora_tune.model.methods import SavedAdapter
    from lora_tune.model.source import BaseSource

_OLDER_NAMES = ("rope_theta", "rope_scaling")


class Precision(StrEnum):
    """Which base the adapter is folded into."""

    auto = "auto"
    stored = "stored"
    dequantized = "dequantized"


class Method(StrEnum):
    """How several adapters become one."""

    linear = "linear"
    svd = "svd"
    ties = "ties"
    dare_linear = "dare_linear"
    dare_ties = "dare_ties"


@dataclass(frozen=True, slots=True)
class MergeJob:
    """One merge: the verified folders, their base as trained and where it lies, and the words to measure with."""

    folders: tuple[Path, ...]
    trained: Base
    source: BaseSource
    chat: ChatTemplate
    rows: tuple[Row, ...]

    @property
    def names(self) -> list[str]:
        """The folders' own names; of several that are called alike the later ones are numbered: x, x (2)."""
        found: list[str] = []
        for folder in self.folders:
            name, number = folder.resolve().name, 2
            while name in found:
                name, number = f"{folder.resolve().name} ({number})", number + 1
            found.append(name)
        return found


@dataclass(frozen=True, slots=True)
class Mixture:
    """How several adapters are combined before they are folded in."""

    method: Method
    weights: tuple[float, ...]
    density: float
    seed: int


def prepare_merge(
    folders: tuple[Path, ...], *, base_name: str | None, data: Path | None
) -> tuple[MergeJob, list[Problem]]:
    """Everything that is checked before a weight is read, with warnings. Raises: CheckFailed, UsageError, DataError."""
    from lora_tune.adapter.at_hand import held_for, words_of
    from lora_tune.adapter.verify import recorded_base, verify_folder
    from lora_tune.model.source import find_base

    problems: list[Problem] = []
    for folder in folders:
        trained = held_for(folder, base_name) if base_name else recorded_base(folder)
        with activity(f"verifying {folder}"):
            report = verify_folder(folder, base=trained, depth="quick")
        if report.errors:
            raise CheckFailed(report.errors)
        problems += report.problems
    first = folders[0]
    trained = held_for(first, base_name) if base_name else recorded_base(first)
    source = find_base(trained)
    chat = words_of(first, base=source.folder)
    if chat is None:
        raise CheckFailed(Problem("has no tokenizer, and neither has its base", "give another --base", str(first)))
    rows = _given_rows(data, chat) if data else _vector_rows(first, source, chat)
    return MergeJob(folders, trained, source, chat, rows), problems


def merge_folders(
    job: MergeJob, scratch: Path, *, mixture: Mixture, precision: Precision, max_kl: float
) -> dict[str, Any]:
    """Measure, choose, write into the empty folder `scratch`; returns what `merge.json` holds.

    Raises: CheckFailed beyond `max_kl`, UsageError for what cannot be merged.
    """
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
        return _merge_whole(job, scratch, max_kl=max_kl)
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
        each = {name: folds_of(read_adapter(folder)) for name, folder in zip(job.names, job.folders, strict=True)}
        apart = distances(model, job.source, names, folds=folds, others=each, base=job.trained, rows=job.rows)
        facts |= {"combined": _mixture(job, mixture), "from_each": {name: asdict(one) for name, one in apart.items()}}
    quantized = quantized_names(model) if job.trained.quantize != "none" else frozenset()
    change = change_for(chosen.name, folds, job.trained, quantized)  # type: ignore[arg-type]  # of the two words
    with activity("writing the merged model"):
        write_folded(job.source, scratch, names, change=change)
        _write_words(job, model, scratch, dtype=stored_dtype)
        _write_facts(scratch, facts)
    return facts


def _adapter(job: MergeJob, mixture: Mixture) -> SavedAdapter:
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


def _mixture(job: MergeJob, mixture: Mixture) -> dict[str, Any]:
    weights = dict(zip(job.names, mixture.weights, strict=True))
    random = (
        {"density": mixture.density, "seed": mixture.seed}
        if "dare" in mixture.method or "ties" in mixture.method
        else {}
    )
    return {"method": mixture.method.value, "weights": weights, **random}


def _merge_whole(job: MergeJob, scratch: Path, *, max_kl: float) -> dict[str, Any]:
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
    with activity("writing the merged model"):
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


def _refuse_far(job: MergeJob, kl: float, max_kl: float) -> None:
    if kl > max_kl:
        reason = f"merged, it would answer {kl:.3g} nats (KL) from the adapter as trained, at most {max_kl:g}"
        raise CheckFailed(Problem(reason, "serve the adapter unmerged, or allow it with --max-kl", str(job.folders[0])))


def _vector_rows(folder: Path, source: BaseSource, chat: ChatTemplate) -> tuple[Row, ...]:
    """The prompts of the test vectors with their continuations; none of their tokens is an answer.

    A stranger's folder has no vectors: there it is the same prompts alone.
    """
    from lora_tune.adapter.vectors import PROMPTS, vector_ids
    from lora_tune.data.conversation import Message
    from lora_tune.model.fidelity import Row

    if not (folder / MANIFEST).exists():
        prompts = [chat.prompt_ids((Message("user", prompt),)) for prompt in PROMPTS]
        return tuple(Row(tuple(ids), (False,) * len(ids)) for ids in prompts)
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


def _identity(job: MergeJob) -> dict[str, Any]:
    first = job.folders[0]
    base = {"name": job.source.name, "kind": job.source.kind, "revision": job.source.revision, "quantize": "none"}
    if (first / MANIFEST).exists():
        base = read_manifest(first).base.model_dump(mode="json")
    return {
        "adapter": " + ".join(job.names),
        "adapter_sha256": file_record(first / WEIGHTS).sha256,
        "base": base,
    }


def _write_words(job: MergeJob, model: PreTrainedModel, folder: Path, *, dtype: str) -> None:
    """Configuration, generation settings, tokenizer and template; the end of an answer is that of training."""
    import torch

    job.chat.align(model)
    model.config._name_or_path = ""  # transformers would keep where the base lay
    model.config.dtype = getattr(torch, dtype)
    model.config.save_pretrained(folder)
    _keep_older_names(folder, job.source.config)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    _write_tokenizer(job, folder)


def _keep_older_names(folder: Path, config: dict[str, Any]) -> None:
    """`rope_theta` and `rope_scaling` where the base has them: transformers 5 renames them, other readers do not."""
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {name: config[name] for name in _OLDER_NAMES if name in config and name not in written}
    if kept:
        (folder / "config.json").write_text(json.dumps(written | kept, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(job: MergeJob, folder: Path) -> None:
    from lora_tune.adapter.write import write_tokenizer

    write_tokenizer(folder, job.chat.tokenizer)


def _write_facts(folder: Path, facts: dict[str, Any]) -> None:
    (folder / "merge.json").write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(merge_card(facts), encoding="utf-8")


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

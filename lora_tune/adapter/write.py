"""Writing a finished run into its folder: adapter, tokenizer, template, recipe, ledger, vectors, card, manifest (last).

Nothing written here holds a path, a token, a host or a user: local sources are named by file name and content hash, the
base by hub id, `builtin:` or folder name, and values of secret environment variables are blacked out should a sample
answer or a ledger entry repeat one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from lora_tune import __version__
from lora_tune.adapter.card import Sample, model_card
from lora_tune.adapter.folder import (
    CONFIG,
    FILES,
    TEMPLATE,
    VECTORS,
    WEIGHTS,
    BaseRecord,
    ChatRecord,
    DataRecord,
    Manifest,
    ScoreRecord,
    TrainingRecord,
    begin_writing,
    unwritable,
    write_file,
    write_manifest,
)
from lora_tune.adapter.secrets import SECRET_LENGTH, SECRET_NAME
from lora_tune.model.source import BaseSource, base_fingerprint
from lora_tune.recipe import Recipe
from lora_tune.recipe_file import recipe_as_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_tune.data.chat_template import ChatTemplate
    from lora_tune.data.sources import SourceIdentity
    from lora_tune.model.methods import SavedAdapter

_LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "safetensors",
    "tokenizers",
    "triton",  # where it is, its kernels compute on a GPU: other roundings than PyTorch's
)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_TOKENIZER_KEYS = (
    "name_or_path", "_name_or_path", "_commit_hash", "auto_map", "backend", "cache_dir", "is_local", "local_files_only",
    "merges_file", "special_tokens_map_file", "token", "tokenizer_file", "use_auth_token", "vocab_file",
    "chat_template",
)  # fmt: skip
"""Keys of tokenizer_config.json that name files, code or accounts, or repeat chat_template.jinja."""


@dataclass(frozen=True)
class FinishedRun:
    """Everything that a run folder tells about a run; the values that were resolved at run time stand in the recipe."""

    recipe: Recipe
    source: BaseSource
    compute_dtype: str
    adapter: SavedAdapter
    chat: ChatTemplate
    identities: Sequence[SourceIdentity]
    ledger: Mapping[str, Any]
    """`Ledger.as_json()`."""
    training: TrainingRecord
    vectors: Mapping[str, Any]
    """`make_test_vectors(…)`."""
    scores: Mapping[str, ScoreRecord]
    samples: Sequence[Sample] = ()


def write_run(folder: Path, run: FinishedRun) -> Manifest:
    """Write all files of a finished run into its claimed folder; `metrics.jsonl` and `loss.png` are there already.

    Each file appears whole or not at all. The adapter's tensors and configuration come after all that belongs to them,
    so that no tool takes half a folder for an adapter; the manifest comes last and makes the folder count as finished.

    Raises: UsageError where the disk refuses, or the base's weights are gone.
    """
    begin_writing(folder)
    write_tokenizer(folder, run.chat.tokenizer)
    _write_text(folder, "recipe.yaml", stored_recipe(run.recipe, source=run.source, identities=run.identities))
    _write_json(folder, "ledger.json", dict(run.ledger))
    _write_json(folder, VECTORS, dict(run.vectors))
    manifest = _manifest(folder, run)
    card = model_card(
        manifest,
        name=folder.resolve().name,
        recipe=run.recipe,
        config=run.adapter.config,
        samples=run.samples,
        source=run.source,
    )
    _write_text(folder, "README.md", card)
    write_adapter(folder, run.adapter, source=run.source)
    return write_manifest(folder, manifest)


def write_adapter(folder: Path, adapter: SavedAdapter, *, source: BaseSource) -> None:
    """Write `adapter_model.safetensors`, then `adapter_config.json`, naming the base as it is recorded, not its path.

    Raises: UsageError where the disk refuses.
    """
    from safetensors.torch import save

    config = {**adapter.config, "base_model_name_or_path": source.name, "revision": source.revision}
    write_file(
        folder, WEIGHTS, save({name: tensor.contiguous() for name, tensor in adapter.tensors.items()}, {"format": "pt"})
    )
    _write_json(folder, CONFIG, config)


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the tokenizer's files without what names this machine, and the template as `chat_template.jinja`.

    Raises: UsageError where the disk refuses.
    """
    with _scratch_folder() as scratch:
        try:
            tokenizer.save_pretrained(scratch)
        except Exception as error:  # the tokenizers library has no class of its own for a disk that refuses
            number = _OS_ERROR.search(str(error))
            if number is None:
                raise
            raise unwritable(scratch, OSError(int(number[1]), os.strerror(int(number[1])))) from None
        for path in sorted(scratch.iterdir()):
            if path.name == "tokenizer_config.json":
                content = json.loads(path.read_text(encoding="utf-8"))
                if content.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name, unknown to version 4
                    content["tokenizer_class"] = "PreTrainedTokenizerFast"
                _write_json(folder, path.name, {key: content[key] for key in content if key not in _TOKENIZER_KEYS})
            elif path.name in FILES and path.name != TEMPLATE:
                write_file(folder, path.name, path.read_bytes())
    write_file(folder, TEMPLATE, template_text(tokenizer).encode())


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A temporary folder, gone afterwards where the disk allows it.

    `TemporaryDirectory` of Python 3.11 recurses without end where permission is denied.
    """
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template as one text; one that differs where tools are given becomes a branch of it."""
    plain = str(tokenizer.get_chat_template(None, None))
    with_tools = str(tokenizer.get_chat_template(None, [{}]))
    if plain == with_tools:
        return plain
    return f"{{%- if tools is defined and tools is not none -%}}{with_tools}{{%- else -%}}{plain}{{%- endif -%}}"


def stored_recipe(recipe: Recipe, *, source: BaseSource, identities: Sequence[SourceIdentity]) -> str:
    """The recipe as YAML without a path: what lay on this machine is named by file name, with its hash in the head."""
    changes: dict[str, Any] = {
        "base": recipe.base.model_copy(
            update={
                "name": source.name,
                "revision": source.revision if source.kind == "hub" else None,
                "chat_template": TEMPLATE if recipe.base.chat_template else None,
            }
        ),
        "data": tuple(
            entry.model_copy(
                update={
                    "source": _file_name(entry.source),
                    "prompts": entry.prompts and _file_name(entry.prompts),
                }
            )
            for entry in recipe.data
        ),
        "output": _file_name(str(Path(recipe.output).resolve())),
    }
    if isinstance(recipe.eval.hold_out, str):
        changes["eval"] = recipe.eval.model_copy(update={"hold_out": _file_name(recipe.eval.hold_out)})
    if recipe.lora.start_from:
        changes["lora"] = recipe.lora.model_copy(update={"start_from": _file_name(recipe.lora.start_from)})
    head = ["# The recipe as it ran. Local files are named without their folders; their contents were:"]
    for identity in identities:
        head.append(f"#   {_one_line(identity.name)}: sha256 {identity.sha256}, {identity.rows} rows")
    return "\n".join(head) + "\n" + recipe_as_yaml(recipe.model_copy(update=changes))


def _manifest(folder: Path, run: FinishedRun) -> Manifest:
    base = run.recipe.base
    origin = "file" if base.chat_template else "default" if run.chat.is_default else "base"
    return Manifest(
        tool=f"lora_tune {__version__}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files={},
        base=BaseRecord(
            name=run.source.name,
            kind=run.source.kind,
            revision=run.source.revision,
            fingerprint=base_fingerprint(run.source),
            quantize=base.quantize,
            double_quant=base.double_quant,
            compute_dtype=run.compute_dtype,  # type: ignore[arg-type]  # pydantic checks it
            attention=base.attention,
        ),
        chat=ChatRecord(
            template_sha256=_sha256(folder / TEMPLATE),
            origin=origin,  # type: ignore[arg-type]  # pydantic checks it
            eos_id=run.chat.eos_id,
            pad_id=run.chat.pad_id,
            stop_ids=tuple(run.chat.stop_ids),
        ),
        data=tuple(
            DataRecord(name=item.name, format=item.format, sha256=item.sha256, rows=item.rows, revision=item.revision)
            for item in run.identities
        ),
        libraries=library_versions(),
        seed=run.recipe.seed,
        ledger=json.loads(without_secrets(json.dumps(dict(run.ledger)))),
        training=run.training,
        scores=dict(run.scores),
    )


def library_versions() -> dict[str, str]:
    """The versions of the libraries that decide what an adapter becomes."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _file_name(source: str) -> str:
    """The last part of a local path; a hub id, a share or a `builtin:` name as it is."""
    path = PurePath(source)
    return path.name if path.is_absolute() else source


def _one_line(text: str) -> str:
    return " ".join(text.split())


def without_secrets(text: str) -> str:
    """The text with the values of secret environment variables blacked out."""
    secrets = {value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= SECRET_LENGTH}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "[secret]")
    return text


def _write_text(folder: Path, name: str, text: str) -> None:
    write_file(folder, name, without_secrets(text).encode())


def _write_json(folder: Path, name: str, content: Any) -> None:
    _write_text(folder, name, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _sha256(path: Path) -> str:
    from lora_tune.adapter.folder import file_record

    return file_record(path).sha256

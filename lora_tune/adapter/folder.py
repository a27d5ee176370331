"""The adapter folder: which files it may hold, its manifest, and who may write into it.

The run folder is the adapter folder. Everything in it is safetensors, JSON, YAML, Markdown or PNG; `manifest.json` is
written last and is the commit point: a folder without one holds an unfinished run. `adapters/README.md` describes the
format for other tools.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_tune.adapter.regular_file import read_json, read_json_object
from lora_tune.disk import FULL, disk_text, sync
from lora_tune.errors import CheckFailed, LoraTuneError, Problem, ResourceError, UsageError

FORMAT = 1
MANIFEST = "manifest.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TEMPLATE = "chat_template.jinja"
VECTORS = "test_vectors.json"
CHECKPOINTS = "checkpoints"
_MANIFEST_BYTES = 8 << 20
_JSON_BYTES = 64 << 20

FILES: dict[str, str] = {
    CONFIG: "PEFT's configuration of the adapter",
    WEIGHTS: "the adapter's tensors under PEFT's names",
    "tokenizer.json": "the tokenizer",
    "tokenizer_config.json": "the tokenizer's settings and special tokens",
    "special_tokens_map.json": "special tokens (older tokenizers)",
    "added_tokens.json": "added tokens (older tokenizers)",
    "tokenizer.model": "the SentencePiece model (older tokenizers)",
    "vocab.json": "the vocabulary (older tokenizers)",
    "vocab.txt": "the vocabulary (older tokenizers)",
    "merges.txt": "the merges (older tokenizers)",
    TEMPLATE: "the chat template that training used",
    "recipe.yaml": "the recipe that was run, with every value resolved",
    "ledger.json": "what became of every row and token that was read",
    VECTORS: "prompts with log-probabilities, to prove that base, template and adapter really loaded",
    "metrics.jsonl": "one line for each optimizer step",
    "loss.png": "the loss as a curve",
    "report.html": "the run as a page: scores, answers, curves, data, rows that stay hard, cost",
    "README.md": "the model card",
    MANIFEST: "hashes of all other files, identities of base and data, scores",
}
"""Every file that a run folder may hold, besides the sub-folder `checkpoints/`, which is never shared."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FileRecord(_Record):
    """One file of the folder."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]
    """Bytes."""


class BaseRecord(_Record):
    """The base model that the adapter belongs to, and how it was held in training."""

    name: str
    """Hub id, `builtin:<name>`, or the name (never the path) of a local folder."""
    kind: Literal["builtin", "local", "hub"]
    revision: str | None = None
    """Commit of a hub base."""
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """sha256 over names, dtypes, shapes and the ends of all tensors; independent of sharding."""
    quantize: Literal["nf4", "fp4", "int8", "none"]
    double_quant: bool = True
    compute_dtype: Literal["bfloat16", "float16", "float32"]
    attention: str = "auto"


class ChatRecord(_Record):
    """The chat template and the tokens that end an answer."""

    template_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    origin: Literal["base", "file", "default"]
    """Where the template comes from: the base, a file that the recipe names, or the documented default."""
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...]


class DataRecord(_Record):
    """One file or data set that rows were read from."""

    name: str
    """File name or hub id, never a path."""
    format: str
    sha256: str
    rows: int
    revision: str | None = None


class ReplanRecord(_Record):
    """A plan that changed in mid-training: a smaller micro-batch, or other steps for the time left."""

    step: int
    """From this step on; 0: before the first."""
    micro_batch_size: int | None = None
    accumulation: int | None = None
    reason: str = ""
    steps: int | None = None
    """Steps that fit into the budget by now."""
    step_s: float | None = None


class TrainingRecord(_Record):
    """What training did, with every value that was resolved at run time."""

    method: str
    steps: int
    epochs: float | None = None
    rows: int | None = None
    tokens: int | None = None
    """Tokens that went through the model, padding excluded."""
    trained_tokens: int | None = None
    """Tokens with a loss."""
    seconds: float | None = None
    final_loss: float | None = None
    batch_size: int
    micro_batch_size: int
    accumulation: int
    max_length: int
    learning_rate: float
    optimizer: str
    schedule: str
    gradient_checkpointing: int | str | None = None
    plan: str | None = None
    """Why micro-batch, recomputed layers and optimizer were chosen, as it was printed."""
    trainable_parameters: int | None = None
    peak_gib: float | None = None
    budget: str | None = None
    """The time that the training was given."""
    replans: tuple[ReplanRecord, ...] = ()
    """Plans that changed; `micro_batch_size` and `accumulation` are those of the last step."""
    device: str | None = None
    """Kind of device, such as `cpu` or `NVIDIA L4`; never a host name."""

    def because(self, reason: str) -> TrainingRecord:
        """The same record with the reason of its plan."""
        return self.model_copy(update={"plan": reason or None})


class ScoreRecord(_Record):
    """One metric of base and adapter on the same held-out rows."""

    base: float
    adapter: float
    low: float
    """Lower end of the 95 % paired bootstrap interval of adapter - base."""
    high: float
    rows: int
    p_value: float | None = None
    """Of a paired two-sided test of "no difference"; folders written before version 0.3 have none."""
    direction: Literal["higher", "lower"] | None = None
    """Which way is better."""


class Manifest(_Record):
    """`manifest.json`, format 1."""

    format: Literal[1] = 1
    tool: str
    """Name and version of the writer."""
    created: str
    """UTC, ISO 8601."""
    files: dict[str, FileRecord]
    base: BaseRecord
    chat: ChatRecord
    data: tuple[DataRecord, ...]
    libraries: dict[str, str]
    seed: int
    ledger: dict[str, Any]
    training: TrainingRecord
    scores: dict[str, ScoreRecord] = {}


def file_record(path: Path) -> FileRecord:
    """The sha256 and the size in bytes of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileRecord(sha256=digest, size=path.stat().st_size)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished run.

    Raises: CheckFailed where there is none, or it is not a manifest of this format; UsageError without the folder.
    """
    require_folder(folder)
    path = folder / MANIFEST
    if not path.is_symlink() and not path.exists():
        raise CheckFailed(
            Problem("no manifest: the run is not finished, or another tool wrote this folder", file=str(path))
        )
    content = read_json_object(path, max_bytes=_MANIFEST_BYTES)
    if content.get("format") != FORMAT:
        fix = "install a newer lora_tune"
        raise CheckFailed(
            Problem(f"manifest format {FORMAT} is read here, got {content.get('format')!r}"[:200], fix, str(path))
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise CheckFailed(
            [
                Problem(issue["msg"], "write the folder again", str(path), key=".".join(map(str, issue["loc"])))
                for issue in error.errors()
            ]
        ) from None


def require_folder(folder: Path) -> None:
    """Raises: UsageError where there is no such folder."""
    if not folder.is_dir():
        raise UsageError(Problem("is no folder", "give the folder that holds adapter_config.json", str(folder)))


def damaged_files(folder: Path) -> list[str]:
    """The files that are missing or other than the manifest says, or the manifest itself where it is none.

    A card that somebody has edited is not damaged.
    """
    try:
        manifest = read_manifest(folder)
    except CheckFailed:
        return [MANIFEST]
    wrong = []
    for name, record in manifest.files.items():
        try:
            if file_record(folder / name) != record and name != "README.md":
                wrong.append(name)
        except OSError:
            wrong.append(name)
    return wrong


def read_part(folder: Path, name: str) -> Any:
    """The content of one of the folder's JSON files, such as `ledger.json`. Raises: CheckFailed."""
    return read_json(folder / name, max_bytes=_JSON_BYTES)


def write_file(folder: Path, name: str, data: bytes) -> Path:
    """Write one documented file under a temporary name, flush it to the disk, then rename it.

    Raises: UsageError where the disk refuses, ResourceError where it is full.
    """
    if name not in FILES and not name.startswith("example"):
        raise ValueError(f"{name} is no file of an adapter folder")
    target, temporary = folder / name, folder / f".{name}.tmp"
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise unwritable(target, error) from None
    return target


def write_json(folder: Path, name: str, content: Any) -> Path:
    """Write one documented JSON file; numbers must be finite. Raises: UsageError where the disk refuses."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    return write_file(folder, name, (text + "\n").encode())


def begin_writing(folder: Path) -> None:
    """Take the manifest away before other files change: half a folder never counts as finished.

    Raises: UsageError, ResourceError.
    """
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        sync(folder)
    except OSError as error:
        raise unwritable(folder, error) from None


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every documented file that is there and write the manifest: from now on the run counts as finished.

    `manifest.files` is filled in here. All that it vouches for is on the disk before it is, so that no power cut
    leaves a manifest without its files. Returns the manifest as written. Raises: UsageError, ResourceError.
    """
    present = sorted(name for name in FILES if name != MANIFEST and (folder / name).is_file())
    try:
        for path in (*(folder / name for name in present), folder):
            sync(path)
    except OSError as error:
        raise unwritable(folder, error) from None
    complete = manifest.model_copy(update={"files": {name: file_record(folder / name) for name in present}})
    write_json(folder, MANIFEST, complete.model_dump(mode="json"))
    with suppress(OSError):  # every file is on the disk; the name of the last one will follow
        sync(folder)
    return complete


def unwritable(path: Path, error: OSError) -> LoraTuneError:
    """What to say where the disk refuses a file or folder: a full disk is exit 4, everything else exit 2."""
    if error.errno in FULL:
        reason = f"cannot be written: {disk_text(error, path)}"
        return ResourceError(Problem(reason, "make room; a run goes on with --resume", str(path), key="output"))
    return UsageError(Problem(f"cannot be written: {error.strerror}", "choose another output", str(path), key="output"))

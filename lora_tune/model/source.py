"""Where a base comes from, and whether it can be trained: found and checked without reading a weight (cold)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_tune.errors import Problem, UsageError
from lora_tune.model import base_fit, hub
from lora_tune.model.base_config import check_kind, check_stored_quantization, check_trust, read_config, stored_bits
from lora_tune.model.weights import fingerprint, tensor_infos
from lora_tune.recipe import Base, Lora, Train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BUILTIN = "builtin:"
_BUILTIN_ROOT = Path(__file__).resolve().parent.parent / "builtin"


@dataclass(frozen=True)
class BaseSource:
    """A base that was found: its folder on this machine and how it is recorded elsewhere.

    `name` is what adapters record: the hub id, `builtin:NAME`, or the folder's own name, never a path. `folder` holds
    config.json and the tokenizer (hub: the snapshot folder in the cache, without weights until `load_base`).
    `revision` is the commit of a hub base. `config` is config.json. `quantize` is how the recipe holds the weights.
    """

    name: str
    kind: Literal["builtin", "local", "hub"]
    folder: Path
    revision: str | None
    config: dict[str, Any]
    quantize: str = "nf4"

    @property
    def quantization(self) -> dict[str, Any] | None:
        """`quantization_config` of a base that is stored quantized (bitsandbytes 4 or 8 bit), else None."""
        return self.config.get("quantization_config")

    @property
    def experts(self) -> int:
        """Number of experts of a mixture of experts, 0 for a dense model."""
        counts = (self.config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
        return next((count for count in counts if isinstance(count, int)), 0)


def find_base(base: Base, *, trust_remote_code: str | None = None) -> BaseSource:
    """Find the base of a recipe; of a hub base config and tokenizer are downloaded, not the weights.

    `trust_remote_code` is the repository (or folder name) given on the command line, whose own Python code may run.

    Raises:
        UsageError: not found, no access, no causal language model, or stored in a way that LoRA cannot train on.
    """
    if base.name.startswith(_BUILTIN):
        source = _builtin(base)
    elif _is_path(base.name):
        source = _local(base)
    else:
        files = (*hub.CONFIG_FILES, *hub.TOKENIZER_FILES, *(hub.CODE_FILES if trust_remote_code == base.name else ()))
        folder, commit = hub.download(base.name, revision=base.revision, patterns=files)
        source = BaseSource(base.name, "hub", folder, commit, read_config(folder, base.name), base.quantize)
    check_trust(source.name, trust_remote_code)
    check_kind(source.config, source.name, code="trusted" if trust_remote_code else "refused")
    check_stored_quantization(source.config, source.name, quantize=base.quantize)
    return source


def find_config(base: Base) -> BaseSource:
    """Find the base for a plan: of a hub base config.json and the index of its weights, from the cache or downloaded.

    Where the cache has it, the hub is not asked. Whether the weights are stored in a way that can be trained is
    checked as `find_base` does.

    Raises:
        UsageError: not found, no access, no causal language model, or stored in a way that LoRA cannot train on.
    """
    if base.name.startswith(_BUILTIN) or _is_path(base.name):
        source = _builtin(base) if base.name.startswith(_BUILTIN) else _local(base)
    else:
        folder = hub.cached(base.name, revision=base.revision)
        if folder is None:
            folder, _ = hub.download(base.name, revision=base.revision, patterns=hub.PLAN_FILES)
        config = read_config(folder, base.name)
        source = BaseSource(base.name, "hub", folder, hub.commit_of(folder), config, base.quantize)
    check_kind(source.config, source.name, code="trusted")  # a plan runs no code of the base
    check_stored_quantization(source.config, source.name, quantize=base.quantize)
    return source


def stored_bytes(source: BaseSource) -> int | None:
    """Bytes of the base's weights as its index (`model.safetensors.index.json`) says; None without one."""
    try:
        index = json.loads((source.folder / "model.safetensors.index.json").read_bytes())
        size = index["metadata"]["total_size"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return int(size) if isinstance(size, (int, float)) and not isinstance(size, bool) and 0 < size < 1e15 else None


def _is_path(name: str) -> bool:
    path = Path(name)
    return path.is_absolute() or name.startswith((".", "~")) or path.is_dir() or not hub.is_repository_id(name)


def _builtin(base: Base) -> BaseSource:
    wanted = base.name.removeprefix(_BUILTIN)
    known = sorted(path.parent.name for path in _BUILTIN_ROOT.glob("*/config.json"))
    if wanted not in known:
        names = ", ".join(_BUILTIN + name for name in known) or "none"
        raise UsageError(f"no built-in base of that name, got {base.name!r}", f"there are: {names}")
    _refuse_revision(base)
    folder = _BUILTIN_ROOT / wanted
    return BaseSource(base.name, "builtin", folder, None, read_config(folder, base.name), base.quantize)


def _local(base: Base) -> BaseSource:
    folder = Path(base.name).expanduser().resolve()
    if not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "no such folder"
        raise UsageError(f"base: {what}, got {base.name!r}", "name a folder with config.json, or a hub id (owner/name)")
    _refuse_revision(base)
    config = read_config(folder, base.name)
    name = hub.repository_of(folder) or folder.name
    return BaseSource(name, "local", folder, hub.commit_of(folder), config, base.quantize)


def _refuse_revision(base: Base) -> None:
    if base.revision is not None:
        raise UsageError(
            f"base.revision: only a hub base has revisions, got {base.revision!r} for {base.name!r}", "leave it out"
        )


def check_against_base(source: BaseSource, *, lora: Lora, train: Train) -> list[Problem]:
    """Everything about the adapter that does not fit this base, before a weight is read; errors, warnings and notes.

    Names are checked against the headers of the weights: of a hub base that was never loaded here they are not known,
    and `attach` refuses what matches nothing.
    """
    stored = f"{stored_bits(source.config)} bit" if source.quantization is not None else None
    problems = base_fit.combination_problems(lora, quantize=source.quantize, stored=stored)
    infos = tensor_infos(source.folder)
    if infos:
        problems += base_fit.layer_problems(lora, infos, quantize=source.quantize, experts=source.experts)
    elif source.kind != "hub":
        reason = f"{source.name!r} has no safetensors weights (model.safetensors)"
        problems.append(Problem(reason, "pickled weights (.bin) are not read: convert them", key="base.name"))
    problems += base_fit.length_problems(source.config, train)
    problems += base_fit.layer_count_problems(source.config, train)
    return problems + base_fit.expert_notes(lora, experts=source.experts, quantize=source.quantize)


def base_fingerprint(source: BaseSource) -> str:
    """SHA-256 of the base's weights (names, dtypes, shapes, both ends of each tensor), whatever the sharding.

    Raises:
        UsageError: the weights are not there (a hub base before `load_base`) or damaged.
    """
    return fingerprint(source.folder)


def load_tokenizer(
    source: BaseSource, *, new_tokens: Sequence[str] = (), trust_remote_code: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of the base with `new_tokens` added; never one that has lost its vocabulary.

    Raises:
        UsageError: missing, damaged, a Git LFS pointer, or more tokens than the base has embeddings.
        RecipeError: a new token is there already.
    """
    from lora_tune.model.tokenizer import read_tokenizer

    code = "trusted" if trust_remote_code == source.name else "refused"
    tokenizer = read_tokenizer(source.folder, name=source.name, new_tokens=new_tokens, code=code)
    rows = source.config.get("vocab_size")
    if isinstance(rows, int) and len(tokenizer) - len(new_tokens) > rows:
        raise UsageError(
            f"base {source.name!r}: its tokenizer has {len(tokenizer)} tokens, but the base only {rows} embeddings",
            "take tokenizer and weights from the same repository",
        )
    return tokenizer

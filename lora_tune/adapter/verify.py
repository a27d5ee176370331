"""Is this adapter folder what it says it is? Quick: files, hashes, tensors, base, without torch. Full: its vectors.

The quick checks are the table in `checks.py`. The full depth loads the base as the manifest says, puts the adapter on
it through the one loader and replays the test vectors in this process.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_tune.adapter import tensor_file
from lora_tune.adapter.checks import Subject, run_checks
from lora_tune.adapter.compat import Traits, traits_of
from lora_tune.adapter.expected_keys import PREFIX, module_shapes
from lora_tune.adapter.folder import (
    MANIFEST,
    VECTORS,
    WEIGHTS,
    Manifest,
    read_manifest,
    read_part,
    require_folder,
)
from lora_tune.adapter.words import differs
from lora_tune.errors import CheckFailed, LoraTuneError, Problem
from lora_tune.model import hub
from lora_tune.model.source import BaseSource, base_fingerprint, find_base
from lora_tune.model.weights import tensor_infos, weight_files
from lora_tune.recipe import Base

Depth = Literal["quick", "full"]
_UPDATED = re.compile(re.escape(PREFIX) + r"(?P<module>[A-Za-z0-9_.]+)\.lora_(A\.weight|embedding_A)$")


@dataclass(frozen=True)
class VerifyReport:
    """What was found: `problems` in order, `facts` for people and for `--json`."""

    problems: tuple[Problem, ...]
    facts: Mapping[str, Any]
    subject: Subject
    """The folder as the checks have read it."""

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems for which the folder is refused."""
        return tuple(problem for problem in self.problems if problem.severity == "error")


def verify_folder(
    folder: Path, *, base: Base | None = None, depth: Depth = "full", trust_remote_code: str | None = None
) -> VerifyReport:
    """Check an adapter folder; `base` is the base at hand, by default the one that the manifest names.

    `trust_remote_code` is the repository named on the command line whose own Python code may run.
    A local base is found only by `base`: a manifest holds no paths, and what `adapter_config.json` names is never
    followed.

    Raises: UsageError where `base` is given but cannot be found or loaded.
    """
    subject = Subject(folder)
    source, problems = _find(folder, base, depth=depth, trusted=trust_remote_code)
    if source is not None:
        _describe_base(subject, source)
    problems += run_checks(subject)
    facts = _facts(subject)
    if depth == "full" and not any(problem.severity == "error" for problem in problems):
        if source is None:
            problems.append(
                Problem("its base is not at hand", "give it with --base, or verify with --quick", str(folder))
            )
        else:
            section = base or _recorded_base(subject.manifest)
            problems += _replay(subject, source, section, facts, trusted=trust_remote_code)
    return VerifyReport(tuple(problems), facts, subject)


def base_of(manifest: Manifest, *, name: str | None = None, quantize: str | None = None) -> Base:
    """The base of a manifest as a section of a recipe: held as in training unless `quantize` says otherwise.

    `name` is where it lies on this machine, for a local base.
    """
    record = manifest.base
    is_on_hub = record.kind == "hub" and name in (None, record.name)
    settings = {
        "name": name or record.name,
        "revision": record.revision if is_on_hub else None,
        "quantize": quantize or record.quantize,
        "double_quant": record.double_quant,
        "compute_dtype": record.compute_dtype,
        "attention": record.attention,
    }
    return Base.model_validate(settings)


def recorded_base(folder: Path, *, name: str | None = None) -> Base:
    """The base that a folder's manifest names, or the one called `name` held in the same way.

    Raises: CheckFailed without a manifest, or where the base is a local folder and `name` is not given; UsageError
    without the folder.
    """
    require_folder(folder)
    if not (folder / MANIFEST).exists():
        raise CheckFailed(Problem("has no manifest, which would name its base", "give it with --base", str(folder)))
    manifest = read_manifest(folder)
    if name is None and not _is_findable(manifest):
        reason = f"its base is the local folder {manifest.base.name!r}"
        raise CheckFailed(Problem(reason, "say where it lies with --base", str(folder)))
    return base_of(manifest, name=name)


def _find(
    folder: Path, base: Base | None, *, depth: Depth, trusted: str | None
) -> tuple[BaseSource | None, list[Problem]]:
    """The base at hand. Without `base`, a quick look takes only a built-in one: it makes no connections."""
    if base is not None:
        return find_base(base, trust_remote_code=trusted), []
    try:
        manifest = read_manifest(folder)
    except CheckFailed:
        return None, []  # the checks say it with its reason
    if not _is_findable(manifest) or (depth == "quick" and manifest.base.kind != "builtin"):
        return None, []
    try:
        return find_base(base_of(manifest), trust_remote_code=trusted), []
    except LoraTuneError as error:
        return None, list(error.problems)


def _is_findable(manifest: Manifest) -> bool:
    name = manifest.base.name
    if manifest.base.kind == "builtin":
        return name.startswith("builtin:")
    return manifest.base.kind == "hub" and hub.is_repository_id(name)


def _recorded_base(manifest: Manifest | None) -> Base:
    if manifest is None:
        raise CheckFailed("a base was found without a manifest")
    return base_of(manifest)


def _describe_base(subject: Subject, source: BaseSource) -> None:
    """Shapes and fingerprint of the base, as far as its weights are on this machine."""
    subject.base_name, subject.base_folder = source.name, source.folder
    subject.architecture = source.config.get("model_type")
    if weight_files(source.folder):
        infos = tensor_infos(source.folder)
        subject.shapes = module_shapes({name: info.shape for name, info in infos.items()}, config=source.config)
        subject.base_fingerprint = base_fingerprint(source)


def _facts(subject: Subject) -> dict[str, Any]:
    """What a checked folder is, as far as the checks came."""
    facts: dict[str, Any] = {"folder": subject.folder.name}
    if subject.settings is not None and subject.header:
        settings = subject.settings
        facts |= {
            "method": "dora" if settings.dora else "rslora" if settings.rslora else "lora",
            "rank": settings.rank,
            "alpha": settings.alpha,
            "targets": settings.targets,
            "parameters": tensor_file.parameters(subject.header),
            "dtype": sorted({entry.dtype for entry in subject.header.values()}),
            "bytes": (subject.folder / WEIGHTS).stat().st_size,
            "base": settings.base_name,
        }
    if subject.manifest is not None:
        facts["base"] = subject.manifest.base.model_dump(mode="json")
        facts["scores"] = {name: score.model_dump(mode="json") for name, score in subject.manifest.scores.items()}
        facts["files"] = len(subject.manifest.files)
    return facts


def engine_traits(subject: Subject) -> Traits:
    """What engines differ in, of a folder that passed the checks; what its base would tell stays open without it."""
    manifest, settings = subject.manifest, subject.known_settings()
    if manifest is not None:
        own_template: bool | None = manifest.chat.origin != "base"
    else:
        own_template = differs(subject.folder, subject.base_folder) if subject.base_folder else None
    modules = {match["module"] for key in subject.header if (match := _UPDATED.match(key))}
    return traits_of(
        settings,
        tuple(sorted(modules)),
        quantize=manifest.base.quantize if manifest else None,
        own_template=own_template,
        architecture=subject.architecture,
    )


def _replay(
    subject: Subject, source: BaseSource, base: Base, facts: dict[str, Any], *, trusted: str | None
) -> list[Problem]:
    """Load base and adapter as in training and replay the vectors."""
    import torch

    from lora_tune.adapter.load import load_adapter
    from lora_tune.adapter.vectors import precision, replay
    from lora_tune.data.chat_template import load_chat_template
    from lora_tune.model.base import compute_dtype, load_base
    from lora_tune.model.tokenizer import read_tokenizer

    vectors_file = subject.folder / VECTORS
    if subject.manifest is None or VECTORS not in subject.manifest.files:
        reason = "no test vectors: it cannot be shown that the adapter works as trained"
        return [Problem(reason, "", str(vectors_file), severity="warning")]
    model = load_base(source, base, trust_remote_code=trusted)
    if subject.base_fingerprint is None:  # a hub base whose weights have come only now
        _describe_base(subject, source)
        if subject.base_fingerprint != subject.manifest.base.fingerprint:
            reason = f"belongs to a base with fingerprint {subject.manifest.base.fingerprint[:12]}"
            got = str(subject.base_fingerprint)[:12]
            return [
                Problem(
                    f"{reason}, got {got}", "give the base that it was trained on", subject.at(MANIFEST), key="base"
                )
            ]
    wrapped = load_adapter(model, subject.folder)
    chat = load_chat_template(read_tokenizer(subject.folder, name=subject.folder.name))
    dtype = str(compute_dtype(base)).removeprefix("torch.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    here = precision(device=device, compute_dtype=dtype, quantize=base.quantize)
    found = replay(wrapped, chat, read_part(subject.folder, VECTORS), here=here, where=str(vectors_file))
    measured = {"base": found.base, "adapter": found.adapter, "effect": found.effect, "scale": found.scale}
    finite = {name: round(value, 9) for name, value in measured.items() if abs(value) < float("inf")}
    facts["replay"] = {"precision": here, "tolerance": found.tolerance, **finite}
    return list(found.problems)

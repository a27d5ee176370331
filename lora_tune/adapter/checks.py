"""What an adapter folder must satisfy before anything of it is loaded: a table of small checks in stages. No torch.

Each check takes the `Subject` and yields problems; a stage that finds errors ends the row, because the next one builds
on it. A new check is one function and one line in `STAGES`. PEFT verifies nothing: it loads, or hangs on, most of what
is refused here, without a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_tune.adapter import expected_keys as keys
from lora_tune.adapter.folder import (
    CHECKPOINTS,
    CONFIG,
    FILES,
    MANIFEST,
    TEMPLATE,
    WEIGHTS,
    Manifest,
    file_record,
    read_manifest,
    require_folder,
)
from lora_tune.adapter.lora_config import LoraSettings, check_config, read_settings
from lora_tune.adapter.regular_file import read_json_object, regular_file
from lora_tune.adapter.target_pattern import pattern_problem
from lora_tune.adapter.tensor_file import TensorEntry, read_header, worst_value
from lora_tune.adapter.words import check_tokenizer, differs
from lora_tune.errors import CheckFailed, Problem

CONFIG_BYTES = 1 << 20
MOST_VALUE = 1e5  # of any number in the file; trained ones stay below 1000
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".msgpack", ".h5")
_TRAINERS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")
_OTHER_KINDS = {"adapters.safetensors": "mlx-lm", "pytorch_adapter.bin": "AdapterHub"}
_SHOWN = 5  # tensors that are named where many are wrong


@dataclass(slots=True)
class Subject:
    """A folder under check: what is known of it so far, and of the base where it is at hand."""

    folder: Path
    shapes: keys.Shapes | None = None
    """The base's parameters by their names in the loaded model; None where the base is not at hand."""
    base_name: str | None = None
    base_fingerprint: str | None = None
    """sha256 of the base at hand."""
    base_folder: Path | None = None
    architecture: str | None = None
    """The base's `model_type`."""
    content: dict[str, Any] = field(default_factory=dict)
    header: dict[str, TensorEntry] = field(default_factory=dict)
    settings: LoraSettings | None = None
    manifest: Manifest | None = None

    def at(self, name: str) -> str:
        """Where a file of the folder stands, for messages."""
        return str(self.folder / name)

    def known_settings(self) -> LoraSettings:
        """The settings, once the configuration has passed."""
        if self.settings is None:
            self.settings = read_settings(self.content)
        return self.settings


Check = Callable[[Subject], Iterator[Problem]]


def run_checks(subject: Subject) -> list[Problem]:
    """All problems up to and including the first stage with an error; the subject is filled in on the way.

    Raises: UsageError where there is no such folder.
    """
    require_folder(subject.folder)
    problems: list[Problem] = []
    for stage in STAGES:
        for check in stage:
            try:
                problems += check(subject)
            except CheckFailed as error:
                problems += error.problems
        if any(problem.severity == "error" for problem in problems):
            break
    return problems


# ----- files -----
def _no_other_kinds(subject: Subject) -> Iterator[Problem]:
    """Folders of other libraries that are told by a file's name."""
    if (subject.folder / WEIGHTS).exists():
        return
    for name, library in _OTHER_KINDS.items():
        if (subject.folder / name).exists():
            yield Problem(f"not supported: an adapter of {library}", "use one in PEFT's format", subject.at(name))


def _regular_files(subject: Subject) -> Iterator[Problem]:
    for entry in sorted(subject.folder.iterdir()):
        if entry.is_symlink() or (entry.name in FILES and entry.is_dir()):
            try:
                regular_file(entry)
            except CheckFailed as error:
                yield from error.problems
    for name in (CONFIG, WEIGHTS):
        path = subject.folder / name
        if not path.is_symlink() and not path.is_dir():
            try:
                regular_file(path)
            except CheckFailed as error:
                yield from error.problems


def _no_pickles(subject: Subject) -> Iterator[Problem]:
    for entry in sorted(subject.folder.iterdir()):
        if entry.suffix.lower() not in _PICKLES:
            continue
        if entry.name in _TRAINERS and (subject.folder / WEIGHTS).exists():
            yield Problem("is a pickle of a trainer; it is never opened", "delete it", str(entry), severity="warning")
        else:
            yield Problem(
                "not supported: a pickle can run code; it is never opened", "convert it to safetensors", str(entry)
            )


def _no_unknown_files(subject: Subject) -> Iterator[Problem]:
    """Only in folders of our own: those of others hold what they like."""
    if not (subject.folder / MANIFEST).exists():
        return
    for entry in sorted(subject.folder.iterdir()):
        if entry.name not in FILES and entry.name != CHECKPOINTS and entry.suffix.lower() not in _PICKLES:
            yield Problem("is not part of an adapter folder", "move it elsewhere", str(entry), severity="warning")


# ----- configuration and manifest -----
def _config_fields(subject: Subject) -> Iterator[Problem]:
    subject.content = read_json_object(subject.folder / CONFIG, max_bytes=CONFIG_BYTES)
    for problem in check_config(subject.content):
        found = _pattern_problem(subject) if problem.key == "target_modules" else None
        if found is not None:
            yield found
            continue
        yield Problem(problem.reason, problem.fix or "use an adapter without it", subject.at(CONFIG), key=problem.key)


def _pattern_problem(subject: Subject) -> Problem | None:
    """For a regular expression as targets: the list of modules that it would match, of the base or of the tensors."""
    pattern = subject.content.get("target_modules")
    if not isinstance(pattern, str) or not pattern:
        return None
    return pattern_problem(pattern, _modules_at_hand(subject), where=subject.at(CONFIG))


def _modules_at_hand(subject: Subject) -> list[str]:
    """The base's matrices where it is at hand, else the modules that the adapter's own tensors name."""
    if subject.shapes is not None:
        return sorted(name.removesuffix(".weight") for name, shape in subject.shapes.items() if len(shape) == 2)
    try:
        regular_file(subject.folder / WEIGHTS)
        header = read_header(subject.folder / WEIGHTS)
    except CheckFailed:
        return []  # a later run of the checks says what is wrong with it
    return sorted({key.removeprefix(keys.PREFIX).rpartition(".lora_")[0] for key in header if ".lora_" in key})


def _manifest(subject: Subject) -> Iterator[Problem]:
    path = subject.folder / MANIFEST
    if not path.exists() and not path.is_symlink():
        yield Problem(
            "no manifest: hashes, base fingerprint and test vectors cannot be checked",
            "",
            subject.at(MANIFEST),
            severity="note",
        )
        return
    subject.manifest = manifest = read_manifest(subject.folder)
    for name in (CONFIG, WEIGHTS):
        if name not in manifest.files:
            yield Problem(f"{name} is not in the manifest", "write the folder again", str(path), key="files")
    for name in sorted(FILES):
        if name not in manifest.files and name != MANIFEST and (subject.folder / name).exists():
            yield Problem("is not in the manifest: somebody added it", "delete it", subject.at(name))


def _hashes(subject: Subject) -> Iterator[Problem]:
    for name, record in (subject.manifest.files if subject.manifest else {}).items():
        path = subject.folder / name
        if name not in FILES or name == MANIFEST:
            yield Problem(
                "the manifest names a file that is none of an adapter folder",
                "write the folder again",
                subject.at(name[:80]),
            )
        elif not path.exists():
            yield Problem("is in the manifest, but not in the folder", "copy the whole folder again", str(path))
        elif regular_file(path) != record.size or file_record(path) != record:
            yield Problem("differs from its hash in the manifest: damaged or edited", "copy the file again", str(path))


# ----- tensors -----
def _header(subject: Subject) -> Iterator[Problem]:
    subject.header = read_header(subject.folder / WEIGHTS)
    if not subject.header:
        yield Problem("holds no tensors", "copy the file again", subject.at(WEIGHTS))


def _tensor_names(subject: Subject) -> Iterator[Problem]:
    """Exactly the keys and shapes that configuration and base imply: any other may overwrite the base's tensors."""
    where, header, settings = subject.at(WEIGHTS), subject.header, subject.known_settings()
    if experts := keys.expert_keys(header):
        reason = f"not supported: {len(experts)} tensors on single experts, which are one tensor in memory"
        yield Problem(f"{reason}: {_list(experts)}", "use an adapter of the attention layers", where)
        return
    if subject.shapes is None:
        yield from _tensor_pairs(subject)
        return
    for key, name in keys.unmatched_names(settings, subject.shapes):
        yield Problem(f"the base has no module {name!r}", "give the base of this adapter", subject.at(CONFIG), key=key)
    expected = keys.expected_keys(settings, subject.shapes)
    optional = keys.optional_modules(expected)
    if not any(key in header for key in optional):
        expected = {key: shape for key, shape in expected.items() if key not in optional}
    missing, extra = sorted(expected.keys() - header.keys()), sorted(header.keys() - expected.keys())
    if missing:
        yield Problem(
            f"{len(missing)} of {len(expected)} tensors are missing: {_list(missing)}",
            "give the base of this adapter, whole",
            where,
        )
    if extra:
        yield Problem(
            f"{len(extra)} tensors that configuration and base do not imply: {_list(extra)}", "do not use it", where
        )
    yield from _wrong_shapes({key: expected[key] for key in expected.keys() & header.keys()}, subject)


def _wrong_shapes(expected: keys.Shapes, subject: Subject) -> Iterator[Problem]:
    wrong = [key for key in sorted(expected) if subject.header[key].shape != tuple(expected[key])]
    for key in wrong[:1]:
        reason = (
            f"{len(wrong)} tensors have another shape than rank and base imply: {key} must be {list(expected[key])}"
        )
        got = list(subject.header[key].shape)
        yield Problem(
            f"{reason}, got {got}", "give the base and the configuration of this adapter", subject.at(WEIGHTS)
        )


def _tensor_pairs(subject: Subject) -> Iterator[Problem]:
    """Without the base at hand: A and B in pairs, of the rank that the configuration says, on target modules only."""
    settings, header, odd = subject.known_settings(), subject.header, []
    for key, entry in header.items():
        match = re.fullmatch(re.escape(keys.PREFIX) + r"([A-Za-z0-9_.]+)\.lora_([AB])\.weight", key)
        if match is None:
            if not _is_other_key(settings, key):
                odd.append(key)
            continue
        module, matrix = match.groups()
        other = header.get(f"{keys.PREFIX}{module}.lora_{'B' if matrix == 'A' else 'A'}.weight")
        rank = settings.rank_of(module)
        is_pair = other is not None and len(entry.shape) == 2 and entry.shape["AB".index(matrix)] == rank
        if not is_pair or not keys.is_target(settings, module):
            odd.append(key)
    if odd:
        reason = f"{len(odd)} of {len(header)} tensors do not fit to the configuration: {_list(sorted(odd))}"
        yield Problem(reason, "do not use it", subject.at(WEIGHTS))
    if not any(".lora_" in key for key in header):
        yield Problem("holds no LoRA tensors", "do not use it", subject.at(WEIGHTS))


def _is_other_key(settings: LoraSettings, key: str) -> bool:
    module = key.removeprefix(keys.PREFIX).rpartition(".")[0]
    if not key.startswith(keys.PREFIX):
        return False
    if key.endswith((".lora_embedding_A", ".lora_embedding_B")):
        return keys.is_target(settings, module)
    if key.endswith(".lora_magnitude_vector"):
        return settings.dora and keys.is_target(settings, module)
    if key.endswith(".token_adapter.trainable_tokens_delta"):
        return bool(settings.trained_tokens)
    return any(f".{name}." in f".{module}." for name in settings.modules_to_save)


def _values(subject: Subject) -> Iterator[Problem]:
    for fault, is_wrong in (
        ("not finite", math.isinf),
        (f"over {MOST_VALUE:g}", lambda value: MOST_VALUE < value < math.inf),
    ):
        worst = _worst_values(subject)
        wrong = sorted(key for key, value in worst.items() if is_wrong(value))
        if wrong:
            yield Problem(
                f"{len(wrong)} tensors hold values that are {fault}: {_list(wrong)}",
                "do not use it",
                subject.at(WEIGHTS),
            )


def _worst_values(subject: Subject) -> Mapping[str, float]:
    return {key: worst_value(subject.folder / WEIGHTS, entry) for key, entry in subject.header.items()}


# ----- the base -----
def _base(subject: Subject) -> Iterator[Problem]:
    """Names differ from machine to machine, so only a fingerprint decides; the name is never followed."""
    manifest, named = subject.manifest, subject.known_settings().base_name
    if manifest and subject.base_fingerprint:
        if manifest.base.fingerprint != subject.base_fingerprint:
            reason = f"belongs to base {manifest.base.name!r} with fingerprint {manifest.base.fingerprint[:12]}"
            fix = "give the base that it was trained on"
            yield Problem(
                f"{reason}, got {subject.base_name!r} with {subject.base_fingerprint[:12]}",
                fix,
                subject.at(MANIFEST),
                key="base",
            )
        return
    if subject.base_name is None:
        return
    if not named:
        yield Problem(
            "names no base",
            "make sure that it is the right one",
            subject.at(CONFIG),
            key="base_model_name_or_path",
            severity="warning",
        )
    elif named.rstrip("/").rpartition("/")[2] != subject.base_name.rstrip("/").rpartition("/")[2]:
        reason = f"names the base {named[:80]!r}, got {subject.base_name!r}"
        fix = "make sure that it is the same model"
        yield Problem(reason, fix, subject.at(CONFIG), key="base_model_name_or_path", severity="warning")


def _template(subject: Subject) -> Iterator[Problem]:
    if subject.manifest and TEMPLATE not in subject.manifest.files:
        yield Problem("is missing", "write the folder again", subject.at(TEMPLATE))


def _words(subject: Subject) -> Iterator[Problem]:
    """The tokenizer against the base's, and a template that the base does not have: no server would take them."""
    if subject.base_folder is None:
        return
    yield from check_tokenizer(subject.folder, subject.base_folder)
    if subject.manifest is None and differs(subject.folder, subject.base_folder):
        reason = "is another chat template than its base's"
        yield Problem(reason, "render prompts by it, not by the base's", subject.at(TEMPLATE), severity="note")


def _list(names: list[str]) -> str:
    shown = ", ".join(name[:120] for name in names[:_SHOWN])
    return shown + (" …" if len(names) > _SHOWN else "")


STAGES: tuple[tuple[Check, ...], ...] = (
    (_no_other_kinds,),
    (_no_pickles, _regular_files, _no_unknown_files),
    (_config_fields,),
    (_manifest, _hashes),
    (_header,),
    (_tensor_names,),
    (_values,),
    (_base, _template, _words),
)
"""Stages of checks, in order."""

"""The one base that a server's adapters share, named or from their manifests; all are verified before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_tune.adapter.folder import MANIFEST, Manifest, read_manifest
from lora_tune.adapter.verify import base_of, recorded_base, verify_folder
from lora_tune.errors import CheckFailed, Problem, UsageError
from lora_tune.recipe import Base


def served_base(
    adapters: Mapping[str, Path], *, name: str | None, quantize: str | None = None, trust_remote_code: str | None = None
) -> tuple[Base, list[Problem]]:
    """The base, held as the first adapter was trained on it unless `quantize` says otherwise; and what is to be noted.

    Without adapters that say it, `name` is needed, and it is held as it is stored. Every adapter passes the quick
    checks against this base, with all that is wrong with all of them in one error.

    Raises: UsageError where no base is known or it cannot be found, CheckFailed where adapters are refused.
    """
    manifests = {one: read_manifest(folder) for one, folder in adapters.items() if (folder / MANIFEST).exists()}
    if manifests:
        first = next(iter(manifests))
        _refuse_other_bases(manifests, adapters)
        local = manifests[first].base.kind == "local" or (name is not None and Path(name).is_dir())
        base = recorded_base(adapters[first], name=name) if local else base_of(manifests[first])
        if name is not None and not local and name != base.name:
            base = base_of(manifests[first], name=name)
        base = base.model_copy(update={"quantize": quantize}) if quantize else base
    elif name is None:
        what = "no adapter says which base it needs" if adapters else "nothing to serve"
        raise UsageError(what, "name a base with --base" if adapters else "give --adapter NAME=FOLDER, or --base")
    else:
        base = Base.model_validate({"name": name, "quantize": quantize or "none"})
    problems: list[Problem] = []
    for folder in adapters.values():
        problems += verify_folder(folder, base=base, depth="quick", trust_remote_code=trust_remote_code).problems
    if any(problem.severity == "error" for problem in problems):
        raise CheckFailed([problem for problem in problems if problem.severity == "error"])
    return base, [
        *(problem for problem in problems if problem.severity == "warning"),
        *_held(manifests, adapters, base),
    ]


def _refuse_other_bases(manifests: Mapping[str, Manifest], adapters: Mapping[str, Path]) -> None:
    """Raises: CheckFailed, one line for each adapter that belongs to another base than the first."""
    first, *others = manifests.items()
    wrong = [
        Problem(
            f"belongs to the base {manifest.base.name!r}, and {first[0]!r} to {first[1].base.name!r}",
            "one server has one base: start another one for it",
            str(adapters[name]),
        )
        for name, manifest in others
        if manifest.base.fingerprint != first[1].base.fingerprint
    ]
    if wrong:
        raise CheckFailed(wrong)


def _held(manifests: Mapping[str, Manifest], adapters: Mapping[str, Path], base: Base) -> list[Problem]:
    """A note for each adapter whose base was held in another way in training."""
    return [
        Problem(
            f"{name} was trained on a base held in {manifest.base.quantize}, and here it is held in {base.quantize}",
            file=str(adapters[name]),
            severity="note",
        )
        for name, manifest in manifests.items()
        if manifest.base.quantize != base.quantize
    ]

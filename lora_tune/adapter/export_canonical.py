"""Export to the canonical form: one rank, a scale of 1, PEFT's layout. vLLM and SGLang read it; no torch at the top."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_tune.adapter.compat import ENGINES, SIGNS, Answer, Engine, Traits, judge
from lora_tune.adapter.engine_arguments import Served, sglang_arguments, vllm_arguments
from lora_tune.adapter.export_job import OUTPUT, Job, Written
from lora_tune.adapter.folder import CONFIG, FILES, MANIFEST, WEIGHTS, read_manifest, write_file, write_json
from lora_tune.adapter.folder import write_manifest as write_last
from lora_tune.adapter.parity import Render
from lora_tune.adapter.words import TOKENIZER, differs, template_text
from lora_tune.errors import CheckFailed, Problem

_CARD = "README.md"


def write_canonical(job: Job, scratch: Path) -> Written:
    """The adapter with one rank and a scale of 1, which every engine reads alike.

    The other files of the folder come along, the manifest with new hashes: `adapters verify` proves the copy by the
    test vectors of the original. Its words are those of the folder's own tokenizer.

    Raises: CheckFailed for parts that are no B·A (DoRA, modules trained in full, tokens).
    """
    facts = _write_form(job, scratch, card=None)
    manifest = job.subject.manifest
    model = job.source.folder if job.source else None
    render, stops = _own_words(scratch, model=model) if template_text(scratch) is not None else (None, frozenset())
    stops |= frozenset(manifest.chat.stop_ids if manifest else ())  # where the format says that answers end
    proof = "checked again by" if manifest is None else "its proof"
    return Written(facts, render, stops, (f"{proof}: lora-tune adapters verify {OUTPUT}{_verify_flags(job)}",))


def write_vllm(job: Job, scratch: Path) -> Written:
    """The canonical folder for vLLM, with the command that serves it as trained. Raises: CheckFailed as `judge`."""
    return _write_for("vllm", job, scratch)


def write_sglang(job: Job, scratch: Path) -> Written:
    """The canonical folder for SGLang, with the command that serves it as trained. Raises: CheckFailed as `judge`."""
    return _write_for("sglang", job, scratch)


def canonical_files(job: Job, scratch: Path) -> dict[str, Any]:
    """Write the canonical folder; returns its numbers. Raises: CheckFailed as `write_canonical`."""
    return _write_form(job, scratch, card=None)


def _write_form(job: Job, scratch: Path, *, card: str | None) -> dict[str, Any]:
    from safetensors.torch import save

    from lora_tune.adapter.canonical import canonical
    from lora_tune.adapter.load import read_adapter

    form = canonical(read_adapter(job.folder), dtype=job.dtype)
    for name in FILES:
        if name not in (CONFIG, WEIGHTS, MANIFEST) and (job.folder / name).is_file():
            shutil.copyfile(job.folder / name, scratch / name, follow_symlinks=True)
    write_json(scratch, CONFIG, form.adapter.config)
    write_file(scratch, WEIGHTS, save(dict(form.adapter.tensors), {"format": "pt"}))
    if card is not None:
        text = (scratch / _CARD).read_text(encoding="utf-8") if (scratch / _CARD).exists() else ""
        write_file(scratch, _CARD, (text.rstrip() + "\n\n" + card).lstrip().encode())
    if (job.folder / MANIFEST).exists():
        write_last(scratch, read_manifest(job.folder))
    return {"rank": form.rank, "dtype": job.dtype, "largest_relative_error": form.error}


def _write_for(engine: Engine, job: Job, scratch: Path) -> Written:
    """The canonical folder, judged for this engine, with its command line in the card."""
    from lora_tune.adapter.verify import engine_traits, verify_folder

    source, base = job.known_base()
    own = _needs_own_words(job, engine)
    rank = _rank_of(job)
    command = _command(engine, job, rank=rank, own=own, folder_at=f"./{scratch.name}")
    facts = _write_form(job, scratch, card=_card(engine, command))
    report = verify_folder(scratch, base=base, depth="quick")
    if report.errors:
        raise CheckFailed(report.errors)
    traits = replace(engine_traits(report.subject), own_template=False)  # it is named on the command line
    notes = _refuse(engine, traits, job)
    if own:
        render, stops = _own_words(scratch, model=source.folder)
    else:
        render, stops = _base_words(job)
    shown = _command(engine, job, rank=rank, own=own, base_at=_typed_base(job), folder_at=OUTPUT)
    facts |= {"engine": engine, "command": command, "notes": notes, "own_words": own}
    return Written(facts, render, stops, (*notes, shown))


def _refuse(engine: Engine, traits: Traits, job: Job) -> list[str]:
    """What the engine does with the canonical form: refused where it refuses it or runs it wrong; else its notes."""
    verdict = judge(traits, engine)
    bad = [answer for answer in verdict.answers if answer.mark in ("refused", "wrong")]
    if bad:
        raise CheckFailed([Problem(_said(engine, answer), answer.fix, str(job.folder)) for answer in bad])
    return [f"{_said(engine, answer)}; {answer.fix}" for answer in verdict.answers]


def _said(engine: Engine, answer: Answer) -> str:
    return f"{SIGNS[answer.mark]} {ENGINES[engine]}: {answer.reason}"


def _rank_of(job: Job) -> int:
    """The rank of the canonical form: the largest of all modules."""
    from lora_tune.adapter.verify import engine_traits

    return max(engine_traits(job.subject).ranks)


def _needs_own_words(job: Job, engine: Engine) -> bool:
    """Whether the engine must be given the adapter's tokenizer: another template, or another end than the base's."""
    source, _ = job.known_base()
    chat = job.known_chat()
    if not (job.folder / TOKENIZER).exists():
        return False
    _, stops = _base_words(job)
    return bool(differs(job.folder, source.folder)) or chat.eos_id not in stops


def _own_words(folder: Path, *, model: Path | None = None) -> tuple[Render | None, frozenset[int]]:
    from lora_tune.adapter.transformers_words import transformers_words

    if not (folder / TOKENIZER).exists() and not (folder / "tokenizer_config.json").exists():
        return None, frozenset()
    return transformers_words(folder, model=model)


def _base_words(job: Job) -> tuple[Render, frozenset[int]]:
    from lora_tune.adapter.transformers_words import transformers_words

    source, _ = job.known_base()
    return transformers_words(source.folder, model=source.folder)


def _command(engine: Engine, job: Job, *, rank: int, own: bool, folder_at: str, base_at: str | None = None) -> str:
    """The command that serves the folder; without paths, the base is named as it is recorded."""
    source, base = job.known_base()
    model = base_at or (source.name if source.kind == "hub" else f"PATH/TO/{source.name.rpartition(':')[2]}")
    served = Served(
        base=model,
        name=model,
        adapters={job.folder.resolve().name: folder_at},
        rank=rank,
        revision=source.revision if source.kind == "hub" else None,
        tokenizer=folder_at if own else None,
        dtype=base.compute_dtype if base.compute_dtype != "auto" else None,
    )
    if engine == "vllm":
        return shlex.join(["vllm", "serve", *vllm_arguments(served)])
    return shlex.join(["python", "-m", "sglang.launch_server", *sglang_arguments(served)])


def _typed_base(job: Job) -> str | None:
    source, _ = job.known_base()
    return None if source.kind == "hub" else str(source.folder)


def _verify_flags(job: Job) -> str:
    """A local base must be given; without a manifest there are no test vectors."""
    manifest = job.subject.manifest
    if manifest is None:
        return " --quick"
    return " --base BASE" if manifest.base.kind == "local" else ""


def _card(engine: Engine, command: str) -> str:
    return (
        f"## Serving with {engine}\n\nThis copy is in canonical form: one rank, a scale of 1 in every module. From the "
        f"folder that holds it:\n\n```sh\n{command}\n```\n"
    )

"""Export for mlx-lm: `adapters.safetensors` under MLX's names and its `adapter_config.json`. No torch at the top.

mlx-lm holds one rank and one scale for all modules, so the canonical form is written: rank R and scale 1. Its matrices
lie the other way round, `lora_a` (in, R) and `lora_b` (R, out). Source: mlx-lm `tuner/utils.py`, `tuner/lora.py`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tune.adapter.compat import MLX_ARCHITECTURES
from lora_tune.adapter.export_job import OUTPUT, Job, Written
from lora_tune.adapter.parity import Render
from lora_tune.adapter.words import differs, template_text
from lora_tune.errors import CheckFailed, Problem

if TYPE_CHECKING:
    import torch

_READS_ROPE_PARAMETERS = ("qwen3",)
_DEFAULT_THETA = {"qwen2": 1_000_000}
_KEY = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<matrix>A\.weight|B\.weight|embedding_[AB])")
_LAYER = re.compile(r"model\.layers\.\d+\.(?P<name>.+)")


def write_mlx(job: Job, scratch: Path) -> Written:
    """The adapter for mlx-lm, which takes tokenizer and template from the base.

    Raises: CheckFailed for parts that are no B·A, another architecture, an update of tied embeddings or head.
    """
    from safetensors.torch import save_file

    from lora_tune.adapter.canonical import canonical
    from lora_tune.adapter.load import read_adapter

    source, base = job.known_base()
    architecture = str(source.config.get("model_type"))
    if architecture not in MLX_ARCHITECTURES:
        reason = (
            f"not supported: the names of {architecture} in MLX are not known here, only {', '.join(MLX_ARCHITECTURES)}"
        )
        raise CheckFailed(Problem(reason, "export it --to merged, which mlx-lm reads as well", str(job.folder)))
    _refuse_positions(architecture, source.config)
    form = canonical(read_adapter(job.folder), dtype=job.dtype)
    tensors = mlx_tensors(form.adapter.tensors)
    keys = sorted({_relative(name.rpartition(".")[0]) for name in tensors})
    _refuse_tied(job, keys, tied=bool(source.config.get("tie_word_embeddings")))
    save_file(tensors, scratch / "adapters.safetensors", {"format": "mlx"})
    config = {
        "fine_tune_type": "lora",
        "model": source.name,
        "num_layers": source.config["num_hidden_layers"],
        "lora_parameters": {"rank": form.rank, "scale": 1.0, "dropout": 0.0, "keys": keys},
    }
    (scratch / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    render, stops, template = _words(job)
    if template is not None:
        (scratch / "chat_template.jinja").write_text(template, encoding="utf-8")
    named = source.name if source.kind == "hub" else f"PATH/TO/{source.name.rpartition(':')[2]}"
    own = "no" if template is None else "yes"
    command = _command(named, f"./{scratch.name}", own=own)
    (scratch / "README.md").write_text(_card(job, command), encoding="utf-8")
    facts: dict[str, Any] = {"rank": form.rank, "dtype": job.dtype, "largest_relative_error": form.error}
    held = () if base.quantize == "none" else (f"~ it was trained on a base in {base.quantize}: see lora-tune merge",)
    place = source.name if source.kind == "hub" else str(source.folder)
    return Written({**facts, "command": command}, render, stops, (*held, _command(place, OUTPUT, own=own)))


def mlx_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """PEFT's tensors of a canonical adapter by MLX's names and in its shapes: `lora_a` (in, R), `lora_b` (R, out)."""
    found = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckFailed(Problem(f"not supported: {key} is no part of B·A", "merge it: lora-tune merge"))
        name = "lora_a" if "A" in match["matrix"] else "lora_b"
        found[f"{match['module']}.{name}"] = tensor.T.contiguous()
    return found


def _relative(module: str) -> str:
    """A module's name as mlx-lm lists it: below its layer, or whole for embeddings and head."""
    match = _LAYER.fullmatch(module)
    return match["name"] if match else module


def _refuse_positions(architecture: str, config: Mapping[str, Any]) -> None:
    """mlx-lm reads `rope_theta` and `rope_scaling`; transformers 5 writes `rope_parameters`, which it passes over."""
    written = config.get("rope_parameters")
    if not isinstance(written, dict) or architecture in _READS_ROPE_PARAMETERS or "rope_theta" in config:
        return
    theta, kind = written.get("rope_theta"), written.get("rope_type", "default")
    if theta != _DEFAULT_THETA.get(architecture, 10_000) or kind != "default":
        reason = f"mlx-lm does not read rope_parameters of the base's config.json (theta {theta:g}, {kind})"
        fix = "write rope_theta (and rope_scaling) into the base's config.json as well, or it computes other positions"
        raise CheckFailed(Problem(reason, fix, key="rope_parameters"))


def _refuse_tied(job: Job, keys: list[str], *, tied: bool) -> None:
    outside = [key for key in keys if key.startswith(("model.embed_tokens", "lm_head"))]
    if outside and tied:
        reason = f"not supported: an update of {outside[0]}, whose embeddings and head are one tensor in this base"
        raise CheckFailed(Problem(reason, "merge it: lora-tune merge", str(job.folder)))


def _words(job: Job) -> tuple[Render, frozenset[int], str | None]:
    """The base's words as mlx-lm reads them; with the adapter's template where that is another one."""
    from lora_tune.adapter.transformers_words import transformers_words

    source, _ = job.known_base()
    template = template_text(job.folder) if differs(job.folder, source.folder) else None
    render, stops = transformers_words(source.folder, model=source.folder, template=template, contents="text")
    return render, stops, template


def _command(model: str, folder: str, *, own: str) -> str:
    model, folder = shlex.quote(model), shlex.quote(folder)
    template = f' --chat-template "$(cat {folder}/chat_template.jinja)"' if own == "yes" else ""
    return f"mlx_lm.server --model {model} --adapter-path {folder}{template}"


def _card(job: Job, command: str) -> str:
    name = job.folder.resolve().name
    manifest = job.subject.manifest
    base = f"`{manifest.base.name}`" if manifest else "its base"
    said = f"The LoRA adapter `{name}` on {base}: one rank, a scale of 1."
    return f"# {name} for mlx-lm\n\n{said}\n\n```sh\n{command}\n```\n"

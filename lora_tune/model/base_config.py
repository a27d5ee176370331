"""What config.json says about a base: whether it is a model that can be trained here (cold)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lora_tune.errors import UsageError
from lora_tune.model.weights import is_lfs_pointer

_CONFIG_LIMIT = 4_000_000  # bytes of config.json
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_NOT_CAUSAL = {
    "ForConditionalGeneration": "a sequence-to-sequence or vision-language model",
    "ForMaskedLM": "an encoder",
    "ForPreTraining": "an encoder",
    "ForSequenceClassification": "a classifier",
    "ForTokenClassification": "a classifier",
    "ForQuestionAnswering": "a question-answering head",
    "ForImageTextToText": "a vision-language model",
}


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The content of config.json; `name` stands in messages.

    Raises:
        UsageError: missing, too large, a Git LFS pointer, or not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        hint = "this is an adapter folder: name its base, and the adapter in lora.start_from"
        fix = hint if (folder / "adapter_config.json").is_file() else "a base needs config.json beside its weights"
        raise UsageError(f"base {name!r}: no config.json there", fix)
    if path.stat().st_size > _CONFIG_LIMIT:
        raise UsageError(f"{path}: {path.stat().st_size} bytes is no config.json", "check what the folder holds")
    if is_lfs_pointer(path):
        raise UsageError(f"{path}: this is a Git LFS pointer, not the file", "run `git lfs pull` in that folder")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path}: this is not JSON: {reason}", "copy or download it again") from None
    if not isinstance(config, dict):
        raise UsageError(f"{path}: this must be a JSON object, got {type(config).__name__}", "copy it again")
    return config


def check_trust(name: str, trust_remote_code: str | None) -> None:
    """Refuse a --trust-remote-code that names anything but the base: nobody trusts code by accident."""
    if trust_remote_code is not None and trust_remote_code != name:
        raise UsageError(
            f"--trust-remote-code names another repository than the base {name!r}, got {trust_remote_code!r}",
            "name the base's own repository, or leave the flag out",
        )


def check_kind(config: Mapping[str, Any], name: str, *, code: Literal["refused", "trusted"]) -> None:
    """Refuse what is no causal language model, and what needs code of its own that was not allowed."""
    where = f"base {name!r}"
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UsageError(f"{where}: config.json names no model_type", "take the config.json of the model's makers")
    if "auto_map" in config and not _is_native(model_type):
        if code == "refused":
            raise UsageError(
                f"{where}: model type {model_type!r} runs Python code from its repository, which is not supported",
                f"read that code; if you trust it, pass --trust-remote-code {name}",
            )
        return
    architectures = config.get("architectures") or []
    names = [item for item in architectures if isinstance(item, str)] if isinstance(architectures, list) else []
    if any(item.endswith(_CAUSAL) for item in names) or not names:
        return
    kind = next((kind for end, kind in _NOT_CAUSAL.items() if names[0].endswith(end)), "another kind of model")
    raise UsageError(
        f"{where}: not supported: {kind}, got architecture {names[0]!r}",
        "take a text model whose architecture ends in ForCausalLM",
    )


def _is_native(model_type: str) -> bool:
    """Whether the installed transformers has this model type itself (its folder is there; nothing is imported)."""
    spec = importlib.util.find_spec("transformers")
    roots = spec.submodule_search_locations if spec and spec.submodule_search_locations else ()
    folder = model_type.replace("-", "_")
    return folder.isidentifier() and any((Path(root) / "models" / folder).is_dir() for root in roots)


def stored_bits(config: Mapping[str, Any]) -> Literal[4, 8] | None:
    """4 or 8 for a base that is stored quantized by bitsandbytes, None for one stored in full precision."""
    stored = config.get("quantization_config")
    if stored is None:
        return None
    return 8 if stored.get("load_in_8bit") or stored.get("_load_in_8bit") else 4


def check_stored_quantization(config: Mapping[str, Any], name: str, *, quantize: str) -> None:
    """Refuse weights that are stored quantized, but not by bitsandbytes or not as the recipe asks."""
    stored = config.get("quantization_config")
    if stored is None:
        return
    method = str(stored.get("quant_method") or "bitsandbytes") if isinstance(stored, Mapping) else repr(stored)
    if not isinstance(stored, Mapping) or method not in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        raise UsageError(
            f"base {name!r}: not supported: weights stored as {method}",
            "name the full-precision repository of the same model, or its bitsandbytes 4-bit one (*-bnb-4bit)",
        )
    bits = stored_bits(config)
    fits = ("int8",) if bits == 8 else (str(stored.get("bnb_4bit_quant_type", "fp4")),)
    if quantize not in fits:
        raise UsageError(
            f"base.quantize: {name!r} is stored as {fits[0]} already, got {quantize}",
            f"set base.quantize: {fits[0]}, or name the full-precision repository",
        )

"""A base of the same architecture, hundreds of times smaller, with random weights: for rehearsals on a CPU.

Made from `config.json` and the tokenizer's files alone. What makes an architecture is kept: model type, the ratio of
query to key heads, tied embeddings, sliding and full layers, dense and sparse layers, routed and shared experts,
latent attention, rotary scaling, vocabulary, positions. Widths, depth and the number of experts fall.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tune.errors import UsageError
from lora_tune.model import hub
from lora_tune.model.source import BaseSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HEAD = 16  # width of a head; a quarter of it is still even, as partial rotary embeddings need
_HIDDEN = 64
_GROUP = 8  # query heads of one key head, at most: Falcon has 71
_SPREAD = 0.1  # deviation of the random weights: at the usual 0.02 every token is as likely as any other
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_HIDDEN_NAMES = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
# {key of config.json: the size it has at most in the small model}; keys that a config does not have are not added
_SIZES: dict[str, int] = {
    "intermediate_size": 128, "ffn_hidden_size": 128, "ffn_dim": 128, "n_inner": 128, "intermediate_size_mlp": 128,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "experts_per_token": 2, "moe_topk": 2, "moe_k": 2,
    "n_group": 2, "topk_group": 1,
    "kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "qk_head_dim": 24,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "num_global_key_value_heads": 1, "global_head_dim": 32, "hidden_size_per_layer_input": 16,
    "num_nextn_predict_layers": 0, "num_kv_shared_layers": 0,
}  # fmt: skip
# {key: most layers in one turn of its pattern}, such as every second layer sparse, every sixth one with full attention
_PERIODS = ("decoder_sparse_step", "interleave_moe_layer_step", "sliding_window_pattern", "full_attention_interval")
_PER_ROTARY = ("short_factor", "long_factor")  # lists with an entry for each pair of rotary dimensions

# what transformers raises where a configuration does not fit its model
_BUILDING = (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)


def shrunk_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of the small model of the same architecture; how the weights are stored is left out.

    Raises:
        UsageError: the sizes of the base have names that are not known here.
    """
    small = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    text = next((name for name in ("text_config", "llm_config") if isinstance(small.get(name), Mapping)), None)
    if text is not None:
        small[text] = shrunk_config(small[text])
        return small
    layers, heads = _named(config, _LAYERS), _named(config, _HEADS)
    kept = _kept_layers(config, int(config[layers]))
    few_heads, few_key_heads = _heads(config, int(config[heads]))
    small[layers], small[heads] = len(kept), few_heads
    small |= {key: few_key_heads for key in _KEY_HEADS if _is_size(config, key)}
    small |= {key: min(most, config[key]) for key, most in _SIZES.items() if _is_size(config, key)}
    small |= _widths(config, few_heads)
    small |= {key: 2 for key in _PERIODS if _is_size(config, key) and config[key] > 1}
    for key, value in config.items():
        if isinstance(value, list) and len(value) == config[layers] and len(value) > 4:  # an entry for each layer
            small[key] = [value[number] for number in kept]
    small |= _positions_of_layers(config, len(kept))
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(key), Mapping):
            small[key] = _rotary(config[key], config)
    return small


def _named(config: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The name under which a config has a size."""
    found = next((name for name in names if _is_size(config, name)), None)
    if found is None:
        raise UsageError(
            f"config.json of the base has no {' or '.join(names)}: it cannot be made small",
            "rehearse with another base of the same family: base.name=…",
        )
    return found


def _is_size(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _kept_layers(config: Mapping[str, Any], layers: int) -> list[int]:
    """Numbers of the layers that stay: one of each kind in their order, and two where all are of one kind."""
    dense = config.get("first_k_dense_replace") or 0
    sparse = config.get("mlp_only_layers") or []
    lists = [value for value in config.values() if isinstance(value, list) and len(value) == layers and layers > 4]
    kinds: dict[tuple[str, ...], list[int]] = {}
    for number in range(layers):
        kind = (str(number < dense), str(number in sparse), *(json.dumps(value[number]) for value in lists))
        kinds.setdefault(kind, []).append(number)
    if len(kinds) == 1:
        return list(range(min(2, layers)))
    return sorted(numbers[0] for numbers in kinds.values())[:6]


def _positions_of_layers(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Keys that name layers by their number."""
    found: dict[str, Any] = {}
    if _is_size(config, "first_k_dense_replace"):
        found["first_k_dense_replace"] = 1
    if isinstance(config.get("mlp_only_layers"), list):
        found["mlp_only_layers"] = [number for number in config["mlp_only_layers"] if number < layers]
    if _is_size(config, "max_window_layers"):  # layers from this one on slide
        all_full = config["max_window_layers"] >= config[_named(config, _LAYERS)]
        found["max_window_layers"] = layers if all_full else 1
    return found


def _heads(config: Mapping[str, Any], heads: int) -> tuple[int, int]:
    """How many query and key heads the small model has, in the ratio of the real one."""
    single = config.get("multi_query") and not config.get("new_decoder_architecture")
    key_heads = 1 if single else next((config[key] for key in _KEY_HEADS if _is_size(config, key)), heads)
    group = max(1, round(heads / key_heads))
    few = min(4, heads) if group == 1 else 1 if key_heads == 1 or group > 4 else 2
    return few * min(group, _GROUP), few


def _widths(config: Mapping[str, Any], heads: int) -> dict[str, Any]:
    """Hidden size and, where the config says it apart, head size."""
    apart = _is_size(config, "head_dim") or _is_size(config, "kv_lora_rank")
    hidden = max(_HIDDEN, heads * HEAD) if heads % 4 or not apart else _HIDDEN  # heads must divide it
    found = {key: hidden for key in _HIDDEN_NAMES if _is_size(config, key)}
    if _is_size(config, "head_dim"):
        found["head_dim"] = min(HEAD, config["head_dim"]) if not _is_size(config, "kv_lora_rank") else 8
    return found


def _rotary(settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings for the small heads; nested ones, for each kind of layer, as well."""
    small: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            small[key] = _rotary(value, config)
        elif key in _PER_ROTARY and isinstance(value, list):
            share = settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
            small[key] = value[: max(1, int(HEAD * share) // 2)]
        else:
            small[key] = value
    return small


def write_shrunk(source: BaseSource, folder: Path, *, seed: int) -> int:
    """Write the small model of a base into a new folder: config, tokenizer, random weights; returns its parameters.

    Reads config.json and the tokenizer's files of the base and no weight.

    Raises:
        UsageError: transformers cannot build the architecture at this size.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    folder.mkdir(parents=True)
    copy_files(source.folder, folder)
    small = shrunk_config(source.config)
    (folder / "config.json").write_text(json.dumps(small, indent=1) + "\n", encoding="utf-8")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        _spread(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config).to(_stored_dtype(small))
        model.save_pretrained(folder)
    except (*_BUILDING, StrictDataclassError) as error:
        raise _unbuilt(source, error) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    (folder / "config.json").write_text(json.dumps(small, indent=1) + "\n", encoding="utf-8")  # as its makers name it
    return sum(parameter.numel() for parameter in model.parameters())


def _unbuilt(source: BaseSource, error: Exception) -> UsageError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return UsageError(
        f"base {source.name!r}: a small {source.config.get('model_type')!r} cannot be built: {reason}",
        "rehearse with another base of the same family: base.name=…",
    )


def _spread(config: PreTrainedConfig) -> None:
    for part in (config, config.get_text_config()):
        if hasattr(part, "initializer_range"):
            part.initializer_range = _SPREAD


def _stored_dtype(config: Mapping[str, Any]) -> Any:
    import torch

    parts = (config[name] for name in ("text_config", "llm_config") if isinstance(config.get(name), Mapping))
    text: Mapping[str, Any] = next(parts, {})
    stored = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(stored), torch.float32)


def copy_files(folder: Path, to: Path) -> None:
    """Copy tokenizer, chat template and generation settings of a base; no weight."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        wanted = any(fnmatch(name, pattern) for pattern in (*hub.TOKENIZER_FILES, "generation_config.json"))
        if wanted and path.is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to / name)

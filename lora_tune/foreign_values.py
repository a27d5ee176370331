"""What a setting of another tool becomes here: one small function a kind of value, one line a key in `RULES`.

A rule gets the draft and the value; it puts what it can carry over into `draft.values` (path of ours: value) and
returns why, where it cannot. Sources: the tools' own example configurations and their documented keys (axolotl,
LLaMA-Factory, TRL, torchtune, LitGPT, oumi, ms-swift).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from lora_tune.foreign_sources import Draft, Rule, data_class, per_source, sources

_SCHEDULES = {
    "cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant",
    "polynomial": "polynomial", "inverse_sqrt": "inverse_sqrt",
}  # fmt: skip
_OPTIMIZERS = {
    "adamw": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw",
    "torch.optim.adamw": "adamw", "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw", "paged_adamw_32bit": "paged_adamw", "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor", "lion_8bit": "lion_8bit", "sgd": "sgd",
}  # fmt: skip
_DTYPES = {
    "bfloat16": "bfloat16", "bf16": "bfloat16", "bf16-true": "bfloat16", "bf16-mixed": "bfloat16", "float16": "float16",
    "fp16": "float16", "16-true": "float16", "float32": "float32", "fp32": "float32", "32-true": "float32",
}  # fmt: skip
_ATTENTION = {
    "sdpa": "sdpa",
    "eager": "eager",
    "flash_attention_2": "flash_attention_2",
    "flash_attn": "flash_attention_2",
}
_MODULES = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_MLP = ["gate_proj", "up_proj", "down_proj"]


def put(path: str, *, kind: Callable[[Any], Any] | None = None) -> Rule:
    """Carry the value over as it is, or as `kind` makes it; a value that `kind` cannot take is said."""

    def rule(draft: Draft, value: Any) -> str | None:
        try:
            if kind is None and isinstance(value, (list, dict)):
                raise ValueError
            draft.values[path] = kind(value) if kind else value
        except (TypeError, ValueError, OverflowError):
            return f"is no value for {path}"
        return None

    return rule


def choice(path: str, table: dict[str, str]) -> Rule:
    """Carry over a word that has another name here."""

    def rule(draft: Draft, value: Any) -> str | None:
        name = table.get(str(value).lower(), table.get(str(value)))
        if name is None:
            return f"{path} has no such choice: {', '.join(dict.fromkeys(table.values()))}"
        draft.values[path] = name
        return None

    return rule


def when(path: str, chosen: Any) -> Rule:
    """A switch: where it is on, our key takes this value."""

    def rule(draft: Draft, value: Any) -> str | None:
        if value is True or str(value).lower() in ("true", "1"):
            draft.values[path] = chosen
        return None

    return rule


def modules(*names: str) -> Rule:
    """A switch that gives these modules an adapter."""

    def rule(draft: Draft, value: Any) -> str | None:
        if value is True:
            draft.modules.extend(names)
        return None

    return rule


def unsupported(reason: str) -> Rule:
    """What has no counterpart here, and why."""
    return lambda draft, value: reason


def _share(value: Any) -> int | str:
    """0.05 as 5%, a whole number as it is."""
    number = float(value)
    return f"{100 * number:g}%" if 0 < number < 1 else int(number)


def _names(value: Any) -> list[str]:
    """A list of names, or one name. Raises: ValueError."""
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise ValueError
    return names


def _base_name(draft: Draft, value: Any) -> str | None:
    if not isinstance(value, str):
        return "is no name of a base"
    draft.values["base.name"] = value.removeprefix("checkpoints/").rstrip("/")
    return None


def _quantize(draft: Draft, value: Any) -> str | None:
    kind = str(value).removeprefix("bnb.").removesuffix("-training")
    name, double = kind.removesuffix("-dq"), kind.endswith("-dq")
    if name not in ("nf4", "fp4", "int8"):
        return "base.quantize has no such choice: nf4, fp4, int8, none"
    draft.values["base.quantize"] = name
    if name != "int8":
        draft.values["base.double_quant"] = double
    return None


def _bits(draft: Draft, value: Any) -> str | None:
    kind = {"4": "nf4", "8": "int8"}.get(str(value))
    if kind is None:
        return "only 4 and 8 bit are supported" if str(value) not in ("none", "None") else None
    draft.values["base.quantize"] = kind
    return None


def _method(draft: Draft, value: Any) -> str | None:
    if value == "qlora":
        draft.values["base.quantize"] = "nf4"
    return None if value in ("lora", "qlora") else "only LoRA adapters are trained; see lora.method"


def _targets(draft: Draft, value: Any) -> str | None:
    names = value if isinstance(value, list) else [name.strip() for name in str(value).split(",")]
    if set(names) & {"all", "all-linear", "all_linear"}:
        draft.values["lora.targets"] = "all-linear"
    elif all(isinstance(name, str) for name in names):
        draft.modules.extend(_MODULES.get(name, name) for name in names)
    else:
        return "is no list of module names"
    return None


def _checkpointing(draft: Draft, value: Any) -> str | None:
    draft.values["train.gradient_checkpointing"] = "all" if value not in (False, "false") else "none"
    return None


def _too_long(draft: Draft, value: Any) -> str | None:
    chosen = {"delete": "drop", "drop": "drop", "left": None, "right": "truncate", "truncate": "truncate"}.get(
        str(value)
    )
    if chosen is None:
        return "train.too_long is truncate, drop or split"
    draft.values["train.too_long"] = chosen
    return None


def _hold_out(draft: Draft, value: Any) -> str | None:
    if isinstance(value, list):
        if len(value) != 1:
            return "eval.hold_out takes one data file"
        value = value[0]
    if isinstance(value, str) and not re.fullmatch(r"[0-9.]+", value):
        draft.values["eval.hold_out"] = value
    elif float(value) > 0 or "eval.hold_out" not in draft.values:
        draft.values["eval.hold_out"] = _share(value)
    return None


def _component(draft: Draft, value: Any) -> str | None:
    """torchtune's name of a model builder: it says whether the base is quantized."""
    name = str(value).rpartition(".")[2]
    if name.startswith("qlora_"):
        draft.values["base.quantize"] = "nf4"
    return None if name.startswith(("qlora_", "lora_")) else "only LoRA adapters are trained"


def _schedule_component(draft: Draft, value: Any) -> str | None:
    name = next((name for name in _SCHEDULES if f"get_{name}_schedule" in str(value)), None)
    return choice("train.schedule", _SCHEDULES)(draft, name) if name else "train.schedule has no such choice"


def _report_to(draft: Draft, value: Any) -> str | None:
    names = [str(name) for name in (value if isinstance(value, list) else [value])]
    known = [name for name in names if name in ("tensorboard", "trackio", "wandb", "mlflow")]
    if known:
        draft.values["track"] = known
    lost = [name for name in names if name not in (*known, "none", "None", "False", "csv")]
    return f"no tracker of these names: {', '.join(lost)}" if lost else None


def _count(name: str) -> Rule:
    def rule(draft: Draft, value: Any) -> str | None:
        setattr(draft, name, int(value))
        return None

    return rule


def _batch_size(draft: Draft, value: Any) -> str | None:
    """Per device and micro-batch in torchtune and LLaMA-Factory's board, of the whole step elsewhere."""
    if draft.tool in ("torchtune", "LLaMA-Factory"):
        draft.micro_batch = int(value)
    else:
        draft.values["train.batch_size"] = int(value)
    return None


def _is_sft(draft: Draft, value: Any) -> str | None:
    is_sft = str(value).lower() in ("sft", "trl_sft", "supervised fine-tuning")
    return None if is_sft else "training is always supervised fine-tuning here: this run was another kind of training"


def _steps(draft: Draft, value: Any) -> str | None:
    if int(value) > 0:
        draft.values["train.max_steps"] = int(value)
    return None


def _positive(path: str) -> Rule:
    """A number for which 0 means off."""

    def rule(draft: Draft, value: Any) -> str | None:
        if float(value):
            draft.values[path] = float(value)
        return None

    return rule


_EPOCH_SAVES = "a checkpoint is written at the end of every epoch without train.save_every"
RULES: dict[str, Rule] = {
    # base
    **dict.fromkeys(
        ("model_name_or_path", "base_model", "model", "model_name", "model_id", "checkpoint_dir"), _base_name
    ),
    "model_revision": put("base.revision", kind=str),
    **dict.fromkeys(("load_in_4bit", "load_4bit", "q_lora"), when("base.quantize", "nf4")),
    "load_in_8bit": when("base.quantize", "int8"),
    "quantization_bit": _bits,
    "quantize": _quantize,
    "bnb_4bit_quant_type": choice("base.quantize", {"nf4": "nf4", "fp4": "fp4"}),
    **dict.fromkeys(
        ("bnb_4bit_use_double_quant", "double_quantization", "use_bnb_nested_quant"), put("base.double_quant")
    ),
    **dict.fromkeys(
        ("torch_dtype", "torch_dtype_str", "dtype", "precision", "compute_type", "bnb_4bit_compute_dtype"),
        choice("base.compute_dtype", _DTYPES),
    ),
    "bf16": when("base.compute_dtype", "bfloat16"),
    "fp16": when("base.compute_dtype", "float16"),
    **dict.fromkeys(("flash_attention", "flash_attn"), when("base.attention", "flash_attention_2")),
    **dict.fromkeys(("attn_implementation", "attn_impl"), choice("base.attention", _ATTENTION)),
    **dict.fromkeys(("compile", "torch_compile"), when("train.compile", "layers")),
    "template": unsupported("the base's own chat template is used; another one is a Jinja file in base.chat_template"),
    "chat_template": unsupported("the base's own chat template is used; write this one to a file: base.chat_template"),
    "prompt_style": unsupported(
        "the base's own chat template is used; another one is a Jinja file in base.chat_template"
    ),
    # data
    **dict.fromkeys(("datasets", "dataset", "dataset_name", "dataset_mixture.datasets"), sources),
    "dataset._component_": data_class,
    "data.class_path": data_class,
    "max_samples": per_source("max_rows"),
    "train_on_inputs": when("loss_on", "all"),
    "train_on_prompt": when("loss_on", "all"),
    "mask_prompt": lambda draft, value: None if value else when("loss_on", "all")(draft, True),
    # adapter
    **dict.fromkeys(("adapter", "finetuning_type", "tuner_type"), _method),
    "model._component_": _component,
    **dict.fromkeys(("lora_r", "lora_rank"), put("lora.rank", kind=int)),
    "lora_alpha": put("lora.alpha", kind=float),
    "lora_dropout": put("lora.dropout", kind=float),
    **dict.fromkeys(("lora_target_modules", "target_modules", "lora_target", "lora_attn_modules"), _targets),
    "lora_target_linear": when("lora.targets", "all-linear"),
    "lora_query": modules("q_proj"),
    "lora_key": modules("k_proj"),
    "lora_value": modules("v_proj"),
    "lora_projection": modules("o_proj"),
    **dict.fromkeys(("lora_mlp", "apply_lora_to_mlp"), modules(*_MLP)),
    **dict.fromkeys(("lora_head", "apply_lora_to_output"), modules("lm_head")),
    **dict.fromkeys(("lora_modules_to_save", "additional_target"), put("lora.modules_to_save", kind=_names)),
    "use_rslora": when("lora.method", "rslora"),
    "use_dora": when("lora.method", "dora"),
    "pissa_init": when("lora.method", "pissa"),
    **dict.fromkeys(("lora_model_dir", "adapter_name_or_path"), put("lora.start_from", kind=str)),
    **dict.fromkeys(("loraplus_lr_ratio", "loraplus_ratio"), _positive("lora.plus_ratio")),
    # training
    **dict.fromkeys(("num_epochs", "num_train_epochs", "epochs", "n_epochs"), put("train.epochs", kind=float)),
    "max_steps": _steps,
    **dict.fromkeys(("learning_rate", "lr"), put("train.learning_rate", kind=float)),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type"), choice("train.schedule", _SCHEDULES)),
    "lr_scheduler._component_": _schedule_component,
    "warmup_ratio": put("train.warmup", kind=_share),
    **dict.fromkeys(("warmup_steps", "num_warmup_steps", "lr_warmup_steps"), put("train.warmup", kind=int)),
    "weight_decay": put("train.weight_decay", kind=float),
    **dict.fromkeys(("max_grad_norm", "clip_grad_norm", "max_norm"), put("train.max_grad_norm", kind=float)),
    **dict.fromkeys(
        ("optimizer", "optim", "optimizer.class_path", "optimizer._component_"), choice("train.optimizer", _OPTIMIZERS)
    ),
    **dict.fromkeys(("micro_batch_size", "per_device_train_batch_size"), _count("micro_batch")),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accumulation_steps"), _count("accumulation")),
    "batch_size": _batch_size,
    "global_batch_size": put("train.batch_size", kind=int),
    **dict.fromkeys(
        ("sequence_len", "cutoff_len", "max_length", "max_seq_length", "max_seq_len", "model_max_length"),
        put("train.max_length", kind=int),
    ),
    **dict.fromkeys(("excess_length_strategy", "truncation_strategy"), _too_long),
    **dict.fromkeys(("sample_packing", "packing", "packed", "neat_packing"), put("train.packing", kind=bool)),
    **dict.fromkeys(
        ("gradient_checkpointing", "enable_activation_checkpointing", "enable_gradient_checkpointing"), _checkpointing
    ),
    **dict.fromkeys(("neftune_noise_alpha", "neftune_alpha"), _positive("train.neftune_alpha")),
    **dict.fromkeys(("save_steps", "save_interval"), put("train.save_every", kind=int)),
    "saves_per_epoch": lambda draft, value: None if value == 1 else _EPOCH_SAVES,
    "save_total_limit": put("train.keep_checkpoints", kind=int),
    # evaluation and the run
    **dict.fromkeys(
        ("val_set_size", "val_size", "val_split_fraction", "split_dataset_ratio", "test_split_size", "val_dataset"),
        _hold_out,
    ),
    **dict.fromkeys(("eval_steps", "eval.interval"), put("eval.every", kind=int)),
    "load_best_model_at_end": when("eval.keep_best", True),
    "early_stopping_patience": put("eval.stop_after", kind=int),
    **dict.fromkeys(
        ("output_dir", "out_dir"), put("output", kind=lambda text: str(text).removeprefix("./").rstrip("/"))
    ),
    "seed": put("seed", kind=int),
    **dict.fromkeys(("report_to", "logger_name"), _report_to),
    **dict.fromkeys(
        ("wandb_project", "enable_wandb"), lambda draft, value: _report_to(draft, "wandb") if value else None
    ),
    **dict.fromkeys(("rl", "stage", "trainer_type", "training_stage"), _is_sft),
}
"""{last part of a key, or its whole path: rule}; a whole path goes first."""

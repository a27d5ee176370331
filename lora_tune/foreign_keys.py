"""Keys that a recipe does not have: what other tools call them, what they are called here, and the nearest name."""

from __future__ import annotations

from difflib import get_close_matches

from lora_tune.recipe import Recipe, section_of

# What users of axolotl, LLaMA-Factory, TRL, PEFT, torchtune and Unsloth type, and the key that does it here.
ELSEWHERE: dict[str, str] = {
    # base
    "model": "base.name",
    "model_name": "base.name",
    "model_name_or_path": "base.name",
    "model_id": "base.name",
    "base_model": "base.name",
    "pretrained_model_name_or_path": "base.name",
    "model_revision": "base.revision",
    "load_in_4bit": "base.quantize: nf4",
    "load_in_8bit": "base.quantize: int8",
    "quantization_bit": "base.quantize: nf4 or int8",
    "bnb_4bit_quant_type": "base.quantize: nf4 or fp4",
    "bnb_4bit_use_double_quant": "base.double_quant",
    "double_quantization": "base.double_quant",
    "use_bnb_nested_quant": "base.double_quant",
    "bnb_4bit_compute_dtype": "base.compute_dtype",
    "torch_dtype": "base.compute_dtype",
    "dtype": "base.compute_dtype",
    "bf16": "base.compute_dtype: bfloat16 (auto takes it where the card has it)",
    "fp16": "base.compute_dtype: float16",
    "tf32": "base.compute_dtype: float32",
    "flash_attention": "base.attention: flash_attention_2",
    "flash_attn": "base.attention: flash_attention_2",
    "flash_attn_2": "base.attention: flash_attention_2",
    "use_flash_attention_2": "base.attention: flash_attention_2",
    "attn_implementation": "base.attention",
    "sdp_attention": "base.attention: sdpa",
    "xformers_attention": "base.attention: sdpa",
    "template": "base.chat_template (a Jinja file; without it the base's own template is used)",
    "chat_template_path": "base.chat_template",
    "chat_template_jinja": "base.chat_template",
    # data
    "dataset": "data[].source",
    "datasets": "data",
    "dataset_name": "data[].source",
    "dataset_path": "data[].source",
    "dataset_dir": "data[].source",
    "data_path": "data[].source",
    "data_files": "data[].source",
    "train_file": "data[].source",
    "path": "data[].source",
    "subset": "data[].config",
    "dataset_config": "data[].config",
    "dataset_config_name": "data[].config",
    "dataset_split": "data[].split",
    "dataset_train_split": "data[].split",
    "dataset_text_field": "data[].format: text with data[].columns",
    "field_messages": "data[].columns",
    "column_map": "data[].columns",
    "formatting": "data[].format",
    "conversation": "data[].format",
    "conversation_style": "data[].format",
    "mix_strategy": "data[].weight",
    "interleave_probs": "data[].weight",
    "max_samples": "data[].max_rows",
    "train_on_input": "loss_on: all",
    "train_on_inputs": "loss_on: all",
    "train_on_prompt": "loss_on: all",
    "mask_history": "loss_on: last_assistant",
    "assistant_only_loss": "loss_on: assistant",
    "completion_only_loss": "loss_on: assistant",
    # adapter
    "adapter": "lora.method",
    "finetuning_type": "lora.method",
    "peft_type": "lora.method",
    "use_rslora": "lora.method: rslora",
    "use_dora": "lora.method: dora",
    "peft_use_dora": "lora.method: dora",
    "peft_use_rslora": "lora.method: rslora",
    "pissa_init": "lora.method: pissa",
    "init_lora_weights": "lora.method",
    "loftq_config": "lora.method: loftq",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.targets",
    "lora_target_modules": "lora.targets",
    "lora_target_linear": "lora.targets: all-linear",
    "lora_attn_modules": "lora.targets",
    "apply_lora_to_mlp": "lora.targets",
    "target_modules": "lora.targets",
    "lora_modules_to_save": "lora.modules_to_save",
    "additional_target": "lora.modules_to_save",
    "add_tokens": "lora.new_tokens",
    "tokens": "lora.new_tokens",
    "add_special_tokens": "lora.new_tokens",
    "adapter_name_or_path": "lora.start_from",
    "lora_model_dir": "lora.start_from",
    "loraplus_lr_ratio": "lora.plus_ratio",
    "loraplus_ratio": "lora.plus_ratio",
    # training
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "n_epochs": "train.epochs",
    "max_steps_per_epoch": "train.max_steps",
    "num_iterations": "train.max_steps",
    "iters": "train.max_steps",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup (a share such as 3%)",
    "warmup_steps": "train.warmup (a number of steps)",
    "num_warmup_steps": "train.warmup (a number of steps)",
    "optim": "train.optimizer",
    "max_gradient_norm": "train.max_grad_norm",
    "clip_grad_norm": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "per_device_train_batch_size": "train.micro_batch_size (train.batch_size counts one optimizer step)",
    "per_gpu_train_batch_size": "train.micro_batch_size (train.batch_size counts one optimizer step)",
    "gradient_accumulation_steps": "train.batch_size (sequences per optimizer step; accumulation follows from it)",
    "grad_accumulation_steps": "train.batch_size (sequences per optimizer step; accumulation follows from it)",
    "auto_find_batch_size": "train.micro_batch_size: auto",
    "cutoff_len": "train.max_length",
    "sequence_len": "train.max_length",
    "max_seq_length": "train.max_length",
    "max_seq_len": "train.max_length",
    "model_max_length": "train.max_length",
    "excess_length_strategy": "train.too_long",
    "truncation_mode": "train.too_long",
    "sample_packing": "train.packing",
    "packed": "train.packing",
    "neat_packing": "train.packing (rows are always isolated from each other)",
    "packing_strategy": "train.packing",
    "enable_activation_checkpointing": "train.gradient_checkpointing",
    "use_gradient_checkpointing": "train.gradient_checkpointing",
    "activation_checkpointing": "train.gradient_checkpointing",
    "neftune_noise_alpha": "train.neftune_alpha",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    # evaluation and the run
    "val_set_size": "eval.hold_out",
    "val_size": "eval.hold_out",
    "test_size": "eval.hold_out",
    "test_datasets": "eval.hold_out (a data file)",
    "eval_dataset": "eval.hold_out (a data file)",
    "validation_file": "eval.hold_out (a data file)",
    "eval_steps": "eval.every",
    "evals_per_epoch": "eval.every",
    "load_best_model_at_end": "eval.keep_best",
    "early_stopping_patience": "eval.stop_after",
    "max_eval_samples": "eval.max_rows",
    "output_dir": "output",
    "save_dir": "output",
    "adapter_path": "output",
    "random_state": "seed",
    "random_seed": "seed",
    "data_seed": "seed",
    "report_to": "track",
    "wandb_project": "track: [wandb]",
    "use_wandb": "track: [wandb]",
    "metric_logger": "track",
}

# What other tools ask for and this one settles by itself, and why.
NOT_NEEDED: dict[str, str] = {
    "trust_remote_code": "a recipe never runs code: name the repository on the command line, --trust-remote-code REPO",
    "env": "a recipe sets no environment variables: set them in the shell",
    "plugins": "a recipe never runs code: use lora_tune from Python instead",
    "device": "a GPU is used where there is one: hide it with CUDA_VISIBLE_DEVICES to train on the CPU",
    "device_map": "the base is placed by itself",
    "strict": "every recipe is strict",
    "stage": "training is always supervised fine-tuning",
    "do_train": "training is what `run` does",
    "do_eval": "held-out rows are always evaluated; set how many in eval.hold_out",
    "eval_strategy": "set eval.every",
    "evaluation_strategy": "set eval.every",
    "save_strategy": "set train.save_every; without it every epoch is saved",
    "logging_steps": "every step is written to metrics.jsonl",
    "logging_dir": "logs stand in the output folder",
    "overwrite_output_dir": "give --overwrite on the command line",
    "resume_from_checkpoint": "give --resume on the command line",
    "auto_resume_from_checkpoints": "give --resume on the command line",
    "hub_token": "no secret stands in a recipe: log in with `hf auth login`, or set HF_TOKEN",
    "hf_token": "no secret stands in a recipe: log in with `hf auth login`, or set HF_TOKEN",
    "token": "no secret stands in a recipe: log in with `hf auth login`, or set HF_TOKEN",
    "use_auth_token": "no secret stands in a recipe: log in with `hf auth login`, or set HF_TOKEN",
    "model_type": "read from the base's config.json",
    "tokenizer_type": "read from the base's folder",
    "tokenizer": "the base's own tokenizer is used",
    "special_tokens": "taken from the chat template and the tokenizer; add new ones in lora.new_tokens",
    "group_by_length": "packing makes it superfluous",
    "pad_to_sequence_len": "packing makes it superfluous",
    "padding_free": "always on",
    "remove_unused_columns": "only the columns of the format are read",
    "overwrite_cache": "the cache is keyed by content",
    "preprocessing_num_workers": "chosen by itself",
    "dataset_num_proc": "chosen by itself",
    "dataset_prepared_path": "the cache is keyed by content",
    "bias": "biases stay frozen, so that every server can load the adapter",
    "task_type": "always a causal language model",
    "is_llama_derived_model": "read from the base's config.json",
    "push_to_hub": "sharing is a step of its own, after the run",
    "hub_model_id": "sharing is a step of its own, after the run",
    "deepspeed": "not supported in this version",
    "fsdp": "not supported in this version",
    "plot_loss": "loss.png is always drawn",
}

# Keys of the plan that this version does not have.
PLANNED = ("hardware", "train.budget", "train.max_skipped_steps", "data.*.prompts", "eval.hold_out_tasks")


def recipe_keys() -> list[str]:
    """Every key of a recipe as a path; `data[].source` for the keys of a source."""
    paths: list[str] = []
    for name, field in Recipe.model_fields.items():
        paths.append(name)
        if section := section_of(field):
            paths.extend(f"{name}{'[]' if name == 'data' else ''}.{key}" for key in section.model_fields)
    return paths


def unknown_key(path: str) -> tuple[str, str]:
    """Reason and fix for a key that no recipe has, by its path such as `train.lerning_rate` or `data.0.path`."""
    parts = path.split(".")
    if ".".join("*" if part.isdecimal() else part for part in parts) in PLANNED:
        return "is not supported in this version", "remove it"
    name, keys = parts[-1].lower(), recipe_keys()
    if name in NOT_NEEDED:
        return "unknown key", f"not needed: {NOT_NEEDED[name]}"
    if name in ELSEWHERE:
        return "unknown key", f"here it is {_in_backticks(ELSEWHERE[name])}"
    if same := [key for key in keys if key.rpartition(".")[2] == name]:
        return "unknown key", f"here it is `{'` or `'.join(same)}`"
    section = "".join("[]." if part.isdecimal() else f"{part}." for part in parts[:-1]).replace(".[]", "[]")
    siblings = [key.removeprefix(section) for key in keys if key.startswith(section)]
    siblings = [key for key in siblings if "." not in key]
    if nearest := get_close_matches(name, siblings, n=1, cutoff=0.6):
        return "unknown key", f"did you mean `{nearest[0]}`?"
    names = ELSEWHERE | {key.rpartition(".")[2]: key for key in keys}
    if nearest := get_close_matches(name, names, n=1, cutoff=0.75):
        return "unknown key", f"did you mean {_in_backticks(names[nearest[0]])}?"
    return "unknown key", f"remove it; the keys here are {', '.join(siblings)}" if siblings else "remove it"


def _in_backticks(hint: str) -> str:
    """`key` with its note, which stands in brackets, outside of the backticks."""
    key, bracket, note = hint.partition(" (")
    return f"`{key}`{bracket}{note}"

"""Random LoRA adapters for a base, in PEFT's folder format: for measurements that need many of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from lora_tune.adapter.load import live_shapes
from lora_tune.model.base import load_base
from lora_tune.model.source import find_base
from lora_tune.recipe import Base

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapters(place: Path, base: str, *, count: int, rank: int = 8) -> dict[str, Path]:
    """{name: folder} of so many adapters on all linear layers, each large enough to change the answers."""
    section = Base.model_validate({"name": base, "quantize": "none"})
    shapes = live_shapes(load_base(find_base(section), section))
    modules = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and name.split(".")[-2] in LINEAR
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(LINEAR),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    found = {}
    for number in range(count):
        draw = torch.Generator().manual_seed(number)
        tensors = {}
        for module, (outputs, inputs) in modules.items():
            key = f"base_model.model.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn((rank, inputs), generator=draw) / inputs**0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn((outputs, rank), generator=draw) * 0.02
        folder = place / f"adapter-{number}"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(tensors, folder / "adapter_model.safetensors")
        found[folder.name] = folder
    return found

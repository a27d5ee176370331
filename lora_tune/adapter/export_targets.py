"""The layouts that an adapter can be written in: one line each. No torch before one of them runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lora_tune.adapter.export_canonical import write_canonical, write_sglang, write_vllm
from lora_tune.adapter.export_job import Job, Written
from lora_tune.adapter.export_merged import write_merged
from lora_tune.adapter.export_mlx import write_mlx
from lora_tune.adapter.export_ollama import write_gguf, write_merged_gguf, write_ollama, write_ollama_adapter

TARGETS: dict[str, Callable[[Job, Path], Written]] = {
    "canonical": write_canonical,
    "vllm": write_vllm,
    "sglang": write_sglang,
    "mlx": write_mlx,
    "merged": write_merged,
    "gguf": write_gguf,
    "gguf-merged": write_merged_gguf,
    "ollama": write_ollama,
    "ollama-adapter": write_ollama_adapter,
}
"""{--to: the function that writes it into an empty folder}; `OUTPUT` in its `how` becomes the folder's place."""

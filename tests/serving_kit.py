"""Served models for tests: a tiny base with random adapters, asked in one event loop."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lora_tune.adapter.load import live_shapes
from lora_tune.model.base import load_base
from lora_tune.model.source import find_base
from lora_tune.recipe import Base
from lora_tune.serving.backend import Backend, Finished, Piece, Request, Sampling, TokenLogprob

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base_section(folder: Path | str, *, quantize: str = "none") -> Base:
    """A base as a recipe names it, in float32."""
    return Base.model_validate({"name": str(folder), "quantize": quantize, "compute_dtype": "float32"})


def write_adapter(
    folder: Path, base: Path | str, *, seed: int, rank: int = 4, targets: Sequence[str] = LINEAR, **settings: Any
) -> Path:
    """A plain PEFT folder, as other tools write them, with random numbers large enough to change the answers."""
    shapes = live_shapes(load_base(find_base(base_section(base)), base_section(base)))
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets and len(shape) == 2:
            key = f"base_model.model.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn((rank, shape[1]), generator=draw) / shape[1] ** 0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn((shape[0], rank), generator=draw) * 0.3
            if settings.get("use_dora"):
                tensors[f"{key}.lora_magnitude_vector"] = torch.rand((shape[0],), generator=draw) + 0.5
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": Path(base).name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        **settings,
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@dataclass(frozen=True)
class Said:
    """One whole answer."""

    text: str
    ids: tuple[int, ...]
    end: Finished
    logprobs: tuple[TokenLogprob, ...]
    pieces: tuple[Piece, ...]


async def ask(backend: Backend, model: str, prompt: Sequence[int], sampling: Sampling) -> Said:
    """Ask, and wait for the whole answer."""
    pieces: list[Piece] = []
    async with aclosing(backend.stream(Request(model, tuple(prompt), sampling))) as stream:
        async for item in stream:
            if isinstance(item, Finished):
                logprobs = tuple(one for piece in pieces for one in piece.logprobs)
                ids = tuple(token for piece in pieces for token in piece.ids)
                return Said("".join(piece.text for piece in pieces), ids, item, logprobs, tuple(pieces))
            pieces.append(item)
    raise AssertionError("the stream ended without Finished")


async def ask_all(backend: Backend, asked: Sequence[tuple[str, Sequence[int], Sampling]]) -> list[Said]:
    """Ask everything at once."""
    return list(await asyncio.gather(*(ask(backend, *one) for one in asked)))


def prompt(number: int) -> list[int]:
    """Prompts of different lengths over the tokens of the tiny base, each by its number."""
    draw = random.Random(number)
    return [draw.randrange(4, 260) for _ in range(draw.randint(3, 50))]

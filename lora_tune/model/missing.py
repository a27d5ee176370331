"""What a recipe asks of this machine that is not installed here, known before anything is downloaded or read (cold).

A run asks before its data is read; a plan, which may be for another machine, does not.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator

from lora_tune.errors import Problem
from lora_tune.model.device import Device, this_machine
from lora_tune.recipe import Base, Train

_COMPILERS = ("g++", "c++", "clang++")
_C_COMPILERS = ("gcc", "clang")  # that Triton looks for where CC names none


def missing_problems(base: Base, train: Train) -> list[Problem]:
    """Everything that a run of these sections needs and this machine lacks."""
    found: list[Problem] = []
    if base.attention == "flash_attention_2":
        found += attention_problems(base, this_machine().device)
    if train.compile == "layers":
        found += compiler_problems(this_machine().device)
    return found


def attention_problems(base: Base, device: Device) -> Iterator[Problem]:
    """What `base.attention` needs: the package, of which no code is fetched from a hub instead, and a GPU."""
    if base.attention != "flash_attention_2":
        return
    fix = "set it to auto"
    if importlib.util.find_spec("flash_attn") is None:
        reason = "flash_attention_2 needs the package flash_attn, which is not installed"
        yield Problem(reason, f"{fix}, or pip install flash-attn", key="base.attention")
    elif device == "cpu":
        yield Problem("flash_attention_2 needs a GPU, and there is none here", fix, key="base.attention")


def compiler_problems(device: Device) -> Iterator[Problem]:
    """What `train.compile: layers` needs: a C++ compiler on a CPU, Triton and a C compiler on a GPU."""
    if device == "cuda":
        builds = "CC" in os.environ or any(shutil.which(name) for name in _C_COMPILERS)
        missing = "" if builds else "there is no C compiler, which Triton needs"
        missing = missing if importlib.util.find_spec("triton") else "Triton is not installed"
    else:
        missing = "" if any(shutil.which(name) for name in _COMPILERS) else "there is no C++ compiler"
    if missing:
        reason = f"layers cannot be compiled here: {missing}"
        yield Problem(reason, "set it to off, or install it", key="train.compile")

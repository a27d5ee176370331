"""Where a process stands among those of a run, read from what a launcher put into the environment (cold).

torchrun, Kubeflow's trainer, dstack and SkyPilot with torchrun set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT; srun sets SLURM_PROCID and the like. Our own launcher (`agent.py`) is torchrun's.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from lora_tune.errors import UsageError

ENDINGS = "LORA_TUNE_ENDINGS"  # folder in which processes that our launcher started leave how they ended
# names by which accelerate, transformers and DeepSpeed would start a distributed run of their own
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
_PORT = 29_500


@dataclass(frozen=True, slots=True)
class Place:
    """The process `rank` of `world`, `local_rank` on its machine; `address` and `port` are those of rank 0."""

    rank: int
    world: int
    local_rank: int
    address: str
    port: int


def place_here(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that a launcher gave this process; None where it was started alone.

    Raises:
        UsageError: the launcher's variables are half there or are no numbers.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = {"rank": "RANK", "world": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
        address = environment.get("MASTER_ADDR", "")
    elif "SLURM_STEP_ID" in environment and int(environment.get("SLURM_NTASKS", "1") or 1) > 1:
        names = {"rank": "SLURM_PROCID", "world": "SLURM_NTASKS", "local_rank": "SLURM_LOCALID"}
        address = environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", ""))
    else:
        return None
    numbers = {}
    for field, name in names.items():
        text = environment.get(name, "")
        if not text.isdecimal():
            raise UsageError(f"the launcher's {name} must be a number, got {text!r}", "look at how it starts processes")
        numbers[field] = int(text)
    if not numbers["rank"] < numbers["world"]:
        said = f"rank {numbers['rank']} of {numbers['world']}"
        raise UsageError(f"the launcher's {names['rank']} must be below its {names['world']}, got {said}")
    if numbers["world"] == 1:
        return None
    if not address:
        raise UsageError(
            "the launcher does not say where rank 0 is, MASTER_ADDR is not set", "set it for all processes"
        )
    return Place(address=address, port=_port(environment), **numbers)


def _port(environment: Mapping[str, str]) -> int:
    text = environment.get("MASTER_PORT", "")
    if text.isdecimal():
        return int(text)
    job = environment.get("SLURM_JOB_ID", "")
    return _PORT + int(job) % 10_000 if job.isdecimal() else _PORT


def first_host(nodes: str) -> str:
    """The first machine of a list in SLURM's notation: `gpu[03-05,9],login` is `gpu03`."""
    match = re.match(r"([^,\[]*)(?:\[([^\]]*)\])?([^,]*)", nodes)
    if match is None:
        return ""
    name, numbers, rest = match.groups()
    return name + (re.split(r"[,-]", numbers)[0] if numbers else "") + rest


def take_card(place: Place, environment: MutableMapping[str, str] = os.environ) -> None:
    """Leave this process one visible GPU, its own, before torch looks; where the launcher did so already, nothing.

    With it everything here goes on to mean the first visible GPU when it says GPU.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    cards = visible.split(",") if visible else None
    if cards is None:
        environment["CUDA_VISIBLE_DEVICES"] = str(place.local_rank)
    elif len(cards) > 1:
        if place.local_rank >= len(cards):
            said = f"{len(cards)} are visible to the process of local rank {place.local_rank}"
            raise UsageError(f"there are more processes than GPUs: {said}", "start one process for each GPU")
        environment["CUDA_VISIBLE_DEVICES"] = cards[place.local_rank]


def interface_to(address: str) -> str | None:
    """The network interface of this machine that leads to an address; gloo would take that of the machine's name."""
    import psutil

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
            probe.connect((address, 9))
            own = probe.getsockname()[0]
    except OSError:
        return None
    found = psutil.net_if_addrs().items()
    return next((name for name, places in found if any(place.address == own for place in places)), None)


def leave_alone(environment: MutableMapping[str, str] = os.environ) -> None:
    """Take the launcher's variables out of the environment, once they are read.

    accelerate and transformers would join by them in ways of their own: on a CPU without FSDP, with rows repeated to
    fill the last batch. For them every process here is the only one; what is shared is shared by `team.py`.
    """
    for name in (*_NAMES, *(name for name in environment if name.startswith(("SLURM_PROCID", "SLURM_NTASKS")))):
        environment.pop(name, None)

"""The processes of one run: what they tell each other, and who is missing when one does not answer.

Every process has one team, as torch has one default group; a process that was started alone is a team of one, and all
of this does nothing then. What is told goes through gloo, on the CPU; the gradients of cards go through NCCL.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from lora_tune.errors import Problem, ResourceError, UsageError
from lora_tune.model.strategy import Layout, Name
from lora_tune.training.place import Place, interface_to, leave_alone

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_PATIENCE = timedelta(hours=1)
_ALIVE_S = 5.0  # how long one who asks waits for what another has written


class PeerLost(ResourceError):
    """Another process of the run is gone, or has not answered in time (exit 4).

    `teller` is the first of the processes that are left.
    """

    teller = 0


def _end_if_here(where: str) -> None:
    """End a process that does not answer, where it is on this machine: it holds its card and hears no signal."""
    match = re.fullmatch(r"pid (\d+) on (.*)", where)
    if match and match[2] == socket.gethostname():
        with suppress(ProcessLookupError, PermissionError):
            os.kill(int(match[1]), signal.SIGKILL)


@dataclass(slots=True)
class Team:
    """The processes of a run as one of them sees it. `started` counts what it has told the others so far."""

    rank: int = 0
    world: int = 1
    layout: Layout = field(default_factory=Layout)
    store: Any = None
    control: Any = None  # the group over gloo, patient until the training begins
    strict: Any = None  # the same with hardware.timeout
    first_place: str = ""
    started: int = 0

    @property
    def strategy(self) -> Name:
        """How the processes share the run."""
        return self.layout.strategy

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.world > 1

    @property
    def divided(self) -> bool:
        """Whether each process holds only a part of the base, so that all must do the same at the same time."""
        return self.strategy in ("fsdp2", "zero3")

    def sum(self, number: int) -> int:
        """The sum of a number over all processes, exact."""
        if not self.several:
            return number
        import torch
        import torch.distributed as dist

        total = torch.tensor([number], dtype=torch.int64)
        self._told("adding up", lambda: dist.all_reduce(total, group=self.control))
        return int(total)

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if not self.several:
            return number
        import torch
        import torch.distributed as dist

        largest = torch.tensor([number], dtype=torch.int64)
        self._told("agreeing", lambda: dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control))
        return int(largest)

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add these tensors up over all processes, in place: as one buffer, in float32."""
        if not self.several or not tensors:
            return
        import torch
        import torch.distributed as dist

        flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
        self._told("adding gradients", lambda: dist.all_reduce(flat))
        with torch.no_grad():
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def share(self, value: T) -> T:
        """What the first process has here; the others give what they like."""
        if not self.several:
            return value
        import torch.distributed as dist

        box = [value if self.first else None]
        self._told("listening", lambda: dist.broadcast_object_list(box, src=0, group=self.control))
        return box[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """What each process has here, by rank."""
        if not self.several:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        self._told("comparing", lambda: dist.all_gather_object(values, value, group=self.control))
        return values

    def require_equal(self, value: Any, what: str, fix: str) -> None:
        """Refuse to go on where a process has another value than the first. Raises: UsageError naming it."""
        for rank, other in enumerate(self.gather(value)):
            if other != value:
                raise UsageError(f"process {rank} has another {what} than process {self.rank}", fix)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Inside, a process that does not answer for `hardware.timeout` is lost; outside, some load for longer."""
        patient = self.control
        if self.several:
            self.most(0)  # all have loaded
            self.control = self.strict
        try:
            yield
        finally:
            self.control = patient

    @contextmanager
    def in_turn(self, name: str) -> Iterator[None]:
        """Inside, the first process is alone; the others come when it has left, however long that takes.

        What it leaves in a cache (tokens, downloads) is there for them then.
        """
        if not self.several:
            yield
            return
        if not self.first:
            while not self.store.check([f"lora_tune/{name}"]):
                time.sleep(0.05)  # in pieces, so that a signal is heard
            if self._read(f"lora_tune/{name}") == "failed":
                raise PeerLost(f"process 0 failed before the others could begin ({name})")
            yield
            return
        left = "failed"
        try:
            yield
            left = "left"
        finally:
            self.store.set(f"lora_tune/{name}", left)

    def reached(self, doing: str) -> None:
        """Note how far this process is, where others wait for it inside of torch."""
        if self.divided:
            self.started += 1
            self.store.set(f"lora_tune/{self.rank}", f"{self.started} {doing}")

    def lost(self, error: BaseException) -> PeerLost | None:
        """What to say where this error comes from a process that is gone; None where it is another error."""
        text = str(error).lower()
        known = ("connection", "timed out", "timeout", "broken pipe", "nccl", "socket", "gloo", "peer")
        if not self.several or not isinstance(error, RuntimeError) or not any(word in text for word in known):
            return None
        return self._missing(waited="timed out" in text or "timeout" in text)

    def _told(self, doing: str, tell: Callable[[], Any]) -> None:
        """Tell the others something. Raises: PeerLost naming who is missing."""
        self.started += 1
        try:
            self.store.set(f"lora_tune/{self.rank}", f"{self.started} {doing}")
            tell()
        except RuntimeError as error:
            found = self.lost(error)
            if found is None:
                raise
            raise found from None

    def _missing(self, *, waited: bool) -> PeerLost:
        """Who has not come as far as this process has."""
        said = f"has not answered for {self.layout.timeout_s:g} s (hardware.timeout)" if waited else "is gone"
        places = self._behind()
        if places is None:  # the first one keeps what the processes write for each other
            places = {0: self.first_place}
        for where in places.values() if waited else ():
            _end_if_here(where)
        who = ", ".join(f"{rank} ({where})" for rank, where in places.items()) or "of another rank"
        lost = PeerLost(Problem(f"process {who} {said}", _RESUME))
        lost.teller = min(rank for rank in range(self.world) if rank not in places)
        return lost

    def _behind(self) -> dict[int, str] | None:
        """The processes that have not come as far, and where they are; None where nobody can be asked.

        Asked by a thread: the store has no limit for the time in which it answers.
        """
        found: list[dict[int, str]] = []

        def ask() -> None:
            with suppress(RuntimeError, ValueError, IndexError):
                others = [rank for rank in range(self.world) if rank != self.rank]
                reached = {rank: int(self._read(f"lora_tune/{rank}").split()[0]) for rank in others}
                late = [rank for rank in others if reached[rank] < self.started]
                found.append({rank: self._read(f"lora_tune/where/{rank}") for rank in late})

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(_ALIVE_S)
        return found[0] if found else None

    def _read(self, key: str) -> str:
        """What another process has written, `0` where it has not."""
        return self.store.get(key).decode() if self.store.check([key]) else "0"


_RESUME = "the checkpoints stay: the same command with --resume goes on from the newest"
ALONE = Team()
_here = [ALONE]


def here() -> Team:
    """The team of this process."""
    return _here[-1]


@contextmanager
def joined(place: Place | None, layout: Layout) -> Iterator[Team]:
    """Inside, this process belongs to the team that its launcher started; without a place it is alone.

    Raises:
        UsageError: the processes do not find each other, or are not as many as the launcher said.
    """
    if place is None:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=layout.timeout_s)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    interface = interface_to(place.address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        os.environ.update(MASTER_ADDR=place.address, MASTER_PORT=str(place.port))
        dist.init_process_group(backend, rank=place.rank, world_size=place.world, timeout=limit)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        where = f"{place.address}:{place.port}"
        raise UsageError(
            f"process {place.rank} of {place.world} does not find the others at {where}: {reason}"
        ) from error
    try:
        control = dist.new_group(backend="gloo", timeout=max(limit, _PATIENCE))
        strict = dist.new_group(backend="gloo", timeout=limit)
        store: Any = dist.distributed_c10d._get_default_store()
        store.set(f"lora_tune/where/{place.rank}", f"pid {os.getpid()} on {socket.gethostname()}")
        team = Team(place.rank, place.world, layout, store, control, strict)
        team.first_place = team.share(f"pid {os.getpid()} on {socket.gethostname()}")
        leave_alone()
        if dist.get_world_size() != layout.world:
            said = f"{dist.get_world_size()} processes, {layout.world} planned"
            raise UsageError(f"the launcher started another number of processes than it said: {said}")
        _here.append(team)
        yield team
    finally:
        if _here[-1] is not ALONE:
            _here.pop()
        if dist.is_initialized():
            dist.destroy_process_group()

"""Starting the processes of a run on this machine: torchrun's elastic agent as a library, one message at the end.

Each process is `lora-tune run` with the same arguments and a place in its environment, as under torchrun itself. The
agent ends all of them when one fails, and hands signals on. How a process ended it leaves in a file; what the user is
told is the ending that came first.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from lora_tune.errors import Interrupted, LoraTuneError, Problem, ResourceError, UsageError
from lora_tune.interrupts import signal_name
from lora_tune.model.strategy import Layout
from lora_tune.training.place import ENDINGS

_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGUSR1"
_GOES_ON = "the same command with --resume goes on from the newest checkpoint"


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process ended: its error, when (seconds since 1970), and whether it only lost another one."""

    rank: int
    exit_code: int
    problems: list[dict[str, Any]]
    at: float
    lost: bool

    def error(self) -> LoraTuneError:
        """The error as it was raised."""
        problems = [Problem(**problem) for problem in self.problems]
        if self.exit_code > 128:
            return Interrupted(self.exit_code - 128, "\n".join(map(str, problems)))
        found = LoraTuneError(problems)
        found.exit_code = self.exit_code
        return found


def leave_ending(rank: int, error: LoraTuneError, *, cause: Literal["own", "another was lost"]) -> bool:
    """Write how this process ended, for the launcher to tell; False where no launcher of ours asked for it."""
    folder = os.environ.get(ENDINGS)
    if folder is None:
        return False
    problems = [asdict(problem) for problem in error.problems]
    ending = Ending(rank, error.exit_code, problems, time.time(), cause != "own")
    part = Path(folder) / f".{rank}"
    part.write_text(json.dumps(asdict(ending)), encoding="utf-8")
    part.rename(Path(folder) / f"{rank}.json")
    return True


def run_processes(layout: Layout, arguments: Sequence[str]) -> None:
    """Run `lora-tune run` with these arguments in every process of this machine, until all have ended.

    Raises:
        LoraTuneError: what the process that failed first had to say.
        ResourceError: a process was killed.
        Interrupted: a signal came and was handed on.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # read when torch is imported
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    with TemporaryDirectory(prefix="lora_tune-endings-") as folder:
        os.environ[ENDINGS] = folder
        try:
            elastic_launch(_config(layout), sys.executable)("-m", "lora_tune", "run", *arguments)
        except ChildFailedError as error:
            raise _first(_endings(Path(folder)), error.failures) from None
        except SignalException as stopped:
            number = int(stopped.sigval)
            endings = [ending for ending in _endings(Path(folder)) if ending.exit_code == 128 + number]
            said = f"stopped by {signal_name(number)}; {_GOES_ON}"
            raise endings[0].error() if endings else Interrupted(number, said) from None
        finally:
            os.environ.pop(ENDINGS, None)


def _config(layout: Layout) -> Any:
    from torch.distributed.launcher.api import LaunchConfig

    environment = os.environ
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // layout.processes)))
    settings: dict[str, Any] = {
        "min_nodes": layout.nodes,
        "max_nodes": layout.nodes,
        "nproc_per_node": layout.processes,
        "max_restarts": 0,  # what failed is resumed by whom the user asks to, with --resume
        "monitor_interval": 0.1,
        "signals_to_handle": _SIGNALS,
        "shutdown_timeout": max(30, int(layout.timeout_s)),  # a step and its checkpoint take their time
    }
    if layout.nodes == 1:
        return LaunchConfig(
            **settings,
            run_id=f"{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",
        )
    address, port, rank = (environment.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"))
    if not (address and port.isdecimal() and rank.isdecimal() and int(rank) < layout.nodes):
        fix = (
            f"set MASTER_ADDR and MASTER_PORT of the first machine, and NODE_RANK 0 to {layout.nodes - 1}, on each, or \
start the same command with torchrun or srun"
        )
        said = f"{layout.nodes} machines do not find each other: got {address or 'no MASTER_ADDR'}:{port or 'no port'}"
        raise UsageError(Problem(f"{said}, NODE_RANK {rank or 'not set'}", fix, key="hardware.nodes"))
    rendezvous = {"rank": int(rank), "timeout": int(layout.timeout_s)}
    return LaunchConfig(
        **settings,
        run_id="lora_tune",
        rdzv_backend="static",
        rdzv_endpoint=f"{address}:{port}",
        rdzv_configs=rendezvous,
    )


def _endings(folder: Path) -> list[Ending]:
    """What the processes left, the first one first."""
    found = [Ending(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.json")]
    return sorted(found, key=lambda ending: (ending.at, ending.rank))


def _first(endings: Sequence[Ending], failures: Mapping[int, Any]) -> LoraTuneError:
    """The ending that made the others end: a process that was killed, else the first error that is not of a loss."""
    said = {ending.rank for ending in endings}
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and rank not in said:
            name, stays = signal_name(-failure.exitcode), _GOES_ON
            return ResourceError(Problem(f"process {rank} (pid {failure.pid}) was killed by {name}", stays))
    causes = [ending for ending in endings if not ending.lost] or list(endings)
    if causes:
        return causes[0].error()
    rank, failure = min(failures.items())
    return LoraTuneError(f"process {rank} ended with {failure.exitcode} and said nothing; {_GOES_ON}")

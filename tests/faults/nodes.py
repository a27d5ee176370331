"""Two machines for a run: network namespaces of this one, each with a name of its own, and a cable that can be cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.faults.driver import ROOT

NAMES = ("lora-a", "lora-b")
_ADDRESSES = ("10.77.0.1", "10.77.0.2")


def possible() -> bool:
    """Whether this user may make network namespaces."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    made = subprocess.run(["ip", "netns", "add", "lora-try"], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "del", "lora-try"], capture_output=True, check=False)
    return made


@contextmanager
def two_machines() -> Iterator[None]:
    """Inside, the two namespaces are joined by a cable; afterwards they are gone."""
    try:
        for name in NAMES:
            _ip("netns", "add", name)
        _ip("link", "add", "va", "netns", NAMES[0], "type", "veth", "peer", "name", "vb", "netns", NAMES[1])
        for name, link, address in zip(NAMES, ("va", "vb"), _ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            _ip("-n", name, "link", "set", link, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def cable(state: str) -> None:
    """Cut the cable (`down`) or mend it (`up`)."""
    _ip("-n", NAMES[1], "link", "set", "vb", state)


def start(number: int, work: Path, arguments: Sequence[str]) -> subprocess.Popen[str]:
    """`lora-tune run ARGUMENTS` on one of the machines, which start one process each."""
    command = [sys.executable, "-m", "lora_tune", "run", *arguments, "hardware.nodes=2", "hardware.processes=1"]
    own = {"MASTER_ADDR": _ADDRESSES[0], "MASTER_PORT": "29711", "NODE_RANK": str(number), "PYTHONPATH": str(ROOT)}
    named = ["unshare", "--uts", "sh", "-c", f'hostname {NAMES[number]}; exec "$0" "$@"', *command]
    return subprocess.Popen(
        ["ip", "netns", "exec", NAMES[number], *named],
        cwd=work,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **own},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(machine: subprocess.Popen[str]) -> None:
    """Pull the plug of a machine: its launcher and its process."""
    found = subprocess.run(["ip", "netns", "pids", NAMES[1]], capture_output=True, text=True, check=True).stdout.split()
    for pid in found:
        os.kill(int(pid), signal.SIGKILL)
    machine.wait()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)

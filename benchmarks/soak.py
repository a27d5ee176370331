"""A server under everything at once for half an hour: load, adapters that come and go every second, hostile requests.

`python -m benchmarks.soak --minutes 30` (or `make soak`) starts `lora-tune serve` over a built-in base with eight
random adapters, asks it from sixteen connections, loads and unloads a ninth adapter every second (each tenth time a
damaged one), and sends one hostile request for nine honest ones. Every honest answer is compared with the first one to
the same question, which was asked alone. Memory, threads and open files of the server are read every second. Fails, and
says why, where an honest client got an error or another answer, or where the server grew. Writes
benchmarks/results/soak.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.load_client import Connection
from benchmarks.random_adapters import write_adapters
from benchmarks.serve import ROOT, WORDS, server

CLIENTS = 16
WARM_UP = 0.2  # of the time: the memory that a server settles at
MOST_GROWTH = 0.02
_DEEP = b'{"model": "x", "prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"


@dataclass
class Findings:
    """What happened."""

    honest: Counter[int] = field(default_factory=Counter)
    hostile: Counter[int] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)
    """Seconds since the start; bytes resident, threads, open files of the server."""

    def problems(self) -> list[str]:
        """What must not have happened."""
        found = list(dict.fromkeys(self.wrong))[:5]
        found += [f"{count} honest requests got {status}" for status, count in self.honest.items() if status != 200]
        found += [f"{count} hostile requests got {status}" for status, count in self.hostile.items() if status >= 500]
        settled = self.samples[int(WARM_UP * len(self.samples)) :]
        if len(settled) >= 100:  # memory of a few seconds says nothing
            tenth = max(1, len(settled) // 10)
            before, after = ([one[1] for one in part] for part in (settled[:tenth], settled[-tenth:]))
            growth = statistics.median(after) / statistics.median(before) - 1
            if growth >= MOST_GROWTH:
                found.append(f"memory grew by {growth:.1%} after the warm-up")
            threads = [statistics.median(one[2] for one in part) for part in (settled[:tenth], settled[-tenth:])]
            if threads[1] > threads[0]:
                found.append(f"threads grew from {threads[0]} to {threads[1]}")
            files = [statistics.median(one[3] for one in part) for part in (settled[:tenth], settled[-tenth:])]
            if files[1] > files[0] + 2:  # connections of hostile clients come and go
                found.append(f"open files grew from {files[0]} to {files[1]}")
        return found


def question(number: int, models: list[str]) -> dict[str, Any]:
    """One of the questions whose answer is known."""
    prompt = WORDS[number // len(models) % len(WORDS)]
    return {"model": models[number % len(models)], "prompt": prompt, "max_tokens": 8 + number % 5, "temperature": 0}


def hostile(number: int) -> tuple[str, Any]:
    """Path and body of a request that must be refused."""
    good = {"model": "adapter-0", "prompt": "x", "max_tokens": 2}
    cases: list[tuple[str, Any]] = [
        ("/v1/completions", b"{"),
        ("/v1/completions", b"\xff\xfe"),
        ("/v1/completions", _DEEP),
        ("/v1/completions", {**good, "model": "../adapter-0"}),
        ("/v1/completions", {**good, "model": "nobody"}),
        ("/v1/completions", {**good, "n": 10**6}),
        ("/v1/completions", {**good, "max_tokens": 10**9}),
        ("/v1/completions", {**good, "max_tokens": -1}),
        ("/v1/completions", {**good, "temperature": -1}),
        ("/v1/completions", {**good, "stop": ["a"] * 10_000}),
        ("/v1/completions", {**good, "prompt": "word " * 20_000}),
        ("/v1/chat/completions", {"model": "adapter-1", "messages": []}),
        ("/v1/chat/completions", {"model": "adapter-1", "messages": [{"role": "bot", "content": "x"}]}),
        ("/v1/chat/completions", {"model": "adapter-1", "messages": [{"role": "user", "content": "x"}] * 10_000}),
        ("/v1/load_lora_adapter", {"lora_name": "../../x", "lora_path": "/etc"}),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "../../etc"}),
        ("/v1/unload_lora_adapter", {"lora_name": "nobody"}),
        ("/nowhere", {}),
    ]
    return cases[number % len(cases)]


async def honest_client(url: str, models: list[str], known: dict[str, str], found: Findings, *, until: float) -> None:
    """Ask one question after the other until the time is over."""
    connection, number = Connection(url, None), hash(id(found)) % 97
    while time.monotonic() < until:
        number += 1
        asked, began = question(number, models), time.perf_counter()
        try:
            status, body = await connection.post("/v1/completions", asked)
        except (OSError, asyncio.IncompleteReadError) as error:
            found.wrong.append(f"an honest request was dropped: {type(error).__name__}")
            connection.close()
            continue
        found.honest[status] += 1
        if status == 200:
            found.latencies.append(time.perf_counter() - began)
            text = json.loads(body)["choices"][0]["text"]
            if known.setdefault(json.dumps(asked), text) != text:
                found.wrong.append(f"another answer to {asked}")
    connection.close()


async def hostile_client(url: str, found: Findings, *, until: float) -> None:
    """One hostile request for nine honest ones; each tenth client leaves before its answer."""
    number = 0
    while time.monotonic() < until:
        if number >= sum(found.honest.values()) / 9:
            await asyncio.sleep(0.01)
            continue
        number += 1
        connection = Connection(url, None)
        path, body = hostile(number)
        try:
            if number % 10 == 0:
                leaving = connection.post("/v1/completions", {"model": "adapter-2", "prompt": "x", "max_tokens": 400})
                with suppress(TimeoutError):
                    await asyncio.wait_for(leaving, timeout=0.05)
            else:
                status, _ = await asyncio.wait_for(connection.post(path, body), timeout=30)
                found.hostile[status] += 1
        except (OSError, asyncio.IncompleteReadError, TimeoutError, IndexError):
            found.hostile[0] += 1  # the connection was closed
        connection.close()


async def changing_client(url: str, guest: Path, broken: Path, found: Findings, *, until: float) -> None:
    """Load and unload an adapter every second; each tenth time one that must be refused."""
    connection, number = Connection(url, None), 0
    while time.monotonic() < until:
        number += 1
        folder = broken if number % 10 == 0 else guest
        status, body = await connection.post("/v1/load_lora_adapter", {"lora_name": "guest", "lora_path": str(folder)})
        found.changes["refused" if status != 200 else "loaded"] += 1
        if (status == 200) != (folder is guest):
            found.wrong.append(f"loading {folder.name}: {status} {body[:200]!r}")
        if status == 200:
            await connection.post("/v1/completions", {"model": "guest", "prompt": "x", "max_tokens": 4})
            status, body = await connection.post("/v1/unload_lora_adapter", {"lora_name": "guest"})
            found.changes["unloaded"] += status == 200
            if status != 200:
                found.wrong.append(f"unloading: {status} {body[:200]!r}")
        await asyncio.sleep(1)
    connection.close()


async def watch(process: psutil.Process, found: Findings, *, until: float) -> None:
    """Memory, threads and open files of the server, every second."""
    began = time.monotonic()
    while time.monotonic() < until:
        with process.oneshot():
            sample = (process.memory_info().rss, process.num_threads(), process.num_fds())
        found.samples.append((round(time.monotonic() - began, 1), *sample))
        await asyncio.sleep(1)


async def soak(
    url: str, models: list[str], folders: tuple[Path, Path], process: psutil.Process, *, seconds: float
) -> Findings:
    """Everything at once for so many seconds. `folders`: the guest and the damaged one."""
    found, known = Findings(), dict[str, str]()
    alone = Connection(url, None)
    for number in range(len(models) * len(WORDS) * 5):  # what each question's answer is when nobody else asks
        asked = question(number, models)
        status, body = await alone.post("/v1/completions", asked)
        if status != 200:
            found.wrong.append(f"the first answer to {asked}: {status} {body[:200]!r}")
            return found
        known[json.dumps(asked)] = json.loads(body)["choices"][0]["text"]
    alone.close()
    until = time.monotonic() + seconds
    await asyncio.gather(
        *(honest_client(url, models, known, found, until=until) for _ in range(CLIENTS)),
        hostile_client(url, found, until=until),
        changing_client(url, *folders, found, until=until),
        watch(process, found, until=until),
    )
    return found


def damaged(folder: Path, target: Path) -> Path:
    """A copy of an adapter folder whose file of tensors has lost its end."""
    shutil.copytree(folder, target)
    weights = target / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return target


def table(found: Findings, *, minutes: float) -> str:
    """The findings for people."""
    ordered = sorted(found.latencies) or [0.0]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "uvicorn"))
    lines = [
        f"# Soak of {minutes:g} minutes",
        "",
        f"`python -m benchmarks.soak --minutes {minutes:g}`; {psutil.cpu_count()} cores; {versions}",
        "",
        "| what | found |",
        "|---|---|",
        f"| honest requests, by status | {dict(found.honest)} |",
        f"| answers other than the one given alone, drops, failed changes | {len(found.wrong)} |",
        f"| p50, p99 of honest requests | {1000 * ordered[len(ordered) // 2]:.0f} ms, "
        f"{1000 * ordered[int(0.99 * (len(ordered) - 1))]:.0f} ms |",
        f"| hostile requests, by status (0: connection closed) | {dict(sorted(found.hostile.items()))} |",
        f"| adapters loaded, unloaded, refused | {found.changes['loaded']}, {found.changes['unloaded']}, "
        f"{found.changes['refused']} |",
        "",
        "| at | resident MiB | threads | open files |",
        "|---|---|---|---|",
    ]
    step = max(1, len(found.samples) // 12)
    for at, rss, threads, files in [*found.samples[::step], *found.samples[-1:]]:
        lines.append(f"| {at:.0f} s | {rss / 2**20:.0f} | {threads} | {files} |")
    problems = found.problems()
    return "\n".join([*lines, "", *(f"- {one}" for one in problems or ["nothing amiss"]), ""])


def main() -> int:
    """Soak and write the result; 1 where something is amiss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--base", default="builtin:quickstart")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "soak.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folders = write_adapters(Path(place), options.base, count=9)
        guest = folders.pop("adapter-8")
        broken = damaged(guest, Path(place) / "broken")
        command = ["-m", "lora_tune.serve", "--base", options.base, "--quantize", "none", "--port", "0", "--json"]
        command += ["--allow-loading", place]
        for name, folder in folders.items():
            command += ["--adapter", f"{name}={folder}"]
        with server(command) as (url, process):
            found = asyncio.run(soak(url, list(folders), (guest, broken), process, seconds=60 * options.minutes))
    text = table(found, minutes=options.minutes)
    options.output.write_text(text, encoding="utf-8")
    print(text)
    return 1 if found.problems() else 0


if __name__ == "__main__":
    sys.exit(main())

"""Serving under load: clients × adapters over HTTP, beside a plain `generate` server and any engine by its URL.

`python -m benchmarks.serve` writes benchmarks/results/serve.json. It starts `lora-tune serve` over a built-in base with
eight random adapters and a plain server with the same, and asks both in turn from 1, 16, 64 and 128 connections, eight
new tokens each; then, in this process, it measures what mixing adapters in one batch is worth. `--url URL --models a,b`
asks an engine that runs already. CPU seconds are those of the server's process: on a shared machine they say more than
the clock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.load_client import first_tokens, run_load
from benchmarks.machine import result_file
from benchmarks.random_adapters import write_adapters

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("Name a colour.", "What is the capital of Finland?", "Count to ten.", "Who wrote it, and when was it printed?")
LEVELS = (1, 16, 64, 128)


@contextmanager
def server(command: list[str]) -> Iterator[tuple[str, psutil.Process]]:
    """Start a server that prints its address as its first line, or in a JSON object: its URL and its process."""
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            while process.stdout and line.startswith("{") and not line.rstrip().endswith("}"):
                line += process.stdout.readline()
            yield json.loads(line)["url"] if line.startswith("{") else line.strip(), psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


def measure(
    servers: dict[str, tuple[str, psutil.Process | None]], models: list[str], *, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row for each server and number of clients, the servers in turn."""
    rows = []
    for clients in options.clients:
        for name, (url, process) in servers.items():
            most = min(options.requests, 100 * clients)  # few suffice where nobody waits for anybody
            requests = max(most // (10 if name == "plain generate" else 1), 2 * clients)
            warm = run_load(url, models, list(WORDS), clients=clients, requests=2 * clients, tokens=2, token=None)
            asyncio.run(warm)
            before = sum(process.cpu_times()[:2]) if process else 0.0
            load = asyncio.run(
                run_load(
                    url,
                    models,
                    list(WORDS),
                    clients=clients,
                    requests=requests,
                    tokens=options.tokens,
                    token=options.token,
                )
            )
            row: dict[str, Any] = {"server": name, **load.as_row()}
            row["different_answers"] = sum(len(texts) > 1 for texts in load.answers.values())
            if process:
                used = sum(process.cpu_times()[:2]) - before
                row["cpu_ms_per_request"] = round(1000 * used / max(1, len(load.latencies)), 2)
            if name != "plain generate":  # which cannot stream
                waits = asyncio.run(first_tokens(url, models, list(WORDS), clients=clients, token=options.token))
                row["first_token_p50_ms"] = round(1000 * waits[len(waits) // 2], 1)
                row["first_token_p99_ms"] = round(1000 * waits[int(0.99 * (len(waits) - 1))], 1)
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def mixing(base: str, adapters: dict[str, Path], *, tokens: int = 32, rows: int = 8) -> dict[str, Any]:
    """Requests of all adapters in one batch against one adapter after the other, with as many rows for each adapter.

    The latter on an engine that has one adapter alone, so that it pays nothing for the others.
    """
    from lora_tune.recipe import Base
    from lora_tune.serving.backend import Finished, Request, Sampling
    from lora_tune.serving.local import LocalBackend

    section, names = Base.model_validate({"name": base, "quantize": "none"}), list(adapters)
    together = LocalBackend.start(section, adapters=adapters)
    single = LocalBackend.start(section, adapters={names[0]: adapters[names[0]]})

    async def ask(backend: LocalBackend, name: str, number: int) -> int:
        made = 0
        async for item in backend.stream(Request(name, tuple(range(5 + number, 25 + number)), Sampling(tokens))):
            made = item.completion_tokens if isinstance(item, Finished) else made
        return made

    async def mixed(each: int) -> int:
        return sum(await asyncio.gather(*(ask(together, name, number) for name in names for number in range(each))))

    async def in_turn(each: int) -> int:
        made = 0
        for _ in names:
            made += sum(await asyncio.gather(*(ask(single, names[0], number) for number in range(each))))
        return made

    found: dict[str, Any] = {}

    async def compare() -> None:
        for each in (1, rows):
            speeds: dict[str, list[float]] = {"mixed": [], "in turn": []}
            for _ in range(4):
                for label, run in (("mixed", mixed), ("in turn", in_turn)):
                    began = time.process_time()
                    made = await run(each)
                    speeds[label].append(made / (time.process_time() - began))
            best = {label: sorted(values)[len(values) // 2] for label, values in speeds.items()}
            found[f"{each} of each adapter"] = {
                "tokens_per_cpu_s": {label: round(value) for label, value in best.items()},
                "ratio": round(best["mixed"] / best["in turn"], 2),
            }
        await together.close(grace_s=1)
        await single.close(grace_s=1)

    asyncio.run(compare())
    return found


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="builtin:quickstart")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--clients", type=int, nargs="+", default=list(LEVELS))
    parser.add_argument("--requests", type=int, default=2560)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--url", help="an engine that runs already")
    parser.add_argument("--models", help="its models, with commas")
    parser.add_argument("--token", help="of that engine")
    parser.add_argument("--only", choices=["http", "mixing"])
    parser.add_argument("--output", type=result_file, default=ROOT / "benchmarks" / "results" / "serve.json")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "fastapi", "uvicorn")},
        "base": Path(options.base).name,
        "tokens": options.tokens,
    }
    if options.url:
        result["http"] = measure({options.url: (options.url, None)}, options.models.split(","), options=options)
    else:
        with tempfile.TemporaryDirectory() as place:
            folders = write_adapters(Path(place), options.base, count=options.adapters)
            named = [f"{name}={folder}" for name, folder in folders.items()]
            if options.only != "mixing":
                ours = ["-m", "lora_tune.serve", "--base", options.base, "--quantize", "none", "--port", "0", "--json"]
                for name in named:
                    ours += ["--adapter", name]
                plain = ["-m", "benchmarks.plain_server", options.base, *named]
                with server(ours) as first, server(plain) as second:
                    servers = {"lora-tune serve": first, "plain generate": second}
                    result["http"] = measure(servers, list(folders), options=options)
            if options.only != "http":
                result["mixing"] = mixing(options.base, folders)
                print(json.dumps(result["mixing"]))
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What a server under attack, flood and signal does:  python -m benchmarks.server_safety [ROUNDS]

Starts `lora-tune serve` on the embedded base with the example adapter as a process of its own, with its default caps.
1. Every bomb alone, 20 times: status and milliseconds from connecting to the whole reply. 2. Honest clients by
themselves and beside a process that throws a bomb every 100 ms, in turn, `ROUNDS` times. 3. 500 clients at once
against a queue of 256. 4. TERM while 64 clients are being answered: seconds to the exit, and what the clients got.
Wall time. Prints one JSON object and keeps it in benchmarks/results/server_safety.json.
"""

from __future__ import annotations

import http.client
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ALONE, CLIENTS, EACH = 20, 8, 25
ASK: dict[str, Any] = {
    "model": "example", "messages": [{"role": "user", "content": "What is 2 plus 3?"}], "max_tokens": 8,
}  # fmt: skip


def _body(more: dict[str, Any]) -> bytes:
    return json.dumps({**ASK, **more}).encode()


BOMBS: dict[str, bytes] = {
    "n = 1e6": _body({"n": 10**6}),
    "max_tokens = 1e9": _body({"max_tokens": 10**9}),
    "temperature NaN": _body({"temperature": float("nan")}),
    "10,000 stop texts": _body({"stop": [str(number) for number in range(10_000)]}),
    "10,000 messages": _body({"messages": ASK["messages"] * 10_000}),
    "depth 10,000": b'{"model":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "60,000 keys": b"{" + b",".join(b'"k%d":1' % number for number in range(60_000)) + b"}",
    "100,000 times one key": b"{" + b",".join([b'"a":1'] * 100_000) + b"}",
    "500,000 values": b'{"model": [' + b"0," * 500_000 + b"0]}",
    "2 MB": b'{"model": "' + b"x" * 2_000_000 + b'"}',
    "a 900 kB prompt": _body({"messages": [{"role": "user", "content": "word " * 180_000}]}),
    "900 kB of control tokens": _body({"messages": [{"role": "user", "content": "<|im_start|>" * 75_000}]}),
    "invalid UTF-8": b'{"model": "\xff\xfe"}',
    "a template": _body({"chat_template": "{{ range(10**9) | list }}"}),
    "unknown adapter": _body({"model": "../x"}),
}


def ask(port: int, body: bytes) -> tuple[int, float]:
    """Status and milliseconds of one chat request on a connection of its own."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    reply = connection.getresponse()
    reply.read()
    connection.close()
    return reply.status, 1000 * (time.perf_counter() - began)


def honest(port: int) -> list[float]:
    """Milliseconds of every answer to `CLIENTS` clients that ask `EACH` times."""
    took: list[float] = []

    def client() -> None:
        for _ in range(EACH):
            status, milliseconds = ask(port, _body({}))
            if status != 200:
                raise SystemExit(f"an honest request got {status}")
            took.append(milliseconds)

    _together([client] * CLIENTS)
    return took


def beside_bombs(port: int) -> tuple[list[float], int]:
    """The same while another process throws a bomb every 100 ms; and how many it threw."""
    command = [sys.executable, "-m", "benchmarks.server_safety", "bombs", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hostile:
        took = honest(port)
        thrown, _ = hostile.communicate("enough\n")
    return took, int(thrown)


def throw(port: int) -> int:
    """Throw a bomb every 100 ms until a line comes on standard input; prints how many."""
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), ended.set()), daemon=True).start()
    thrown = 0
    bodies = list(BOMBS.values())
    while not ended.wait(0.1):
        ask(port, bodies[thrown % len(bodies)])
        thrown += 1
    print(thrown)
    return 0


def flood(port: int, clients: int) -> dict[str, int]:
    """How often each status comes where so many ask at once, 32 tokens each; "dropped" are those without an answer."""
    statuses: Counter[str] = Counter()

    def client() -> None:
        try:
            statuses[str(ask(port, _body({"max_tokens": 32}))[0])] += 1
        except (OSError, http.client.HTTPException):
            statuses["dropped"] += 1

    _together([client] * clients)
    return dict(statuses)


def end_under_load(server: subprocess.Popen[bytes], port: int) -> dict[str, Any]:
    """TERM after the first of 64 clients, half of them streaming, has its answer."""
    found: Counter[str] = Counter()
    first = threading.Event()

    def client(number: int) -> None:
        streamed = number % 2 == 0
        body = _body({"max_tokens": 32, "temperature": 1, "seed": number, "stream": streamed})
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
            reply = connection.getresponse()
            said = reply.read()
        except (OSError, http.client.HTTPException):
            found["dropped"] += 1
            return
        whole = said.endswith(b"data: [DONE]\n\n") if streamed else b"finish_reason" in said
        if reply.status != 200:
            found[str(reply.status)] += 1
        elif whole:
            found["whole"] += 1
        else:
            found["cut, and says so" if b'"error"' in said else "half"] += 1
        first.set()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    first.wait()
    began = time.perf_counter()
    server.terminate()
    server.wait(timeout=60)
    seconds = time.perf_counter() - began
    for thread in threads:
        thread.join()
    return {"exit_code": server.returncode, "exit_s": round(seconds, 2), "clients": dict(found)}


def _together(work: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main(rounds: int) -> int:
    """Measure, print and keep the results."""
    command = [sys.executable, "-m", "lora_tune", "serve", "--adapter", f"example={ROOT / 'adapters' / 'example'}"]
    server = subprocess.Popen(
        [*command, "--port", "0", "--json"], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    try:
        assert server.stdout is not None
        port = int(json.loads(server.stdout.readline())["url"].rpartition(":")[2])
        honest(port)  # warm
        refused = {}
        for name, body in BOMBS.items():
            found = [ask(port, body) for _ in range(ALONE)]
            times = sorted(milliseconds for _, milliseconds in found)
            refused[name] = {
                "status": found[0][0],
                "median_ms": round(statistics.median(times), 1),
                "max_ms": round(times[-1], 1),
            }
        quiet, loud, thrown = [], [], 0
        for _ in range(rounds):
            quiet += honest(port)
            took, count = beside_bombs(port)
            loud, thrown = loud + took, thrown + count
        flooded = flood(port, 500)
        ended = end_under_load(server, port)
    finally:
        server.kill()
    results = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared",
        "python": platform.python_version(),
        "refused": refused,
        "honest": {name: _spread(times) for name, times in (("alone", quiet), ("beside bombs", loud))},
        "bombs thrown beside": thrown,
        "500 clients at once": flooded,
        "TERM under load": ended,
    }
    text = json.dumps(results, indent=1)
    (ROOT / "benchmarks" / "results" / "server_safety.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def _spread(times: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=100)
    return {"requests": len(times), "p50_ms": round(cuts[49], 1), "p99_ms": round(cuts[98], 1)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["bombs"]:
        sys.exit(throw(int(sys.argv[2])))
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5))

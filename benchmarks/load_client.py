"""A lean HTTP client that asks an OpenAI-compatible endpoint from many connections at once, and measures."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Load:
    """What many clients saw: seconds of every answer, in all and of the whole run."""

    clients: int
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    tokens: int = 0
    failed: int = 0
    answers: dict[tuple[str, str], set[str]] = field(default_factory=dict)

    def quantile(self, share: float) -> float:
        """Seconds within which this share of the answers came."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")

    def as_row(self) -> dict[str, float | int]:
        """The numbers of a table."""
        done = len(self.latencies)
        return {
            "clients": self.clients,
            "requests": done,
            "failed": self.failed,
            "requests_per_s": round(done / self.seconds, 1),
            "tokens_per_s": round(self.tokens / self.seconds, 1),
            "p50_ms": round(1000 * self.quantile(0.5), 1),
            "p99_ms": round(1000 * self.quantile(0.99), 1),
        }


class Connection:
    """One kept-alive connection."""

    def __init__(self, url: str, token: str | None) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._head = f"Host: {parts.netloc}\r\nContent-Type: application/json\r\n"
        self._head += f"Authorization: Bearer {token}\r\n" if token else ""
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: object) -> tuple[int, bytes]:
        """Status and body of the answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        writer.write(f"POST {path} HTTP/1.1\r\n{self._head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = int(head.split("content-length:")[1].split("\r\n")[0])
        found = await reader.readexactly(length)
        if "connection: close" in head:
            self.close()
        return int(head.split()[1]), found

    async def first_token(self, path: str, body: dict[str, object]) -> float:
        """Seconds until the first event of a streamed answer, which is then read to its end."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        data = json.dumps({**body, "stream": True}).encode()
        began = time.perf_counter()
        writer.write(f"POST {path} HTTP/1.1\r\n{self._head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await reader.readuntil(b"data: ")
        seconds = time.perf_counter() - began
        await reader.readuntil(b"data: [DONE]")
        self.close()
        return seconds

    def close(self) -> None:
        """Leave."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def run_load(
    url: str, models: list[str], prompts: list[str], *, clients: int, requests: int, tokens: int, token: str | None
) -> Load:
    """So many clients send so many requests in all, each the next one as soon as it has its answer."""
    load, left = Load(clients), iter(range(requests))

    async def client() -> None:
        connection = Connection(url, token)
        for number in left:
            model, prompt = models[number % len(models)], prompts[number // len(models) % len(prompts)]
            body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
            began = time.perf_counter()
            status, answer = await connection.post("/v1/completions", body)
            if status != 200:
                load.failed += 1
                continue
            load.latencies.append(time.perf_counter() - began)
            found = json.loads(answer)
            load.tokens += found["usage"]["completion_tokens"]
            load.answers.setdefault((model, prompt), set()).add(found["choices"][0]["text"])
        connection.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    load.seconds = time.perf_counter() - began
    return load


async def first_tokens(
    url: str, models: list[str], prompts: list[str], *, clients: int, token: str | None
) -> list[float]:
    """Seconds until the first event, of four streamed answers for each of so many clients at once."""
    found: list[float] = []

    async def client(number: int) -> None:
        connection = Connection(url, token)
        for turn in range(4):
            body: dict[str, object] = {"model": models[(number + turn) % len(models)], "prompt": prompts[number % 4]}
            found.append(await connection.first_token("/v1/completions", {**body, "max_tokens": 8, "temperature": 0}))

    await asyncio.gather(*(client(number) for number in range(clients)))
    return sorted(found)

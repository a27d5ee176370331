"""How the HTTP server is set up: who may ask, and how much of everything (cold: only types)."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
TOKEN_VARIABLE = "LORA_TUNE_TOKEN"
TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


class Quantize(StrEnum):
    """How the base is held."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"
    none = "none"


@dataclass(frozen=True, slots=True)
class Caps:
    """The most that a request, a connection and all of them together may take."""

    body_bytes: int = 1 << 20
    body_s: float = 10.0
    """Seconds until a body is whole."""
    header_s: float = 10.0
    """Seconds until the head of a request is whole, counted from the connection's start or the answer before."""
    write_s: float = 30.0
    """Seconds that a client may leave what was sent to it unread."""
    request_s: float = 600.0
    """Seconds for a whole answer, waiting included."""
    connections: int = 1024
    held_bytes: int = 64 << 20
    """Bytes of all bodies together that are being received."""
    depth: int = 32
    """How deep JSON may be nested."""
    values: int = 50_000
    """Values in one JSON body."""
    messages: int = 256
    tools: int = 128
    prompts: int = 16
    answers: int = 8
    """`n` answers to one prompt; with several prompts, all answers of a request are at most eight times as many."""
    max_tokens: int = 4096
    stops: int = 16
    stop_characters: int = 256
    top_logprobs: int = 20
    adapters: int = 64
    """Adapters that are served when one more is to be loaded by a request."""


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Who may ask what. Without a `token` only this machine may: `Host` must name it, `Origin` must be the page's own.

    `loading` is the folder below which `/v1/load_lora_adapter` may find adapters; None: nothing is loaded on request.
    `votes` is the file of the page's votes. `temperature` is what a request without one gets: 0, as in evaluation.
    """

    token: str | None = field(default=None, repr=False)
    loading: Path | None = None
    votes: Path | None = None
    temperature: float = 0.0
    caps: Caps = Caps()


def is_loopback(host: str) -> bool:
    """Whether this name or address is the machine itself."""
    if host in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

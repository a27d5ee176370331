"""What a client is told where a request is refused or fails: OpenAI's error body, without paths and tracebacks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from lora_tune.errors import CheckFailed, LoraTuneError, UsageError
from lora_tune.serving.backend import Draining, QueueFull, TooLong, UnknownModel, Unsupported

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_PATH = re.compile(r"(?<![\w:/<])(?!/v1/)(?:~|[A-Za-z]:)?[/\\][^\s'\"`;,()]+")
_AT_MOST = 600  # characters of a message


class Refusal(Exception):
    """Why a request is not answered, and the status that says so; `param` is the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def as_json(self) -> dict[str, Any]:
        """The error body of OpenAI's API."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        """The error body as it is sent."""
        return json.dumps(self.as_json(), ensure_ascii=False).encode("utf-8", "replace")


def bad(param: str, reason: str, *, code: str | None = None) -> Refusal:
    """A field that is wrong (400)."""
    return Refusal(400, f"{param}: {reason}", code=code, param=param)


def by_status(status: int) -> Refusal:
    """What HTTP itself says: an unknown path, a method that a path does not have."""
    return Refusal(status, HTTPStatus(status).phrase.lower())


def refusal_of(error: LoraTuneError) -> Refusal:
    """The refusal that stands for an error of the engine or of an adapter folder."""
    said = without_paths("; ".join(f"{one.reason}; {one.fix}" if one.fix else one.reason for one in error.problems))
    if isinstance(error, UnknownModel):
        return Refusal(404, said, code="model_not_found", param="model")
    if isinstance(error, QueueFull):
        return Refusal(429, said, code="queue_full", headers={"retry-after": "1"})
    if isinstance(error, Draining):
        return draining()
    if isinstance(error, TooLong):
        return Refusal(400, said, code="context_length_exceeded", param="max_tokens")
    if isinstance(error, Unsupported):
        return Refusal(400, said, code="unsupported")
    if isinstance(error, (CheckFailed, UsageError)):
        return Refusal(400, said)
    return Refusal(500, "the engine failed on this request; the server's log says why", code="engine_failed")


def draining() -> Refusal:
    """The server is about to stop (503)."""
    headers = {"retry-after": "5", "connection": "close"}
    return Refusal(503, "the server is stopping; ask again later", code="stopping", headers=headers)


def too_slow(seconds: float) -> Refusal:
    """An answer that takes longer than the server allows (504); the same request again would as well."""
    return Refusal(
        504, f"no whole answer within {seconds:g} s; ask for fewer tokens", code="timeout",
        headers={"x-should-retry": "false"},
    )  # fmt: skip


def without_paths(text: str) -> str:
    """The text with every path shortened to its last part, and cut where it is long."""
    short = _PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1] or "…", text)
    return short if len(short) <= _AT_MOST else short[: _AT_MOST - 1] + "…"

"""An engine as a process of its own: started, waited for, checked by the conformance suite and the parity of its words.

Everything that the engine prints goes into a log file; of an engine that ends before it answers, the last lines are
shown.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.adapter.parity import Parity, check_parity
from lora_tune.errors import CheckFailed, Problem, ResourceError, UsageError
from lora_tune.serving.conformance import Check, run_conformance
from lora_tune.serving.engines import EngineCommand, ServerName
from lora_tune.serving.served_words import served_render
from lora_tune.terminal import printable

LIMITS: dict[ServerName, dict[str, str]] = {
    "vllm": {},
    "sglang": {},
    "llama-server": {
        "logprobs of texts": "llama-server gives the log-probabilities of texts in the form of a chat's",
        "an unknown model is a 404": "it answers whatever model a request names",
        "wrong values are refused": "it takes some values that OpenAI's API refuses",
    },
    "llama_cpp.server": {
        "a stream counts its tokens": "llama-cpp-python's server ignores stream_options",
        "n": "it gives one answer, whatever n says",
        "n, streamed": "it gives one answer, whatever n says",
        "a tool's result": "it refuses an assistant's turn whose content is null",
        "content in parts": "it feeds content in parts as Python writes them",
        "max_completion_tokens": "it ignores max_completion_tokens: send max_tokens",
        "several texts": "it takes one text at a time",
        "an unknown model is a 404": "it answers for an unknown model with its first one",
        "wrong values are refused": "it takes an empty conversation",
    },
}
"""Checks in which an engine is known to differ, and how: said with every start, and no failure."""
_POLL_S, _GRACE_S, _SHOWN = 0.5, 20.0, 12


@dataclass(frozen=True)
class Checked:
    """What a running engine showed: its conformance by model, the parity of its words and what that proves."""

    conformance: dict[str, list[Check]]
    parity: dict[str, Parity]
    proof: str

    @property
    def failed(self) -> list[Problem]:
        """One problem for each check that failed."""
        return [
            Problem(f"{model}: {check.name}: {check.found}", "")
            for model, checks in self.conformance.items()
            for check in checks
            if check.outcome == "failed"
        ]

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "conformance": {
                model: {check.name: check.outcome for check in checks} for model, checks in self.conformance.items()
            },
            "parity": {model: {"prompts": one.prompts, "tokens": one.tokens} for model, one in self.parity.items()},
            "proof": self.proof,
        }


@contextmanager
def running(command: EngineCommand, *, log: Path, wait_s: float) -> Iterator[subprocess.Popen[bytes]]:
    """Start the engine, wait until it answers, and end it with all its children when the block ends.

    Raises: UsageError where it cannot be started or ends at once (with what it said last), ResourceError where it does
    not answer in time.
    """
    environment = {**os.environ, **command.environment}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as said:
        try:
            process = subprocess.Popen(
                command.arguments, stdout=said, stderr=said, stdin=subprocess.DEVNULL, env=environment,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            reason = f"{command.arguments[0]} cannot be started: {error.strerror}"
            raise UsageError(reason, "name the engine's Python or command with --engine-python") from None
        try:
            _wait(command, process, log=log, wait_s=wait_s)
            yield process
        finally:
            _end(process)


def check_engine(command: EngineCommand) -> Checked:
    """Run the conformance suite and compare the words that it feeds every adapter, over HTTP.

    Raises: CheckFailed where the words part from training.
    """
    conformance: dict[str, list[Check]] = {}
    parity: dict[str, Parity] = {}
    proofs: dict[str, None] = {}
    for name, words in command.words.items():
        model = command.names[name]
        render, proof = served_render(command, model=model, chat=words.chat)
        parity[model] = check_parity(
            words.chat, render, words.conversations, stop_ids=words.stop_ids, target=f"{command.engine} ({model})"
        )
        proofs[proof] = None
        conformance[model] = run_conformance(
            command.url, token=command.token, model=model, tolerate=tuple(LIMITS[command.server])
        )
    return Checked(conformance, parity, "; ".join(proofs))


def _wait(command: EngineCommand, process: subprocess.Popen[bytes], *, log: Path, wait_s: float) -> None:
    end = time.monotonic() + wait_s
    while not _answers(command):
        if process.poll() is not None:
            reason = f"{command.engine} ended with exit code {process.returncode} before it answered"
            raise UsageError([Problem(reason, "", str(log)), *_last_lines(log)])
        if time.monotonic() > end:
            reason = f"{command.engine} does not answer after {wait_s:,.0f} s"
            raise ResourceError([Problem(reason, "give it longer with --engine-wait", str(log)), *_last_lines(log)])
        time.sleep(_POLL_S)


def _answers(command: EngineCommand) -> bool:
    request = urllib.request.Request(command.url + command.health)
    if command.token:
        request.add_header("Authorization", f"Bearer {command.token}")
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError, json.JSONDecodeError):
        return False


def _last_lines(log: Path) -> list[Problem]:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return [Problem(printable(line)[:300], severity="note") for line in lines[-_SHOWN:]]


def _end(process: subprocess.Popen[bytes]) -> None:
    """TERM to the engine's whole group, KILL to what is left after a while."""
    for number, seconds in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
            if number == signal.SIGTERM:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # children that outlived it
            return
    raise CheckFailed(f"the engine (process {process.pid}) could not be ended", "end it by hand")

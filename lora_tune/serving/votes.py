"""Votes on answers that were compared, as rows for preference training: one JSON object on each line.

Every row of the file is a preference: `prompt` (messages), `chosen` and `rejected` (each a list with one assistant
message), which is the conversational form that TRL's DPO, ORPO, KTO and reward trainers read, and facts beside it
(`PreferenceRow`). Votes without a preference stand in a file of their own beside it, so that the first needs no filter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import uuid4

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field

from lora_tune.data.conversation import Message
from lora_tune.disk import FULL
from lora_tune.errors import ResourceError

FORMAT: Literal[1] = 1
MOST_BYTES = 64 << 20  # of a file of votes
_LOCK_S = 5.0

Verdict = Literal["better", "tie", "bad"]


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal[1] = FORMAT
    id: str
    """Of the vote: rows of one vote have the same."""
    time: str
    """UTC, ISO 8601."""
    base: str
    """Name of the base that all models stand on."""
    template_sha256: str | None
    """Of the chat template that rendered the prompt; null where the models have different ones."""
    temperature: float
    top_p: float
    max_tokens: int | None
    seed: int | None
    """The same for all answers, as are the three above."""
    prompt: Annotated[list[dict[str, Any]], Field(min_length=1)]
    """The messages before the answer, in OpenAI's form."""


class PreferenceRow(_Row):
    """One line of the file of votes: to this prompt, `chosen` was found better than `rejected`."""

    chosen: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1)]
    rejected: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1)]
    chosen_model: str
    rejected_model: str
    chosen_column: int
    """Place on the page, from 0: shows whether people just take the left one."""
    rejected_column: int
    chosen_finish: Literal["stop", "length"]
    """`length`: the answer was cut."""
    rejected_finish: Literal["stop", "length"]


class UndecidedRow(_Row):
    """One line of the file beside it: the answers were equally good (`tie`), or none was of use (`bad`)."""

    verdict: Literal["tie", "bad"]
    answers: list[list[dict[str, Any]]]
    models: list[str]
    finishes: list[Literal["stop", "length"]]


class VotedAnswer(BaseModel):
    """An answer as the page shows it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=256)]
    content: str
    finish_reason: Literal["stop", "length"]


class VotesFull(ResourceError):
    """The file of votes takes no more: it has reached its size, the disk is full, or it is not writable (HTTP 507)."""


class VotesBusy(ResourceError):
    """Somebody else holds the file's lock (HTTP 503)."""


def facts_of_vote(
    *,
    base: str,
    template_sha256: str | None,
    sampling: tuple[float, float, int | None, int | None],
    prompt: Sequence[Message],
) -> dict[str, Any]:
    """What all rows of one vote have in common. `sampling`: temperature, top_p, max_tokens, seed."""
    names = ("temperature", "top_p", "max_tokens", "seed")
    return {
        "id": uuid4().hex,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": base,
        "template_sha256": template_sha256,
        **dict(zip(names, sampling, strict=True)),
        "prompt": [message.as_template_input() for message in prompt],
    }


def preferences(answers: Sequence[VotedAnswer], best: int, facts: dict[str, Any]) -> list[PreferenceRow]:
    """A row for every answer that lost against the `best` one; equal texts are no preference."""
    chosen = answers[best]
    return [
        PreferenceRow(
            **facts,
            chosen=_assistant(chosen),
            rejected=_assistant(other),
            chosen_model=chosen.model,
            rejected_model=other.model,
            chosen_column=best,
            rejected_column=column,
            chosen_finish=chosen.finish_reason,
            rejected_finish=other.finish_reason,
        )
        for column, other in enumerate(answers)
        if column != best and other.content != chosen.content
    ]


def undecided(answers: Sequence[VotedAnswer], verdict: Literal["tie", "bad"], facts: dict[str, Any]) -> UndecidedRow:
    """The row of a vote without a preference."""
    return UndecidedRow(
        **facts,
        verdict=verdict,
        answers=[_assistant(answer) for answer in answers],
        models=[answer.model for answer in answers],
        finishes=[answer.finish_reason for answer in answers],
    )


def undecided_file(votes: Path) -> Path:
    """Where votes without a preference go: `votes.undecided.jsonl` beside `votes.jsonl`."""
    return votes.with_name(f"{votes.stem}.undecided{votes.suffix or '.jsonl'}")


def append_rows(path: Path, rows: Sequence[PreferenceRow | UndecidedRow]) -> None:
    """Add rows to a file, all of them or none, whoever else writes to it at the same time.

    The file belongs to its owner alone (mode 600): prompts may be private. A line that somebody else left unfinished is
    ended first, and stays.

    Raises:
        VotesFull: `MOST_BYTES` would be exceeded, or the disk is full; nothing was added.
        VotesBusy: the lock did not come free within 5 s.
    """
    text = "".join(json.dumps(row.model_dump(), ensure_ascii=False) + "\n" for row in rows).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_LOCK_S, mode=0o600):
            _append(path, text)
    except Timeout:
        raise VotesBusy("the file of votes is in use", "vote again") from None
    except OSError as error:
        if error.errno in FULL:
            raise VotesFull("the disk is full; the vote was not saved", "make room on the server") from None
        reason = f"the file of votes cannot be written: {os.strerror(error.errno or 0)}"
        raise VotesFull(reason, "look at its folder on the server") from None


def _append(path: Path, text: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
    try:
        size = os.lseek(descriptor, 0, os.SEEK_END)
        if size + len(text) + 1 > MOST_BYTES:
            reason = f"the file of votes has reached {MOST_BYTES >> 20} MiB"
            raise VotesFull(reason, "move it away, and the next vote begins a new one")
        if size:
            os.lseek(descriptor, size - 1, os.SEEK_SET)
            if os.read(descriptor, 1) != b"\n":
                text = b"\n" + text
        try:
            left = memoryview(text)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)  # half a row would spoil the file
            raise
    finally:
        os.close(descriptor)


def _assistant(answer: VotedAnswer) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": answer.content}]

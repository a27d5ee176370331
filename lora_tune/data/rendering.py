"""Prompt templates over rows: rendered in batches by a child process with limits on time, memory and output."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.data.prompt_file import Prompt, PromptFile
from lora_tune.data.rows import did_you_mean
from lora_tune.errors import DataError, Problem, RecipeError

BATCH_JOBS, BATCH_BYTES = 4000, 32 << 20  # of one child process, which takes about 0.1 s to start
_WALL_S = 300  # where the system has no CPU limits; the child's own limits are 1 s a render and 60 s a batch


@dataclass(frozen=True, slots=True)
class Job:
    """One render: number of the prompt, seed of what is drawn in it, the row as JSON text, and its place for errors."""

    prompt: int
    seed: int
    row: str
    place: str


@dataclass(frozen=True, slots=True)
class Render:
    """What a template made of a row.

    `parts` are input, target and further right answers; fewer than two, or an empty input or target, mean that the
    template does not apply to the row. `error`: why it failed, "" if it did not.
    """

    parts: tuple[str, ...]
    choices: tuple[str, ...]
    error: str = ""

    @property
    def applies(self) -> bool:
        """Whether there are an input and a target, neither empty."""
        return len(self.parts) > 1 and all(self.parts[:2])


def variables(file: PromptFile) -> list[frozenset[str]]:
    """The columns that each template of a file reads.

    Raises:
        RecipeError: a template that does not compile, takes too long to, or reaches for Python's internals.
    """
    lines, end = _child(file.prompts, "[]")
    problems, found = [], []
    for number, prompt in enumerate(file.prompts):
        answer = lines[number] if number < len(lines) else {"error": end or "it ended the process"}
        if "error" in answer:
            problems.append(_problem(file, prompt, f"is refused: {answer['error']}", "repair the template"))
            if number >= len(lines):
                break
        else:
            found.append(frozenset(answer["variables"]))
    if problems:
        raise RecipeError(problems)
    return found


def check_variables(file: PromptFile, needed: Sequence[frozenset[str]], columns: Sequence[str]) -> list[Problem]:
    """A problem for each template that reads a column that no row of the data has."""
    problems = []
    for prompt, names in zip(file.prompts, needed, strict=True):
        for name in sorted(names - set(columns)):
            known = ", ".join(f"`{column}`" for column in columns[:8]) + (" …" if len(columns) > 8 else "")
            fix = did_you_mean(name, list(columns)) or f"it has {known}; other names go into data[].columns"
            problems.append(_problem(file, prompt, f"reads `{name}`, which the data does not have", fix))
    return problems


def render(file: PromptFile, jobs: Iterable[Job]) -> Iterator[tuple[Job, Render]]:
    """All jobs in order, each with its render.

    Raises:
        DataError: a template does not end, or needs too much memory, on a row.
    """
    for batch in _batches(jobs):
        request = "[" + ",".join(f"[{job.prompt},{job.seed},{job.row}]" for job in batch) + "]"
        lines, end = _child(file.prompts, request)
        answers = lines[len(file.prompts) :]
        for job, answer in zip(batch, answers, strict=False):
            choices = tuple(answer.get("choices") or ())
            yield job, Render(tuple(answer.get("parts", ())), choices, answer.get("error", ""))
        if len(answers) < len(batch):
            job = batch[len(answers)]
            reason = f"is stopped at row {job.place}: {end or 'it ended the process'}"
            raise DataError(_problem(file, file.prompts[job.prompt], reason, "repair the template, or leave it out"))


def failed(file: PromptFile, job: Job, error: str, times: int) -> Problem:
    """A template that raised an error on `times` rows, first on that of `job`."""
    more = f" and {times - 1:,} more rows" if times > 1 else ""
    return _problem(
        file,
        file.prompts[job.prompt],
        f"fails on row {job.place}{more}: {error}",
        "repair the template or the row, or set on_bad_row: drop",
    )


def _problem(file: PromptFile, prompt: Prompt, reason: str, fix: str) -> Problem:
    return Problem(f"template {prompt.name!r} {reason}", fix, file=file.file, line=prompt.line)


def _batches(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    batch: list[Job] = []
    size = 0
    for job in jobs:
        if batch and (len(batch) == BATCH_JOBS or size + len(job.row) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += len(job.row)
    if batch:
        yield batch


def _child(prompts: Sequence[Prompt], jobs: str) -> tuple[list[dict[str, Any]], str]:
    """The answers of one child process, and why it ended before the last one ("" if it did not)."""
    texts = json.dumps([[prompt.jinja, prompt.choices] for prompt in prompts])
    request = f'{{"prompts":{texts},"jobs":{jobs}}}'.encode("utf-8", "surrogatepass")
    command = [sys.executable, "-P", str(Path(__file__).with_name("prompt_child.py"))]
    try:
        done = subprocess.run(command, input=request, capture_output=True, timeout=_WALL_S, check=False)
        output, code, complaint = done.stdout, done.returncode, done.stderr
    except subprocess.TimeoutExpired as stopped:
        output, code, complaint = stopped.stdout or b"", 0, b""
        end = f"it does not end within {_WALL_S} s"
    else:
        end = _why(code, complaint)
    whole = output[: output.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], end


def _why(code: int, complaint: bytes) -> str:
    """In words, why a process ended with this code."""
    if code == 0:
        return ""
    if code == -getattr(signal, "SIGPROF", 0):
        return "it does not end within 1 s of CPU time"
    if code == -getattr(signal, "SIGXCPU", 0):
        return "its rows take more than 60 s of CPU time"
    if code < 0:
        return f"it needs too much time, memory or stack (signal {-code})"
    last_line = complaint.decode("utf-8", "replace").strip().rpartition("\n")[2]
    return f"it ended the process (exit {code}: {last_line[:200]})"

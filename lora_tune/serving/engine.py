"""The embedded engine's thread: it alone touches the model. Requests are taken in, read and answered between steps.

Every turn of the loop does what others asked for (load, unload), admits what fits, and then lets each batch read a
bounded piece of prompts and make one token for each of its rows. Adapters that can be mixed share one batch; any other
one has batches of its own, in turn with the rest. Rows whose length differs much do not share a cache.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lora_tune.errors import LoraTuneError
from lora_tune.serving.backend import (
    Draining,
    EngineFailed,
    Finished,
    Piece,
    QueueFull,
    Statistics,
    TokenLogprob,
    UnknownModel,
)
from lora_tune.serving.batch import Batch, SingleBatch, SlotBatch
from lora_tune.serving.job import Item, Job, Row
from lora_tune.serving.runner import Runner
from lora_tune.serving.sampling import choose, draws_of, log_probabilities
from lora_tune.serving.totals import Totals

_log = logging.getLogger(__name__)
_SHORTEST, _STEP = 256, 4  # tokens of the shortest kind of row, and by how much the next kind is longer


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the engine takes on at once.

    `rows` are answered together, `queue` more may wait. `prefill_tokens` of prompts are read between two steps: the
    most that a running answer waits for a new one. `cache_tokens` bounds the tokens of all running rows, None: by the
    memory that is free at the start. `context` is the most tokens of prompt and answer, None: what the base can do.
    """

    rows: int = 128
    queue: int = 256
    prefill_tokens: int = 512
    cache_tokens: int | None = None
    context: int | None = None


class _Kind(NamedTuple):
    """What rows of one batch have in common."""

    adapter: str | None  # one that shares no batch with others
    columns: int
    alone: int | None  # the number of a suspected job


class Engine:
    """A thread that answers. All public methods may be called from other threads."""

    def __init__(self, runner: Runner, limits: Limits, *, cache_tokens: int) -> None:
        self._runner, self._limits, self._cache_tokens = runner, limits, cache_tokens
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[Runner], Any], Future[Any]]] = deque()
        self._batches: dict[_Kind, Batch] = {}
        self._live: dict[Row, _Kind] = {}
        self._leaving: dict[str, Future[None]] = {}
        self._outbox: list[tuple[Job, Item]] = []
        self._totals = Totals()
        self._state = "open"  # then draining, then closed
        self._drained: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="lora_tune-engine", daemon=True)
        self._thread.start()

    # ----- from other threads -----
    def submit(self, job: Job) -> None:
        """Queue a request. Raises: QueueFull, Draining."""
        with self._changed:
            if self._state != "open":
                raise Draining("the server is about to stop", "ask again later")
            if len(self._waiting) + len(self._live) >= self._limits.rows + self._limits.queue:
                raise QueueFull(f"{self._limits.queue} requests are waiting already", "ask again later")
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this request any more."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def call(self, work: Callable[[Runner], Any]) -> Future[Any]:
        """Do something with the model between two steps."""
        done: Future[Any] = Future()
        with self._changed:
            if self._state == "closed":
                raise Draining("the server has stopped", "start it again")
            self._calls.append((work, done))
            self._changed.notify()
        return done

    def remove(self, adapter: str) -> Future[None]:
        """Take an adapter off once its running rows have ended; its waiting requests end with UnknownModel."""
        done: Future[None] = Future()
        with self._changed:
            self._leaving[adapter] = done
            self._changed.notify()
        return done

    def drain(self) -> Future[None]:
        """Take nothing in any more; the future is done when all that runs has ended."""
        with self._changed:
            if self._state == "open":
                self._state = "draining"
            self._changed.notify()
        return self._drained

    def stop(self) -> None:
        """Cancel what still runs, and end the thread."""
        with self._changed:
            self._state = "closed"
            self._changed.notify()
        self._thread.join()

    def statistics(self) -> Statistics:
        """What the engine does and did."""
        with self._changed:
            waiting = [job.request.model for job in self._waiting]
            running = [row.job.request.model for row in self._live]
        return self._totals.with_jobs(running=running, waiting=waiting, queue=self._limits.queue)

    # ----- the thread -----
    @torch.inference_mode()
    def _run(self) -> None:
        state = "open"
        while state != "closed":
            with self._changed:
                while not self._has_work():
                    self._changed.wait()
                calls, self._calls = self._calls, deque()
                state = self._state
            for work, done in calls:
                self._do(work, done)
            try:
                self._turn(state)
            except Exception as error:  # a fault of the engine itself: who is in it must not wait for ever
                self._batches.clear()
                for row in list(self._live):
                    self._fail(row, error)
            self._flush()

    def _turn(self, state: str) -> None:
        self._drop_cancelled()
        self._remove_left()
        if state != "open":
            self._refuse_waiting(state)
        self._admit()
        for kind, batch in list(self._batches.items()):
            self._work(kind, batch)

    def _has_work(self) -> bool:
        if self._state != "open" and not (self._live or self._waiting) and not self._drained.done():
            return True
        return bool(self._live or self._waiting or self._calls or self._leaving or self._state == "closed")

    def _do(self, work: Callable[[Runner], Any], done: Future[Any]) -> None:
        awaited, found, failed = done.set_running_or_notify_cancel(), None, None
        try:
            with torch.inference_mode(False):  # what is put on the model are ordinary tensors
                found = work(self._runner)
        except LoraTuneError as error:
            failed = error
        except Exception as error:
            _log.error("a change of the model failed: %s", error, exc_info=error)
            failed = EngineFailed("the engine failed on this change")
        if awaited and failed is not None:
            done.set_exception(failed)
        elif awaited:
            done.set_result(found)

    def _refuse_waiting(self, state: str) -> None:
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            self._end(job, Draining("the server is about to stop", "ask again later"))
        if state == "closed":
            self._close_rows(list(self._live))
        if not self._live and not self._drained.done():
            self._drained.set_result(None)

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [job for job in self._waiting if job.cancelled]
            if dropped:
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
        for job in dropped:
            self._totals.count(job.request.model, requests=1, ended="cancelled")
            self._end(job, Finished("cancelled", len(job.request.prompt_ids), 0))
        gone = [row for row in self._live if row.job.cancelled]
        if gone:
            self._close_rows(gone)

    def _close_rows(self, rows: Sequence[Row]) -> None:
        """Take rows out of their batches before they have ended."""
        by_kind: dict[_Kind, list[Row]] = {}
        for row in rows:
            by_kind.setdefault(self._live[row], []).append(row)
        for kind, gone in by_kind.items():
            batch = self._batches[kind]
            batch.leave(gone)
            if not batch.rows:
                del self._batches[kind]
        for row in rows:
            self._send(row, [row.end("cancelled")])

    def _remove_left(self) -> None:
        for adapter, done in list(self._leaving.items()):
            with self._changed:
                refused = [job for job in self._waiting if job.adapter == adapter]
                self._waiting = deque(job for job in self._waiting if job.adapter != adapter)
            for job in refused:
                self._end(job, UnknownModel(f"no model is called {job.request.model!r} any more"))
            if not any(row.job.adapter == adapter for row in self._live):
                del self._leaving[adapter]
                self._do(lambda runner, adapter=adapter: runner.detach(adapter), done)  # type: ignore[misc]

    def _admit(self) -> None:
        """Take waiting requests into batches, in their order, as long as there is room."""
        while self._waiting and len(self._live) < self._limits.rows:
            job = self._waiting[0]
            kind = self._kind(job)
            if self._live and not self._fits(kind):
                return
            with self._changed:
                self._waiting.popleft()
            try:
                row = Row(job, self._draws(job))
            except Exception as error:
                _log.warning("a request failed: %s", error, exc_info=error)
                self._end(job, EngineFailed("the engine failed on this request"))
                continue
            with self._changed:
                self._live[row] = kind
            self._batch(kind).arrivals.append(row)

    def _draws(self, job: Job) -> list[float]:
        sampling = job.request.sampling
        return draws_of(sampling.seed, count=sampling.max_new_tokens) if sampling.temperature > 0 else []

    def _kind(self, job: Job) -> _Kind:
        needed = len(job.request.prompt_ids) + job.request.sampling.max_new_tokens
        columns = _SHORTEST
        while columns < needed:
            columns *= _STEP
        own = job.adapter if job.own_batch == "own batch" else None
        return _Kind(own, columns, job.number if job.suspected else None)

    def _batch(self, kind: _Kind) -> Batch:
        if kind not in self._batches:
            make = SlotBatch if self._runner.has_slots else SingleBatch
            self._batches[kind] = make(self._runner, columns=kind.columns)
        return self._batches[kind]

    def _fits(self, kind: _Kind) -> bool:
        held = sum(batch.size() for known, batch in self._batches.items() if known != kind)
        batch = self._batches.get(kind)
        return held + (batch.size(more=1) if batch else 4 * kind.columns) <= self._cache_tokens

    def _work(self, kind: _Kind, batch: Batch) -> None:
        """One turn of a batch: a piece of its prompts, then a token for each running row."""
        try:
            if batch.arrivals or len(batch.rows) > len(batch.running):
                self._read(batch)
            if batch.running:
                began, rows = time.perf_counter(), list(batch.running)
                logits_BV = batch.step()
                batch.leave(self._advance(rows, logits_BV))
                self._totals.steps += 1
                self._totals.step_rows += len(rows)
                self._totals.step_s += time.perf_counter() - began
        except Exception as error:  # whatever one request did: the others go on
            self._rescue(kind, error)
        if kind in self._batches and not self._batches[kind].rows:
            batch.leave([])
            del self._batches[kind]

    def _read(self, batch: Batch) -> None:
        found = batch.read(self._limits.prefill_tokens)
        if found is None:
            return
        rows, logits_BV = found
        for row in rows:
            if not row.tokens:
                self._totals.prefill_tokens += len(row.ids)
                self._totals.count(row.job.request.model, requests=1, prompt=len(row.ids))
        ended = set(self._advance(rows, logits_BV))
        batch.join([row for row in rows if row not in ended])

    def _advance(self, rows: Sequence[Row], logits_BV: torch.Tensor) -> list[Row]:
        """Choose the next token of every row and send it; the rows that have ended."""
        logits_BV = logits_BV[:, : rows[0].job.logits]
        allowed, ended = {}, []
        for index, row in enumerate(rows):
            if row.grammar is not None:
                try:
                    allowed[index] = row.grammar.allowed(logits_BV.shape[1])
                except Exception as error:
                    self._fail(row, error)
                    ended.append(row)
        tokens = choose(logits_BV, rows, allowed=allowed)
        chances = log_probabilities(logits_BV, tokens, rows)
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if row in ended:
                continue
            try:
                items = row.take(token, self._logprobs(row, token, chances.get(index)))
            except Exception as error:
                self._fail(row, error)
                ended.append(row)
                continue
            self._send(row, items)
            if isinstance(items[-1], Finished):
                ended.append(row)
        return ended

    @staticmethod
    def _logprobs(
        row: Row, token: int, found: tuple[float, list[tuple[int, float]]] | None
    ) -> tuple[TokenLogprob, ...]:
        if found is None:
            return ()
        words = row.job.vocabulary
        top = tuple(words.logprob(other, chance) for other, chance in found[1])
        return (words.logprob(token, found[0], top),)

    def _rescue(self, kind: _Kind, error: BaseException) -> None:
        """A batch has failed: each of its rows is tried again by itself, so that only the one at fault fails."""
        _log.warning("a batch failed: %s", error, exc_info=error)
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        rows = [row for row, known in self._live.items() if known == kind]
        self._batches.pop(kind, None)
        for row in rows:
            if len(rows) == 1 or row.job.suspected:
                self._fail(row, error)
                continue
            row.job.suspected = True
            self._live[row] = self._kind(row.job)
            self._batch(self._live[row]).arrivals.append(row)

    def _fail(self, row: Row, error: BaseException) -> None:
        _log.warning("a request to %s failed: %s", row.job.request.model, error, exc_info=error)
        self._totals.count(row.job.request.model, ended="failed")
        self._forget(row)
        self._end(row.job, EngineFailed("the engine failed on this request"))

    def _send(self, row: Row, items: Iterable[Piece | Finished]) -> None:
        for item in items:
            self._outbox.append((row.job, item))
            if isinstance(item, Finished):
                row.job.ended = True
                self._totals.count(row.job.request.model, completion=item.completion_tokens, ended=item.reason)
                self._forget(row)

    def _forget(self, row: Row) -> None:
        with self._changed:
            self._live.pop(row, None)

    def _end(self, job: Job, item: Finished | LoraTuneError) -> None:
        job.ended = True
        self._outbox.append((job, item))

    def _flush(self) -> None:
        """Hand over what has been made, once for each event loop."""
        outbox, self._outbox = self._outbox, []
        for loop in {id(job.loop): job.loop for job, _ in outbox}.values():
            items = [(job, item) for job, item in outbox if job.loop is loop]
            try:
                loop.call_soon_threadsafe(_hand_over, items)
            except RuntimeError:  # the loop is closed: nobody waits
                for job, _ in items:
                    job.cancelled = True


def _hand_over(items: Sequence[tuple[Job, Item]]) -> None:
    for job, item in items:
        job.items.put_nowait(item)

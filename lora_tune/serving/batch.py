"""Batches that rows join and leave between steps; prompts are read in pieces beside the rows being answered."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from lora_tune.serving.job import Row
from lora_tune.serving.runner import Runner

_STAGED = 32  # prompts that are read together, at most


class Batch(Protocol):
    """Rows that share forward passes."""

    running: list[Row]
    arrivals: deque[Row]

    @property
    def rows(self) -> list[Row]:
        """All rows that it has: arrived, being read, running."""

    def read(self, tokens: int) -> tuple[list[Row], torch.Tensor] | None:
        """Read so many more tokens of prompts. The rows whose prompts are read now, with logits (B, V) behind them;
        they are no longer in the batch until they `join`."""

    def join(self, rows: Sequence[Row]) -> None:
        """Those of the rows that `read` gave which go on; before the next `read`."""

    def step(self) -> torch.Tensor:
        """Read the newest token of all running rows: logits (B, V)."""

    def leave(self, rows: Sequence[Row]) -> None:
        """Take rows out, wherever in the batch they are."""

    def size(self, more: int = 0) -> int:
        """Tokens that the cache has room for, with so many more rows."""


class SlotBatch:
    """Rows with a slot each in one cache; at most `columns` tokens long."""

    def __init__(self, runner: Runner, *, columns: int) -> None:
        self.running: list[Row] = []
        self.arrivals: deque[Row] = deque()
        self._runner, self._columns = runner, columns
        self._cache, self._stage = runner.new_cache(), runner.new_cache()
        self._staged: list[Row] = []
        self._places: dict[Row, int] = {}
        self._read = 0
        self._ends: dict[Row, torch.Tensor] = {}

    @property
    def rows(self) -> list[Row]:
        """All rows that it has."""
        return [*self.running, *self._staged, *self.arrivals]

    def size(self, more: int = 0) -> int:
        """Tokens that the cache has room for, with so many more rows."""
        return _slots(len(self.rows) + more) * self._columns

    def read(self, tokens: int) -> tuple[list[Row], torch.Tensor] | None:
        """Read so many more tokens of prompts (see Batch)."""
        if not self._staged:
            self._stage_arrivals(tokens)
        rows = self._staged
        if not rows:
            return None
        longest = max(len(row.ids) for row in rows)
        first, count = self._read, min(max(1, tokens // len(rows)), longest - self._read)
        ids = [row.ids[first : first + count] for row in rows]
        ids_BT = torch.tensor([[*part, *[0] * (count - len(part))] for part in ids], device=self._runner.device)
        ends = {row: len(row.ids) - 1 - first for row in rows if first < len(row.ids) <= first + count}
        kept = sorted(set(ends.values())) or [count - 1]
        self._runner.select([row.job.adapter for row in rows])
        self._stage.chunk(len(rows), first=first, count=count)
        positions_BT = torch.arange(first, first + count, device=self._runner.device).expand(len(rows), -1)
        logits_BKV = self._runner.forward(ids_BT, positions_BT, self._stage, keep=kept)
        self._read += count
        for index, row in enumerate(rows):
            if row in ends:
                self._ends[row] = logits_BKV[index, kept.index(ends[row])]
        if self._read < longest:
            return None
        self._places = {row: index for index, row in enumerate(rows)}
        logits_BV = torch.stack([self._ends[row] for row in rows])
        self._staged, self._read, self._ends = [], 0, {}
        return rows, logits_BV

    def _stage_arrivals(self, tokens: int) -> None:
        """Take the prompts that fit into one piece together, or the next one if it is longer."""
        longest = 0
        while self.arrivals and len(self._staged) < _STAGED:
            longest = max(longest, len(self.arrivals[0].ids))
            if self._staged and (len(self._staged) + 1) * longest > tokens:
                break
            self._staged.append(self.arrivals.popleft())
        if self._staged:
            self._stage.reserve(len(self._staged), max(len(row.ids) for row in self._staged))

    def join(self, rows: Sequence[Row]) -> None:
        """Move these rows from where their prompts were read to the running ones."""
        if rows:
            self._reserve([*self.running, *rows])
        for row in rows:
            # the newest token has been chosen, and is read by the next step
            self._cache.take(self._stage, self._places[row], len(self.running), length=len(row.ids) - 1)
            self.running.append(row)
        self._places = {}
        if self._stage.size > self._columns * 2:  # a large one is not kept
            self._stage.release()

    def step(self) -> torch.Tensor:
        """Read the newest token of all running rows: logits (B, V)."""
        rows, device = self.running, self._runner.device
        self._reserve(rows)
        columns = [len(row.ids) - 1 for row in rows]
        inputs = torch.tensor([[row.last for row in rows], columns], device=device)
        self._runner.select([row.job.adapter for row in rows])
        self._cache.one_each(torch.arange(len(rows), device=device), inputs[1], length=max(columns) + 1)
        return self._runner.forward(inputs[0][:, None], inputs[1][:, None], self._cache)[:, -1]

    def _reserve(self, rows: Sequence[Row]) -> None:
        needed = max(len(row.ids) for row in rows)
        columns = 1 << max(6, needed.bit_length())  # doubles as rows grow
        self._cache.reserve(_slots(len(rows)), max(needed, min(columns, self._columns)))

    def leave(self, rows: Sequence[Row]) -> None:
        """Take rows out: the last running row moves into each gap."""
        gone = set(rows)
        for row in [row for row in self.running if row in gone]:
            place, last = self.running.index(row), len(self.running) - 1
            if place != last:
                self._cache.move(last, place)
                self.running[place] = self.running[last]
            self.running.pop()
        self.arrivals = deque(row for row in self.arrivals if row not in gone)
        if any(row in gone for row in self._staged):
            kept = [row for row in self._staged if row not in gone]
            self.arrivals.extendleft(reversed(kept))  # what was read of the others is read again
            self._staged, self._read, self._ends = [], 0, {}
        if not self.rows:
            self._cache.release()
            self._stage.release()


class SingleBatch:
    """Rows of a model whose state is no plain KV cache: each is read by itself, in the model's own way, in turn."""

    def __init__(self, runner: Runner, *, columns: int) -> None:
        self.running: list[Row] = []
        self.arrivals: deque[Row] = deque()
        self._runner, self._columns = runner, columns
        self._states: dict[Row, dict[str, Any]] = {}

    @property
    def rows(self) -> list[Row]:
        """All rows that it has."""
        return [*self.running, *self.arrivals]

    def size(self, more: int = 0) -> int:
        """Tokens that there is room for, with so many more rows."""
        return (len(self.rows) + more) * self._columns

    def read(self, tokens: int) -> tuple[list[Row], torch.Tensor] | None:
        """Read the next prompt, whole."""
        if not self.arrivals:
            return None
        row = self.arrivals.popleft()
        self._runner.select([row.job.adapter])
        logits_1V, self._states[row] = self._runner.start_alone(row.ids)
        return [row], logits_1V

    def join(self, rows: Sequence[Row]) -> None:
        """Those that go on."""
        self.running += rows
        self._states = {row: state for row, state in self._states.items() if row in self.running}

    def step(self) -> torch.Tensor:
        """Read the newest token of all running rows, one by one: logits (B, V)."""
        found = []
        for row in self.running:
            self._runner.select([row.job.adapter])
            logits_1V, self._states[row] = self._runner.go_on_alone(row.ids, self._states[row])
            found.append(logits_1V)
        return torch.cat(found)

    def leave(self, rows: Sequence[Row]) -> None:
        """Take rows out."""
        gone = set(rows)
        self.running = [row for row in self.running if row not in gone]
        self.arrivals = deque(row for row in self.arrivals if row not in gone)
        self._states = {row: state for row, state in self._states.items() if row in self.running}


def _slots(rows: int) -> int:
    """Slots for so many rows: a few more, so that not every new row makes the cache grow."""
    step = 4 if rows <= 16 else 16
    return -(-rows // step) * step

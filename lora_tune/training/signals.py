"""Signals while training: the running step ends, a checkpoint is written, then the command stops."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, TracebackType

from lora_tune.interrupts import Stop, handled_by, signal_name


class SignalWatch:
    """Inside its `with` block the first signal is only noted in `caught`; the second acts as it does outside.

    `cut_short` is for work that need not be finished, such as an evaluation. Outside the main thread Python allows no
    handlers, and nothing is watched.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._watching: AbstractContextManager[None] | None = None
        self._may_cut = False

    def __enter__(self) -> SignalWatch:
        self._watching = handled_by(self._note)
        self._watching.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    @contextmanager
    def cut_short(self) -> Iterator[None]:
        """Inside, the first signal ends what is being done at once, and so does one that was noted before.

        Raises: Stop.
        """
        if self.caught is not None:
            raise Stop(self.caught)
        self._may_cut = True
        try:
            yield
        finally:
            self._may_cut = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught is not None:
            self._leave()
            signal.raise_signal(number)
            return
        self.caught = number
        if sys.stderr.isatty():  # not through rich: a handler may come in the middle of its own work
            line = f"\n{signal_name(number)}: saving after this step; once more leaves at once\n"
            os.write(sys.stderr.fileno(), line.encode())
        if self._may_cut:
            raise Stop(number)

    def _leave(self) -> None:
        if self._watching is not None:
            watching, self._watching = self._watching, None
            watching.__exit__(None, None, None)

"""Signals while training: the running step ends, a checkpoint is written, then the command stops."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # Windows has the first two
_CAUGHT = tuple(number for number in signal.Signals if number.name in _NAMES)


class SignalWatch:
    """Inside its `with` block the first signal is only noted in `caught`; the second acts as it always does.

    Outside the main thread Python allows no handlers, and nothing is watched.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _CAUGHT}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

"""Signals: Ctrl-C, a scheduler's TERM, a closed terminal's HUP and USR1 end a command in one line and 128 + N.

They arrive as `Stop`, which is no `Exception`, so that nothing on the way takes it for an error of its own. A training
catches them before that, to save first (`training/signals.py`). A command started under `nohup` goes on ignoring HUP.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # Windows has the first two
Handler = Callable[[int, FrameType | None], Any]


class Stop(BaseException):
    """A signal that ends the command; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def signal_name(number: int) -> str:
    """SIGTERM for 15."""
    return signal.Signals(number).name


def watched() -> tuple[signal.Signals, ...]:
    """The signals that end a command here."""
    found = [number for number in signal.Signals if number.name in _NAMES]
    return tuple(n for n in found if n.name != "SIGHUP" or signal.getsignal(n) is not signal.SIG_IGN)


@contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """Inside, `handler` gets the signals that end a command; outside the main thread Python allows none, and none is
    caught."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in watched()}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before if handler_before is not None else signal.SIG_DFL)


def stop(number: int, frame: FrameType | None) -> None:
    """The handler that ends what is being done. Raises: Stop."""
    raise Stop(number)

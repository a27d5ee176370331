"""A process of a run: it joins the others, is silent where it is not the first, and leaves how it ended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import typer

from lora_tune.errors import Interrupted, LoraTuneError, ResourceError
from lora_tune.interrupts import Stop, signal_name
from lora_tune.model.strategy import Layout
from lora_tune.terminal import as_error, messages, results
from lora_tune.training.agent import leave_ending
from lora_tune.training.place import ENDINGS, Place, take_card
from lora_tune.training.team import PeerLost, joined


@contextmanager
def as_worker(place: Place | None, layout: Layout) -> Iterator[None]:
    """Inside, this process is the one of its place; without a place nothing is different.

    Only the first process prints. An error is left for our own launcher to tell; under another launcher each process
    tells its own, but for the loss of another one, which the first tells.
    """
    if place is None:
        yield
        return
    take_card(place)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else a lost connection is told with its C++ frames
    quiet = (messages().quiet, results().quiet)
    messages().quiet = results().quiet = place.rank > 0
    try:
        with joined(place, layout) as team:
            team.layout = replace(layout, strategy=team.share(layout.strategy))
            yield
    except typer.Exit:
        raise
    except (Exception, Stop) as error:
        found = _as_told(error)
        lost = isinstance(error, PeerLost)
        if isinstance(error, PeerLost) and error.teller != place.rank and ENDINGS not in os.environ:
            raise typer.Exit(found.exit_code) from None
        own = type(found) in (LoraTuneError, ResourceError)  # the rest happens to all of them alike
        if leave_ending(place.rank, found, cause="another was lost" if lost else "own") or (
            place.rank > 0 and not own and not lost
        ):
            raise typer.Exit(found.exit_code) from None
        messages().quiet = False
        raise
    finally:
        messages().quiet, results().quiet = quiet


def _as_told(error: Exception | Stop) -> LoraTuneError:
    if isinstance(error, Stop):
        reason = f"stopped by {signal_name(error.number)}; the same command with --resume goes on"
        return Interrupted(error.number, reason)
    return as_error(error, "lora-tune run")

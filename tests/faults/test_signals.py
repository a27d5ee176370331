"""A sample of the grid: signals while tokenizing, training and evaluating."""

from __future__ import annotations

import pytest

from tests.faults.cases import SIGNALS, Grid, signals

SAMPLE = {
    (name, phase): case
    for name in SIGNALS
    for phase in ("tokenizing", "training", "evaluating")
    for case in signals((phase,))
    if case.name.startswith(name) and (name == "SIGTERM" or phase == "training")
}


@pytest.mark.parametrize(("name", "phase"), SAMPLE)
def test_a_signal_ends_the_run_with_its_code_and_it_goes_on(grid: Grid, name: str, phase: str) -> None:
    verdict = grid.play(SAMPLE[name, phase])
    assert verdict.lost == "" and verdict.codes == (128 + SIGNALS[name], 0)

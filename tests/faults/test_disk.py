"""A sample of the grid: disks that are full, break, are read-only or refuse, once or from then on, and power cuts."""

from __future__ import annotations

import pytest

from tests.faults import cases
from tests.faults.cases import NF4, Grid
from tests.faults.driver import RUN, Fault
from tests.faults.places import copy_place

PARTS = 3
POINTS = [("ENOSPC", "fail_from", part) for part in range(PARTS)] + [("EIO", "fail", part) for part in range(PARTS)]
POINTS += [("EDQUOT", "fail_from", 2), ("EROFS", "fail_from", 1), ("EACCES", "fail_from", 0)]


@pytest.mark.parametrize(("kind", "mode", "part"), POINTS)
def test_a_disk_that_refuses_loses_no_run(grid: Grid, kind: str, mode: str, part: int) -> None:
    """The run goes on, or ends in one line with exit code 2 or 4; with room again it is resumed."""
    reference = grid.reference(NF4)
    number = 3 + part * len(reference.operations) // PARTS
    (case,) = cases.full_disks(kind, mode, reference, [number])
    verdict = grid.play(case)
    assert verdict.lost == "", case


def test_a_checkpoint_that_was_not_written_says_what_it_needs(grid: Grid) -> None:
    """One line: the path, the reason, how much is needed and how much is free; the training goes on."""
    reference = grid.reference(NF4)
    place = copy_place(reference.place, grid.folder / "skipped")
    fault = Fault("fail", reference.save(4).start + 4, errno=28)
    ran = grid.server("plain").run(place, RUN, fault)
    assert ran.code == 0, ran.err
    (line,) = [line for line in ran.err.splitlines() if "was not written" in line]
    assert "checkpoint of step 4" in line and "out/checkpoints" in line and "No space left" in line
    assert "needs" in line and "free" in line


@pytest.mark.parametrize("part", range(PARTS))
def test_a_power_cut_costs_no_more_than_a_kill(grid: Grid, part: int) -> None:
    """Bytes that no fsync covered are gone, and the run still goes on from a whole checkpoint."""
    reference = grid.reference(NF4)
    numbers = reference.between("out/", "out/manifest.json")
    (case,) = cases.power_cuts(reference, [numbers[part * len(numbers) // PARTS]])
    verdict = grid.play(case)
    assert verdict.lost == "" and verdict.codes[0] == -9, case

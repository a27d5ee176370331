"""The injector and the warm server do what the cases rely on."""

from __future__ import annotations

from tests.faults.cases import NF4, Case, Grid
from tests.faults.driver import RUN, Fault, process


def test_a_run_in_a_fork_is_the_run_of_a_process(grid: Grid) -> None:
    """The same adapter, the same file operations, and the kill comes where it was asked for."""
    from tests.faults.driver import result
    from tests.faults.places import copy_place

    reference = grid.reference(NF4)
    case = copy_place(reference.place, grid.folder / "alone")
    done = process(grid.library, case, RUN, {"FAULT_LOG": str(case / "operations.txt")})
    assert done.code == 0, done.err
    found = result(case)
    assert found is not None and found.files == reference.result.files and found.losses == reference.result.losses
    assert not found.untidy


def test_a_lost_run_is_seen(grid: Grid) -> None:
    """The verdict is not always a friendly one: a run that is not resumed, and one that another one replaced."""
    reference = grid.reference(NF4)
    last = Fault("kill_before", reference.operations.index(("rename", "out/manifest.json")) + 1)
    assert grid.play(Case("seen", "killed at the very end", NF4, (last,))).lost == ""
    twice = Case("seen", "killed twice", NF4, (last, Fault("kill_before", 1)))
    verdict = grid.play(twice)
    assert verdict.codes == (-9, -9, 0) and verdict.lost == "" and verdict.stopped

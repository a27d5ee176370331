"""The injector and the warm server do what the cases rely on."""

from __future__ import annotations

from dataclasses import replace

from seldom import SELDOM

from tests.faults.cases import NF4, Case, Grid, judge
from tests.faults.driver import RUN, Attempt, Fault, Result, process, result
from tests.faults.places import copy_place


@SELDOM[0]
@SELDOM[1]
def test_a_run_in_a_fork_is_the_run_of_a_process(grid: Grid) -> None:
    """The same adapter, the same file operations, and the kill comes where it was asked for."""
    reference = grid.reference(NF4)
    case = copy_place(reference.place, grid.folder / "alone")
    done = process(grid.injector, case, RUN, {"FAULT_LOG": str(case / "operations.txt")})
    assert done.code == 0, done.err
    found = result(case)
    assert found is not None and found.files == reference.result.files and found.losses == reference.result.losses
    assert not found.untidy


def test_killed_at_the_very_end_with_the_proof_in_the_resumed_run(grid: Grid) -> None:
    """Killed before the last rename, and the resumed run at its first operation."""
    reference = grid.reference(NF4)
    grid.proof = "made"
    last = Fault("kill_before", reference.operations.index(("rename", "out/manifest.json")) + 1)
    verdict = grid.play(Case("end", "killed twice", NF4, (last, Fault("kill_before", 1))))
    grid.proof = "left out"
    assert verdict.codes == (-9, -9, 0) and verdict.lost == "" and verdict.stopped


def test_a_verdict_can_be_that_a_run_is_lost() -> None:
    steps = tuple((step, float(step).hex()) for step in range(1, 7))
    wanted = Result(steps, {"adapter": "a"}, ())
    case = Case("seen", "", NF4, (Fault("kill_before", 1),))
    struck, resumed = Attempt(-9, steps[:4], ""), Attempt(0, steps[2:], "")

    def verdict(found: Result | None = wanted, *, first: Attempt = struck, last: Attempt = resumed) -> str:
        return judge(case, [first, last], found, wanted)

    assert verdict() == ""
    assert "ended with 1" in verdict(last=replace(resumed, code=1)) and verdict(None)
    assert "struck run ended with 1" in verdict(first=replace(struck, code=1))
    assert "traceback" in verdict(last=replace(resumed, err="Traceback (most recent call last)"))
    assert "losses" in verdict(replace(wanted, losses=steps[:5]))
    assert "files" in verdict(replace(wanted, files={"adapter": "b"}))
    assert "left over" in verdict(replace(wanted, untidy=(".writing",)))
    assert "another loss" in verdict(last=replace(resumed, steps=((3, "0x0p+0"),)))
    assert "3 steps were taken again" in verdict(last=replace(resumed, steps=steps[1:]))

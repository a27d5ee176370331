"""A sample of the grid: kill -9 before operations and in the middle of writes, all over a run of a 4-bit base."""

from __future__ import annotations

import pytest

from tests.faults import cases
from tests.faults.cases import NF4, OTHERS, Grid

POINTS = 8  # of a run's three or four hundred operations


@pytest.mark.parametrize("point", range(POINTS))
def test_killed_anywhere_a_run_goes_on_to_the_same_adapter(grid: Grid, point: int) -> None:
    reference = grid.reference(NF4)
    number = 1 + point * len(reference.operations) // POINTS
    found = list(cases.kills("kill", NF4, reference, [number]))
    verdict = grid.play(found[-1])  # in the middle where there is one
    assert verdict.lost == "" and verdict.codes == (-9, 0), found[-1]


@pytest.mark.parametrize("part", ["rename of the checkpoint", "rotation", "adapter renamed", "manifest renamed"])
def test_killed_at_a_turning_point(grid: Grid, part: str) -> None:
    """Where one operation more or less decides what a resumed run finds."""
    reference = grid.reference(NF4)
    last = reference.save(6).stop - 1
    number = {
        "rename of the checkpoint": last - 1,
        "rotation": last + 3,
        "adapter renamed": reference.operations.index(("rename", "out/adapter_model.safetensors")) + 2,
        "manifest renamed": reference.operations.index(("rename", "out/manifest.json")) + 2,
    }[part]
    (case,) = list(cases.kills("kill", NF4, reference, [number]))[:1]
    verdict = grid.play(case)
    assert verdict.lost == "" and verdict.stopped, case


def test_killed_again_and_again_during_the_resume(grid: Grid) -> None:
    for case in cases.deep_kills(1, grid.reference(NF4)):
        verdict = grid.play(case)
        assert verdict.lost == "", case


@pytest.mark.parametrize("point", range(len(OTHERS)))
def test_the_second_save_of_another_configuration(grid: Grid, point: int) -> None:
    configuration = OTHERS[point % len(OTHERS)]
    reference = grid.reference(configuration)
    numbers = reference.save(reference.second_save)
    case = list(
        cases.kills("second save", configuration, reference, [numbers[(1 + point) * len(numbers) // (1 + len(OTHERS))]])
    )[-1]
    assert grid.play(case).lost == "", case

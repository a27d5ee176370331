"""A sample of the grid: each file of the newest checkpoint damaged, each damage at least once."""

from __future__ import annotations

import shutil

import pytest

from tests.faults import cases, places
from tests.faults.cases import DAMAGES, FILES, NF4, Case, Grid
from tests.faults.driver import RESUME, Fault, result

PAIRS = list(zip(FILES, DAMAGES, strict=True))


@pytest.mark.parametrize(("file", "kind"), PAIRS)
def test_a_damaged_checkpoint_is_named_and_the_older_one_taken(grid: Grid, file: str, kind: str) -> None:
    case = Case("damage", f"{file}: {kind}", NF4, damage=(file, kind))
    verdict = grid.play(case)
    assert verdict.lost == "" and verdict.codes == (-9, 0), case


@pytest.mark.parametrize("kind", ["half", "a bit of the data", "missing"])
def test_a_finished_folder_that_is_damaged_is_written_again(grid: Grid, kind: str) -> None:
    """Never mistaken for a finished one: `--resume` writes it from the newest checkpoint."""
    reference = grid.reference(NF4)
    folder = grid.folder / f"finished-{kind.replace(' ', '-')}"
    server = grid.server("plain")
    places.copy_place(reference.place, folder)
    assert server.run(folder, ("run", "recipe.yaml")).code == 0
    weights = folder / "work" / "out" / "adapter_model.safetensors"
    cases.damage(weights, kind, older=weights, other=weights)
    again = server.run(folder, RESUME)
    assert again.code == 0 and weights.name in again.err, again.err
    found = result(folder)
    assert found is not None and found.files == reference.result.files and found.losses == reference.result.losses
    shutil.rmtree(folder)


def test_a_finished_run_is_finished(grid: Grid) -> None:
    """`--resume` of it ends well and takes no step, so that a node that is started again and again is content."""
    reference = grid.reference(NF4)
    folder = places.copy_place(reference.place, grid.folder / "finished")
    server = grid.server("plain")
    assert server.run(folder, ("run", "recipe.yaml")).code == 0
    before = {path.name: path.read_bytes() for path in (folder / "work" / "out").iterdir() if path.is_file()}
    again = server.run(folder, RESUME, Fault("count"))
    assert again.code == 0 and again.steps == ()
    assert before == {path.name: path.read_bytes() for path in (folder / "work" / "out").iterdir() if path.is_file()}

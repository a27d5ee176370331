"""Who may write into a run folder: one run at a time, never over another run, and nothing is left of a refusal."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_tune.adapter import claim
from lora_tune.adapter.claim import claim_folder, remove_older_run
from lora_tune.adapter.folder import FILES
from lora_tune.errors import UsageError


def _run_folder(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return folder


CLAIMS = [
    ((), {"new": None, "resume": None, "overwrite": None}),
    (("checkpoints/.lock",), {"new": None, "resume": None, "overwrite": None}),
    (("recipe.yaml", "checkpoints/5/state.json"), {"new": "in use", "resume": None, "overwrite": None}),
    (("recipe.yaml", "manifest.json"), {"new": "in use", "resume": None, "overwrite": None}),
    ((".metrics.jsonl.tmp", "checkpoints/.lock"), {"new": "in use", "resume": None, "overwrite": None}),
    (("thesis.doc",), {"new": "in use", "resume": "no run folder", "overwrite": "no run folder"}),
]


@pytest.mark.parametrize("mode", ["new", "resume", "overwrite"])
@pytest.mark.parametrize("held, expected", CLAIMS)
def test_claims(mode: claim.Mode, held: tuple[str, ...], expected: dict[str, str | None], tmp_path: Path) -> None:
    folder = _run_folder(tmp_path / "run", *held)
    reason = expected[mode]
    if reason is None:
        with claim_folder(folder, mode):
            assert folder.is_dir()
    else:
        before = sorted(folder.rglob("*"))
        with pytest.raises(UsageError, match=reason), claim_folder(folder, mode):
            pass
        assert sorted(folder.rglob("*")) == before  # refused without a trace


def test_overwrite_removes_documented_files_and_nothing_else(tmp_path: Path) -> None:
    folder = _run_folder(tmp_path / "run", *FILES, "checkpoints/5/a/b", "checkpoints/x", "mine.txt", "more/README.md")
    target = _run_folder(tmp_path / "elsewhere", "kept")
    (folder / "checkpoints" / "link").symlink_to(target)
    with claim_folder(folder, "overwrite"):
        assert (folder / "manifest.json").exists()  # whatever is refused until then leaves the older run whole
        remove_older_run(folder)
        left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert left == {"mine.txt", "more/README.md", "checkpoints/.lock", "checkpoints/.owner"}
    assert (target / "kept").exists()


def test_a_file_or_an_unwritable_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"), claim_folder(tmp_path / "file", "new"):
        pass
    with pytest.raises(UsageError, match="cannot be written"), claim_folder(tmp_path / "file" / "below", "new"):
        pass


HOLDER = """
import pathlib, sys
from lora_tune.adapter.claim import claim_folder
with claim_folder(pathlib.Path(sys.argv[1]), "new"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_while_the_first_one_writes_and_a_dead_one_does_not_hold(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(Path(claim.__file__).parents[2])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        started = time.monotonic()
        with (
            pytest.raises(UsageError, match=rf"another run.*\(process {process.pid}\)"),
            claim_folder(tmp_path / "run", "new"),
        ):
            pass
        assert time.monotonic() - started < 1
        process.kill()
    with claim_folder(tmp_path / "run", "new"):
        pass


def test_a_claim_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    """A run that is refused by its memory plan has claimed its folder already."""
    with pytest.raises(UsageError), claim_folder(tmp_path / "run", "new"):
        raise UsageError("does not fit")
    assert not list(tmp_path.iterdir())

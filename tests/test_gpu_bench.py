"""What a person with a card runs once: it goes on where it stopped, its commands are there, the table says what is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seldom import SELDOM

from benchmarks import context, gpu_table, step

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
PYTHON = """#!/bin/sh
# stands for Python: the last file that is named becomes a result, unless the module is the one that fails
case "$*" in *$FAILS*) echo "out of memory" >&2; exit 4 ;; esac
for word in "$@"; do case $word in *.json) echo '{}' > "$word" ;; esac; done
"""


def gpu_sh(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    found = subprocess.run(
        [str(SCRIPT), *words], capture_output=True, text=True, env={**os.environ, "FAILS": "nothing", **environment}
    )
    assert "Traceback" not in found.stdout + found.stderr
    return found


@pytest.fixture
def python(tmp_path: Path) -> str:
    path = tmp_path / "python"
    path.write_text(PYTHON)
    path.chmod(0o755)
    return str(path)


def test_a_part_leaves_its_result_and_is_not_made_again(tmp_path: Path, python: str) -> None:
    out, here = tmp_path / "out", {"PYTHON": python, "LORA_TUNE_BENCH": str(tmp_path / "work")}
    failed = gpu_sh("--out", str(out), "versions", "context", FAILS="benchmarks.context", **here)
    assert failed.returncode == 1 and "context: no result" in failed.stdout and "out of memory" in failed.stdout
    assert sorted(path.name for path in out.glob("*.json")) == ["versions.json"]
    again = gpu_sh("--out", str(out), **here)
    assert again.returncode == 0 and "versions: is there already" in again.stdout
    assert {path.stem for path in out.glob("*.json")} == {"versions", *gpu_table.PARTS}
    assert "versions: done" in gpu_sh("--out", str(out), "--again", "versions", **here).stdout
    names = [line.split("\t")[0] for line in (out / "parts.tsv").read_text().splitlines()]
    assert names.count("versions") == 2 and names.count("context") == 2 and names.count("run") == 1


def test_nothing_starts_when_the_time_is_over(tmp_path: Path, python: str) -> None:
    here = {"PYTHON": python, "LORA_TUNE_BENCH": str(tmp_path / "work")}
    found = gpu_sh("--out", str(tmp_path / "out"), "--minutes", "0", "versions", **here)
    assert found.returncode == 1 and "versions: not made, 0 minutes are over" in found.stdout


@pytest.mark.parametrize("how", ["--list", "--list --dry"])
def test_every_command_and_option_of_the_script_is_there(how: str) -> None:
    """And all of them together may take no longer than is promised, if none takes its limit but the two first steps."""
    lines = [line.split("|") for line in gpu_sh(*how.split()).stdout.splitlines()]
    assert {name for name, *_ in lines} == {"versions", *gpu_table.PARTS}
    helps: dict[str, str] = {}
    for _, limit, command in lines:
        words = command.split()
        module = words[words.index("-m") + 1]
        if module not in helps:
            asked = [sys.executable, "-m", module, "--help"]
            helps[module] = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        assert 0 < int(limit) <= 600 and "{}" in words
        assert all(word in helps[module] for word in words if word.startswith("--"))
        if "--against" in words:
            named = words[words.index("--against") + 1].split(",")
            assert set(named) <= {*step.HERE, *step.OWN_ENVIRONMENT}


def test_a_tool_that_hangs_is_stopped_and_the_others_are_said(tmp_path: Path) -> None:
    """Its process is killed when the time is over; what comes after it does not start."""
    python = tmp_path / "unsloth" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    left_out: dict[str, str] = {}
    began = time.monotonic()
    names, job = ["unsloth", "llamafactory"], step.Job("lora", steps=2, threads=1)
    found = step.one_pass(names, tmp_path, job, peers=tmp_path, left_out=left_out, ends=began + 0.5)
    assert found == {} and left_out == dict.fromkeys(names, "the time was over")
    assert time.monotonic() - began < 30


@settings(max_examples=60)
@given(rest=st.floats(1, 6), slope=st.floats(1e-5, 1e-2), bent=st.floats(0.9, 1.1), room=st.floats(2, 24))
def test_the_longest_length_is_one_that_was_tried_and_is_near_the_limit(
    rest: float, slope: float, bent: float, room: float
) -> None:
    """Memory is nearly a line in the length; what the line says may be wrong by a tenth."""

    def try_step(tokens: int) -> tuple[float, float]:
        peak = rest + slope * bent * tokens
        if peak > room:
            raise context.DoesNotFit
        return peak, 0.1

    found = context.longest(try_step, line=(rest, slope), room_gib=room, most=1_000_000)
    true = (room - rest) / (slope * bent)
    assert len(found.tried) <= 5 and found.tokens <= max(0.0, true)
    if found.tokens:
        assert found.tokens in found.tried and found.peak_gib <= room + 0.01
    if true > 2 * context.ROUNDED:
        assert found.tokens >= min(0.85 * true, 900_000) - 2 * context.ROUNDED


def test_the_table_is_that_of_the_results() -> None:
    assert gpu_table.TABLE.read_text(encoding="utf-8") == gpu_table.text(), "run python -m benchmarks.gpu_table --write"


def test_what_has_no_file_is_unmeasured_and_what_has_one_names_it(tmp_path: Path) -> None:
    empty = gpu_table.text(tmp_path)
    rows = [line for line in empty.splitlines() if line.startswith("| ")][1:]
    assert rows and all(line.endswith("| unmeasured | – |") for line in rows)

    def row(tool: str, speed: float, mib: float) -> dict[str, Any]:
        return {"tool": tool, "tokens_per_s": speed, "peak_mib": mib}

    steps = {"rows": [row("lora_tune", 16000.0, 9000.0), row("unsloth", 12800.0, 10000.0)]}
    sizes = {"limited": True, "rows": {"offloaded": [{"gib": 8, "tokens": 3008, "peak_gib": 7.4}]}}
    (tmp_path / "step_4x2048_qlora.json").write_text(json.dumps(steps))
    (tmp_path / "context.json").write_text(json.dumps(sizes))
    made = gpu_table.text(tmp_path)
    assert (
        "| 8B, NF4, rank 16, 4 x 2,048 | over Unsloth | 1.15 | 1.25 (16,000 / 12,800) | `results/gpu/step_4x2048"
        in made
    )
    assert "| over TRL | 2 | unmeasured |" in made and "| Unsloth says 2,972 | 3,008 (7.4 GiB) |" in made
    sizes["limited"] = False  # a dry run on a CPU is no measurement
    (tmp_path / "context.json").write_text(json.dumps(sizes))
    assert "3,008" not in gpu_table.text(tmp_path)


def test_what_is_missing_of_what_is_needed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_table.missing() == []
    monkeypatch.setattr(gpu_table, "versions", lambda *names: dict.fromkeys(set(names) - {"nvidia-ml-py"}, "1"))
    assert [need.split(">")[0] for need in gpu_table.missing()] == ["nvidia-ml-py"]


@SELDOM[0]
@SELDOM[1]
@pytest.mark.timeout(900)
def test_the_whole_script_in_small(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = gpu_sh("--dry", "--out", str(out), PYTHON=sys.executable, LORA_TUNE_BENCH=str(tmp_path / "work"))
    assert found.returncode == 0, found.stdout
    assert {path.stem for path in out.glob("*.json")} == {"versions", *gpu_table.PARTS}
    gpu_table.text(out)

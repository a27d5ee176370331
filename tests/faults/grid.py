"""The whole grid of faults: `python -m tests.faults.grid` (`make faults`), with LORA_TUNE_CORPUS naming the corpus.

Each verdict is appended to a record as it comes; started again, the grid goes on where it was interrupted, and tries
again what was lost. At the end the record becomes a table. `--workers` runs parts of the grid side by side, `--only`
runs the groups that start with a word, `--fresh` forgets the record.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.faults import cases, places, processes
from tests.faults.driver import ROOT, build_injector

RESULTS = ROOT / "benchmarks" / "results" / "faults.md"
_SAMPLED = ("EDQUOT", "EROFS", "EACCES")


def all_cases(grid: cases.Grid) -> list[cases.Case]:
    """Every case of the grid; those of a group in strides, so that a part of the grid is a fair sample of it."""
    nf4 = grid.reference(cases.NF4)
    every = range(1, len(nf4.operations) + 1)
    groups: list[Iterator[cases.Case]] = [
        cases.damages(),
        cases.signals(("tokenizing", "training", "evaluating", "writing")),
        cases.kills("kill before and in the middle of every operation", cases.NF4, nf4, every),
    ]
    for configuration in cases.OTHERS:
        reference = grid.reference(configuration)
        numbers = reference.save(reference.second_save)
        groups.append(cases.kills("the same in the second save", configuration, reference, numbers))
    groups.append(cases.random_kills(100, {name: grid.reference(name) for name in (cases.NF4, *cases.OTHERS)}))
    groups.append(cases.deep_kills(30, nf4))
    groups.append(cases.full_disks("ENOSPC", "fail_from", nf4, every))
    groups.append(cases.full_disks("EIO", "fail", nf4, every))
    groups.append(cases.power_cuts(nf4, nf4.between("out/", "out/manifest.json")))
    for number, kind in enumerate(_SAMPLED):
        groups.append(cases.full_disks(kind, "fail_from", nf4, every[number::15]))
    groups.append(cases.processes(nf4))
    ranked = [(rank(number), order, case) for order, group in enumerate(groups) for number, case in enumerate(group)]
    return [case for *_, case in sorted(ranked, key=lambda entry: entry[:2])]


def rank(number: int) -> int:
    """The round in which the `number`-th case of a group is run: every eighth first, then those between them."""
    return (0, 4, 2, 5, 1, 6, 3, 7)[number % 8]


def main() -> int:
    """Run what is not in the record yet, then write the table; the exit code is 1 where a run was lost."""
    parser = argparse.ArgumentParser(description="Faults at every file operation of a run, and whether it is resumed.")
    parser.add_argument("--corpus", type=Path, default=os.environ.get("LORA_TUNE_CORPUS"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, default=ROOT / "build" / "faults.jsonl")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="groups that start with this")
    parser.add_argument("--fresh", action="store_true", help="forget what was run before")
    given = parser.parse_args()
    if given.corpus is None or not Path(given.corpus).is_dir():
        print("LORA_TUNE_CORPUS must name the folder with the fault injector", file=sys.stderr)
        return 2
    if given.worker:
        return _work(given)
    given.record.parent.mkdir(parents=True, exist_ok=True)
    if given.fresh:
        given.record.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.faults.grid", *sys.argv[1:]]
    command = [word for word in command if word != "--fresh"]
    workers = [subprocess.Popen([*command, "--worker", str(number)]) for number in range(1, given.workers + 1)]
    codes = [worker.wait() for worker in workers]
    rows = _rows(given.record)
    if not any(codes):
        planned = json.loads(_plan(given.record).read_text(encoding="utf-8"))
        given.results.write_text(table(rows, planned=planned, workers=given.workers), encoding="utf-8")
        print(f"{given.results} written")
    return max(codes) or int(any(row["lost"] for row in rows))


def _work(given: argparse.Namespace) -> int:
    """One worker: the cases whose number falls to it and that the record does not hold."""
    memory = Path("/dev/shm")  # a sync costs nothing there
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None, prefix="faults-") as name:
        folder = Path(name)
        with cases.Grid(build_injector(given.corpus, folder), folder, keep=folder.parent / "faults-lost") as grid:
            planned = all_cases(grid)
            groups = Counter(case.group for case in [*planned, *processes.cases()])
            _plan(given.record).write_text(json.dumps(groups), encoding="utf-8")
            mine = planned[given.worker - 1 :: given.workers]
            done = {row["key"] for row in _rows(given.record) if not row["lost"]}
            mine = [case for case in mine if case.key not in done and case.group.startswith(given.only)]
            began = time.monotonic()
            several = list(processes.cases())[given.worker - 1 :: given.workers]
            for pair in several:
                if pair.key not in done and pair.group.startswith(given.only):
                    row = processes.play(pair, folder) | {"commit": commit()}
                    with given.record.open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps(row) + "\n")
            for number, case in enumerate(mine, 1):
                grid.proof = "made" if number % 8 == 1 else "left out"
                verdict = grid.play(case)
                with given.record.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(verdict.as_row() | {"commit": commit()}) + "\n")
                spent = time.monotonic() - began
                if verdict.lost:
                    print(f"LOST {case.key}: {verdict.codes}: {verdict.lost}", flush=True)
                if number % 25 == 0 or number == len(mine):
                    left = spent / number * (len(mine) - number) / 60
                    print(f"worker {given.worker}: {number}/{len(mine)} cases, {left:.0f} min left", flush=True)
    return 0


def _plan(record: Path) -> Path:
    """Beside the record: how many cases each group has."""
    return record.with_suffix(".plan.json")


def _rows(record: Path) -> list[dict[str, Any]]:
    """The newest verdict on each case."""
    if not record.exists():
        return []
    rows = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    return list({row["key"]: row for row in rows}.values())


def table(rows: Sequence[Mapping[str, Any]], *, planned: Mapping[str, int], workers: int) -> str:
    """The counts of each group, of how many cases, and where and on what they were made, as Markdown."""
    lines = [
        "# Faults on purpose",
        "",
        "A run is struck, then continued by the same command with `--resume`. *Identical*: it ends with exit code 0,",
        "with losses of all steps, adapter, configuration, test vectors, tokenizer and ledger of a run that nothing",
        "struck, to the last bit; after a kill at most `save_every` steps are taken again; nothing is left over, no",
        "traceback was printed. *Went on*: the struck run itself came to that end. *Lost*: all else.",
        "Of two processes or machines one is struck: one message, then the losses of one process, to 1e-4.",
        "",
        "| fault | cases | tried | identical | of these went on | lost |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for group in (*planned, None):
        found = [row for row in rows if group in (None, row["group"])]
        of = planned[group] if group else sum(planned.values())
        lost = sum(bool(row["lost"]) for row in found)
        went_on = sum(not row["stopped"] and not row["lost"] for row in found)
        name = f"**{group or 'all'}**" if group is None else group
        lines.append(f"| {name} | {of:,} | {len(found):,} | {len(found) - lost:,} | {went_on:,} | {lost:,} |")
    runs = sum(len(row["codes"]) for row in rows)
    busy = sum(row["seconds"] for row in rows) / 60
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    lines += [
        "",
        f"Configurations: {'; '.join(places.CONFIGURATIONS)}. The second saves are those of the last",
        f"three, random kills strike all, signals the third, everything else {cases.NF4}. {runs:,} runs in {busy:,.0f}",
        f"minutes of {workers} worker(s) on {os.cpu_count()} cores ({_processor()}, no GPU).",
        f"{_versions()}.",
        f"Commit {commits}, {datetime.now(UTC):%Y-%m-%d}. Repeat with `make faults`; how the faults are made stands in",
        "`tests/faults/`.",
    ]
    for row in rows:
        if row["lost"]:
            lines.append(f"\nLost: {row['key']} (exit codes {row['codes']}): {' '.join(row['lost'].split())[:400]}")
    return "\n".join(lines) + "\n"


def commit() -> str:
    """The commit that the cases run on, marked where the tree was changed."""
    named = os.environ.get("LORA_TUNE_COMMIT")  # of an exported tree
    if named:
        return named
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> str:
    from lora_tune.adapter.write import library_versions

    versions = {"Python": platform.python_version(), **library_versions()}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


if __name__ == "__main__":
    sys.exit(main())

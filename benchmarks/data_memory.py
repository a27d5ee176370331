"""Memory and time of data by its number of rows:  python -m benchmarks.data_memory [--rows 100000 1000000] [--write]

Short rows (about 30 tokens) of addition, made here, go from a JSONL file to packed rows and through the search for
shared passages, on the embedded base's tokenizer, twice: without and with the cache. Each size in a process of its own.
Peaks are anonymous resident memory above that of the same process after 60 rows: mapped files are not counted, since
the system may take them back. The slope between two sizes is what a further row takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, machine, versions

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = 600
LIBRARIES = ("transformers", "tokenizers", "pyarrow", "numpy")
_SAMPLED_S = 0.01


def written(path: Path, rows: int) -> Path:
    """`rows` alpaca rows, no two equal."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            file.write(f'{{"instruction": "What is {i} plus {i % 97}?", "output": "It is {i + i % 97}."}}\n')
    return path


class Watch:
    """The peak of anonymous resident memory, in MiB, by what was being done."""

    def __init__(self) -> None:
        self.stage, self.peaks = "", {}  # type: ignore[var-annotated]
        threading.Thread(target=self._sample, daemon=True).start()

    @staticmethod
    def now() -> float:
        """Anonymous resident memory in MiB (Linux)."""
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1024

    def _sample(self) -> None:
        while True:
            self.peaks[self.stage] = max(self.peaks.get(self.stage, 0.0), self.now())
            time.sleep(_SAMPLED_S)


def part(rows: int, folder: Path) -> dict[str, Any]:
    """One size, in this process."""
    from transformers import AutoTokenizer

    from lora_tune.data.chat_template import load_chat_template
    from lora_tune.data.overlap import known_overlap
    from lora_tune.data.pipeline import encode, read_conversations
    from lora_tune.recipe import DataSource, Limits, Train

    chat = load_chat_template(AutoTokenizer.from_pretrained(ROOT / "lora_tune" / "builtin" / "quickstart"))
    watch = Watch()

    def once(path: Path, name: str, hold_out: int) -> dict[str, float]:
        clock, cpu = time.perf_counter(), time.process_time()
        watch.stage = f"{name}: read"
        found = read_conversations([DataSource(source=str(path))], hold_out=hold_out, seed=1)
        read = time.process_time() - cpu
        watch.stage = f"{name}: encode"
        encode(found, chat, loss_on="assistant", train=Train(max_length=2048), limits=Limits(), seed=1)
        watch.stage = f"{name}: shared passages"
        known_overlap(found.train, found.held_out)
        watch.stage = ""
        seconds, cpu_s = time.perf_counter() - clock, time.process_time() - cpu
        return {"s": round(seconds, 2), "cpu_s": round(cpu_s, 2), "read_cpu_s": round(read, 2)}

    once(written(folder / "few.jsonl", 60), "few", 6)
    path = written(folder / "rows.jsonl", rows)
    before = watch.now()
    facts: dict[str, Any] = {"rows": rows, "file_mib": round(path.stat().st_size / 2**20, 1)}
    facts |= {"first": once(path, "first", HELD_OUT), "again": once(path, "again", HELD_OUT)}
    peaks = {name: round(mib - before, 1) for name, mib in watch.peaks.items() if name[:5] in ("first", "again")}
    return {**facts, "peak_mib": peaks, "highest_mib": max(peaks.values())}


def measured(rows: int) -> dict[str, Any]:
    """One size, in a process of its own with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "LORA_TUNE_CACHE": f"{folder}/cache", "TMPDIR": folder}
        command = [sys.executable, "-m", "benchmarks.data_memory", "--part", str(rows), "--folder", folder]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{rows} rows failed:\n{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def extrapolated(first: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    """What a further row takes in each stage, and the highest stage at 10 million rows by that."""
    slopes, at_10m = {}, []
    for name in sorted(first["peak_mib"].keys() & last["peak_mib"].keys()):
        slope = (last["peak_mib"][name] - first["peak_mib"][name]) / (last["rows"] - first["rows"])
        slopes[name] = round(slope * 2**20)
        at_10m.append(first["peak_mib"][name] + slope * (10_000_000 - first["rows"]))
    return {"bytes_a_row": slopes, "extrapolated_mib_at_10m_rows": round(max(at_10m))}


def main() -> None:
    """Measure every size, or print one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--write", action="store_true", help=f"keep the result in {RESULTS.name}/data_memory.json")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        print(json.dumps(part(given.part, given.folder)))
        return
    sizes = [measured(rows) for rows in sorted(given.rows)]
    facts: dict[str, Any] = {"machine": machine(), "versions": versions(*LIBRARIES), "sizes": sizes}
    facts |= extrapolated(sizes[0], sizes[-1]) if len(sizes) > 1 else {}
    text = json.dumps(facts, indent=1)
    print(text)
    if given.write:
        (RESULTS / "data_memory.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The table of what was measured on a card, made from what `benchmarks/gpu.sh` left:

python -m benchmarks.gpu_table             print it; what has no results file is called unmeasured
python -m benchmarks.gpu_table --write     keep it as benchmarks/results/gpu.md (a test compares it)
python -m benchmarks.gpu_table --machine FILE    the card, its driver, the libraries
python -m benchmarks.gpu_table --tests FILE      the tests marked `gpu`, and which kernels this card gets
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, machine, versions
from benchmarks.peers.protocol import LIBRARIES, ROOT

FOLDER = RESULTS / "gpu"
TABLE = RESULTS / "gpu.md"
UNMEASURED = "unmeasured"
Line = tuple[str, str, str]  # what, the goal, what was measured


def kept(name: str, folder: Path) -> Any:
    """A result, or None where nobody measured it."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() and path.stat().st_size else None


def _rows(found: Any) -> dict[str, dict[str, Any]]:
    return {row["tool"]: row for row in found["rows"]} if found else {}


def _against(rows: dict[str, dict[str, Any]], tool: str, *, field: str = "tokens_per_s") -> str:
    """Ours over a tool's."""
    if "lora_tune" not in rows or tool not in rows:
        return UNMEASURED
    ours, theirs = rows["lora_tune"][field], rows[tool][field]
    return f"{ours / theirs:.2f} ({ours:,.0f} / {theirs:,.0f})"


def peers(found: Any, *, lead: bool) -> Iterator[Line]:
    """Speed and memory of a step beside the tools that were there; `lead`: the issue sets goals for it."""
    rows = _rows(found)
    ours = f"{rows['lora_tune']['tokens_per_s']:,.0f}" if "lora_tune" in rows else UNMEASURED
    yield "tokens/s", "15,000 on an H200" if lead else "", ours
    yield "over Unsloth", "1.15" if lead else "", _against(rows, "unsloth")
    yield "over TRL", "2" if lead else "", _against(rows, "trl")
    yield "over LLaMA-Factory", "", _against(rows, "llamafactory")
    yield "over a raw PEFT loop", "", _against(rows, "raw")
    yield "peak memory over Unsloth's (MiB)", "at most 1" if lead else "", _against(rows, "unsloth", field="peak_mib")


def ours(found: Any) -> Iterator[Line]:
    """What each of our own ways gives."""
    rows = _rows(found)
    yield "fused layers over PEFT's (tokens/s)", "", _against(rows, "unfused")
    yield "attention by document over a mask (tokens/s)", "", _against(rows, "masked")
    yield "fused layers over compiled ones (tokens/s)", "", _against(rows, "compiled")


def context(found: Any) -> Iterator[Line]:
    """Tokens of one sequence that train in so much memory."""
    limited = found and found["limited"]
    ways = {"offloaded": "inputs of layers, embedding in the machine's memory",
            "recomputed": "layers computed again", "kept": "nothing computed again"}  # fmt: skip
    for how, words in ways.items():
        by_size = {row["gib"]: row for row in found["rows"].get(how, [])} if limited else {}
        for gib, published in ((8, 2_972), (12, 21_848), (16, 40_724), (24, 78_475)):
            row = by_size.get(gib)
            said = UNMEASURED if row is None else row.get("why") or f"{row['tokens']:,} ({row['peak_gib']:.1f} GiB)"
            goal = f"Unsloth says {published:,}" if how == "offloaded" else ""
            yield f"longest sequence in {gib} GiB, {words}", goal, said


def whole_run(found: Any) -> Iterator[Line]:
    """The command `lora-tune run`."""
    training = found["training"] if found else {}
    speed = f"{training['tokens'] / training['seconds']:,.0f}" if training.get("seconds") else UNMEASURED
    yield "`lora-tune run` on alpaca.yaml: tokens/s", "", speed
    yield "its peak (GiB)", "", f"{training['peak_gib']:.2f}" if training.get("peak_gib") else UNMEASURED
    planned = [line for line in found["said"] if "planned" in line] if found else []
    yield "measured beside planned", "within 10 %", planned[0] if planned else UNMEASURED


def tests(found: Any) -> Iterator[Line]:
    """Equality on the card itself."""
    said = found.get("why", UNMEASURED) if found else UNMEASURED
    if found and found["passed"] + found["failed"]:
        said = f"{found['passed']} pass, {found['failed']} fail, {found['skipped']} skipped"
    yield "tests of kernels and attention on the card", "all pass", said


PARTS: dict[str, tuple[str, Callable[[Any], Iterator[Line]]]] = {
    "kernels": ("tests", tests),
    "step_4x2048_qlora": ("8B, NF4, rank 16, 4 x 2,048", lambda found: peers(found, lead=True)),
    "step_1x8192_qlora": ("8B, NF4, rank 16, 1 x 8,192", lambda found: peers(found, lead=True)),
    "context": ("8B, NF4, rank 32, one sequence", context),
    "step_4x2048_ours": ("8B, NF4, 4 x 2,048", ours),
    "run": ("8B, NF4, the whole command", whole_run),
    "step_4x2048_lora": ("8B, bfloat16, rank 16, 4 x 2,048", lambda found: peers(found, lead=False)),
    "step_1x8192_ours": ("8B, NF4, 1 x 8,192", ours),
}


def text(folder: Path = FOLDER) -> str:
    """The table in Markdown, the card above it."""
    found = kept("versions", folder)
    card = UNMEASURED
    if found:
        libraries = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        card = f"{found['machine']['gpu'] or 'no card'}; {libraries}"
    made_by = "Made by `python -m benchmarks.gpu_table --write` from what `benchmarks/gpu.sh` left."
    lines = [f"Measured on: {card}. {made_by}", ""]
    lines += ["| what | | goal | measured | file |", "|---|---|---|---|---|"]
    for name, (words, rows) in PARTS.items():
        result = kept(name, folder)
        file = f"`results/gpu/{name}.json`" if result else "–"
        lines += [f"| {words} | {what} | {goal} | {said} | {file} |" for what, goal, said in rows(result)]
    return "\n".join(lines) + "\n"


def this_machine() -> dict[str, Any]:
    """The card as PyTorch and its driver name it, and every library that counts."""
    import torch

    facts: dict[str, Any] = {"torch_cuda": torch.version.cuda, "varlen": _has_varlen()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gib": round(properties.total_memory / 2**30, 1), "processors": properties.multi_processor_count,
                  "capability": ".".join(map(str, torch.cuda.get_device_capability(0)))}  # fmt: skip
    asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        facts["driver"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    except OSError:
        facts["driver"] = ""
    names = ("lora_tune", *LIBRARIES, "trl", "triton", "tokenizers")
    return {"machine": machine(), "card": facts, "versions": versions(*names), "missing": missing()}


def missing() -> list[str]:
    """What lora_tune needs and this Python has not, of any version; a machine without network has what was carried."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = [re.split(r"[<>=!~;\[ ]", need, maxsplit=1)[0] for need in needs]
    there = versions(*names)
    return [need for name, need in zip(names, needs, strict=True) if name not in there]


def _has_varlen() -> str:
    from lora_tune.model import attention

    found = attention._kernel()
    return "" if found is None else str(inspect.signature(found))


def gpu_tests() -> dict[str, Any]:
    """The tests marked gpu, run here; `why` where they cannot be run."""
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        return {"passed": 0, "failed": 0, "skipped": 0, "why": "pytest and hypothesis are not installed"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}",
                   "-o", "addopts=", "-W", "default", *_marked()]  # fmt: skip
        said = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(said.stdout[-6000:])
        if not report.exists():
            return {"passed": 0, "failed": 1, "skipped": 0, "why": said.stdout[-1500:]}
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname')}::{case.get('name')}" for case in failed]
    return {"passed": len(cases) - len(failed) - skipped, "failed": len(failed), "skipped": skipped, "names": names}


def _marked() -> list[str]:
    """Files with a test for a GPU: others need not be collected."""
    return [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]


def main() -> int:
    """Print or keep the table, or what one part of `gpu.sh` asks for."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--machine", type=Path)
    parser.add_argument("--tests", type=Path)
    given = parser.parse_args()
    for path, make in ((given.machine, this_machine), (given.tests, gpu_tests)):
        if path:
            made = json.dumps(make(), indent=1)
            print(made)
            path.write_text(made + "\n", encoding="utf-8")
    if given.machine or given.tests:
        return 0
    print(text())
    if given.write:
        TABLE.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

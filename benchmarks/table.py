"""The README's table of speeds, made from what is kept in `results/`:  python -m benchmarks.table [--write]

Reads the files of RESULT_FILES. What has no file is called unmeasured. `--write` keeps the tables as
`results/side_by_side.md`, and that of recomputed layers in `docs/kernels.md`; a test compares those files with what
this makes, and the README with the first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS

TABLE = RESULTS / "side_by_side.md"
NAMES = {"lora_tune": "**lora_tune**", "raw": "raw PEFT loop", "trl": "TRL", "unsloth": "Unsloth (CPU mode)",
         "llamafactory": "LLaMA-Factory", "unfused": "lora_tune, `kernels: off`",
         "floor": "frozen base alone"}  # fmt: skip
PACKAGES = {"lora_tune": "lora_tune", "trl": "trl", "raw": "peft", "unsloth": "unsloth", "llamafactory": "llamafactory"}
METHODS = {"lora": "LoRA, bf16", "qlora": "QLoRA, nf4"}
RESULT_FILES = ("step_small_lora", "step_small_qlora", "floor_small_lora", "floor_small_qlora", "start", "data",
                "tokens", "memory_small", "memory_small_one_row")  # fmt: skip


KERNELS = RESULTS.parents[1] / "docs" / "kernels.md"
RECOMPUTED = ["base", "CPU s a step: `kernels: off`, whole, pieces", "times as fast as off, as whole",
              "bytes a token: off, whole, pieces", "evaluated: off, pieces"]  # fmt: skip
MEMORY = """A training step, without the runtime, which the plan counts with 0.5 GiB: on a CPU that has to hold what
libraries and malloc take beyond PyTorch's own. Of four rows the plan counts attention with a mask, as rows of unequal
length need it; these are of one length.

"""


def kept(name: str, folder: Path) -> dict[str, Any] | None:
    """A result, or None where nobody measured it."""
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def lines_of(columns: list[str], rows: Iterator[list[str]]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *rows)]


def step_rows(folder: Path) -> Iterator[list[str]]:
    """Tool by tool, the fastest first."""
    for method, words in METHODS.items():
        found = kept(f"step_small_{method}.json", folder)
        if found is None:
            yield [words, "unmeasured", "–", "–", "–", "–", "–", "–"]
            continue
        raw = next(row["tokens_per_cpu_s"] for row in found["rows"] if row["tool"] == "raw")
        clocked = 2 in found["threads"]
        for row in sorted(found["rows"], key=lambda row: -row["tokens_per_cpu_s"]):
            wall = f"{row['tokens_per_s']:,.0f}" if clocked else "unmeasured"
            number = found["versions"][row["tool"]].get(PACKAGES.get(row["tool"], ""), "")
            yield [words, f"{NAMES[row['tool']]} {number}".strip(), f"{row['tokens_per_cpu_s']:,.0f}",
                   f"{row['tokens_per_cpu_s'] / raw:.2f}", wall, f"{row['peak_mib']:,.0f}",
                   f"{row['first_step_s']:.1f}", f"{row['final_loss']:.3f}"]  # fmt: skip
        for tool in found["left_out"]:
            yield [words, NAMES[tool], "does not run", "–", "–", "–", "–", "–"]


def other_rows(folder: Path) -> Iterator[list[str]]:
    """Start and data."""
    start, data, tokens = (kept(f"{name}.json", folder) for name in ("start", "data", "tokens"))
    if start is None:
        yield ["start", "unmeasured", ""]
    for row in start["rows"] if start else []:
        bound = f"bound {row['bound_s']:g} s" if row["bound_s"] else ""
        median = f"{row['median_s']:.2f} s, the best {row['best_s']:.2f} ({row['median_cpu_s']:.2f} s of CPU)"
        yield [f"`lora-tune`: {row['what']}", median, bound]
    if data is None:
        yield ["file to packed rows", "unmeasured", ""]
    for row in data["rows"] if data else []:
        cached = f"again, from the cache: {row['cached_s']:.2f} s" if "cached_s" in row else "beside it"
        speed = f"{row['rows_per_s']:,} rows/s, {row['rows_per_cpu_s']:,} per CPU-second"
        yield [f"file to packed rows, {NAMES[row['tool']]}", speed, cached]
    if tokens is None:
        yield ["messages to tokens and mask", "unmeasured", ""]
    for row in tokens["rows"] if tokens else []:
        speed = f"{row['rows_per_s']:,} rows/s, {row['rows_per_cpu_s']:,} per CPU-second"
        times = f"{tokens['times_faster']:.1f} x TRL, {tokens['times_less_cpu']:.1f} x less CPU, threads: "
        yield [f"messages to tokens and mask, {NAMES[row['tool']]}", speed,
               times + f"{tokens['threads']}" if row["tool"] == "lora_tune" else "beside it"]  # fmt: skip


def floor_rows(folder: Path) -> Iterator[list[str]]:
    """What no training through the base can do without, beside the raw loop and ours, of one run."""
    for method, words in METHODS.items():
        found = kept(f"floor_small_{method}.json", folder)
        if found is None:
            yield [words, "unmeasured", "–", "–", "–", "–", "–"]
            continue
        speeds = {row["tool"]: row["tokens_per_cpu_s"] for row in found["rows"]}
        raw, floor, own = (speeds[name] for name in ("raw", "floor", "lora_tune"))
        numbers = [f"{speeds[name]:,.0f}" for name in ("raw", "floor", "lora_tune", "unfused")]
        yield [words, *numbers, f"{own / raw:.2f}", f"{(own - raw) / (floor - raw):.0%}"]


def memory_rows(folder: Path) -> Iterator[list[str]]:
    """Peak beside plan and minimum."""
    for file in ("memory_small", "memory_small_one_row"):
        found = kept(f"{file}.json", folder)
        if found is None:
            yield ["unmeasured", "–", "–", "–", "–", "–"]
        for row in found["rows"] if found else []:
            name = f"{found['batch']} x {found['length']:,}: {METHODS[row['method']]}, "
            name += "fused" if row["kernels"] == "auto" else "PEFT’s path"
            name += ", recomputed" if row["checkpointing"] == "all" else ""
            yield [name, f"{row['measured_gib']:.2f}", f"{row['allocated_gib']:.3f}",
                   f"{row['planned_gib']:.3f} ± {row['uncertain_gib']:.2f}",
                   f"{row['minimum_gib']:.2f}", f"{row['measured_over_minimum']:.2f}"]  # fmt: skip


def recompute_lines(folder: Path = RESULTS) -> list[str]:
    """The table of recomputed layers in docs/kernels.md; none where nobody measured."""
    found = kept("recompute.json", folder)

    def rows() -> Iterator[list[str]]:
        for row in found["rows"] if found else []:
            seconds, held, evaluated = (row[key] for key in ("cpu_s", "bytes_a_token", "bytes_a_token_evaluated"))
            sides = ("peft", "whole", "pieces")
            yield ["NF4" if row["quantize"] == "nf4" else "bf16", ", ".join(f"{seconds[side]:.2f}" for side in sides),
                   f"{row['pieces_over_peft']:.2f}, {row['pieces_over_whole']:.2f}",
                   ", ".join(f"{held[side]:,}" for side in sides),
                   f"{evaluated['peft']:,}, {evaluated['pieces']:,}"]  # fmt: skip

    return lines_of(RECOMPUTED, rows()) if found else []


def put(lines: list[str], page: Path) -> None:
    """Put a table into a page, in the place of the one with the same head and as many lines."""
    text = page.read_text(encoding="utf-8").splitlines()
    first = text.index(lines[0])
    page.write_text("\n".join([*text[:first], *lines, *text[first + len(lines) :]]) + "\n", encoding="utf-8")


def measured_on(folder: Path) -> str:
    """Machine, libraries and commit of every result."""
    said = []
    for name in RESULT_FILES:
        if found := kept(f"{name}.json", folder):
            on = found["machine"]
            said.append(f"{name}: {on['processor']}, {on['cores']} cores, load {on['load_before']}, {on['commit']}")
    return "; ".join(said)


def text(folder: Path = RESULTS) -> str:
    """All tables in Markdown."""
    steps = ["base", "tool", "tokens per CPU-second, 1 thread", "x raw", "tokens/s, 2 threads", "peak MiB",
             "first step after, s", "loss at the end"]  # fmt: skip
    floor = ["base", "raw PEFT loop", "frozen base alone (floor)", "lora_tune", "`kernels: off`", "lora_tune / raw",
             "of the way from raw to floor"]  # fmt: skip
    memory = ["case", "peak of the process, GiB", "of it PyTorch's", "planned", "minimum", "peak / minimum"]
    parts = [
        "# Speed and memory, side by side\n\nMade by `python -m benchmarks.table --write` from the files beside it.",
        "\n".join(lines_of(steps, step_rows(folder))),
        "\n".join(lines_of(["what", "measured", ""], other_rows(folder))),
        "Tokens per CPU-second, 1 thread, in turns of a step; the floor is forward and the gradient of the input:",
        "\n".join(lines_of(floor, floor_rows(folder))),
        MEMORY + "\n".join(lines_of(memory, memory_rows(folder))),
        measured_on(folder),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> None:
    """Print the tables, or keep them."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    made = text()
    if parser.parse_args().write:
        TABLE.write_text(made, encoding="utf-8")
        if lines := recompute_lines():
            put(lines, KERNELS)
    print(made)


if __name__ == "__main__":
    main()

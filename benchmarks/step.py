"""Steps of several tools side by side: same model, rows, adapter start and optimizer, interleaved in one run.

    python -m benchmarks.step [--shape small|8b] [--method lora|qlora] [--against raw,trl,unsloth,llamafactory]
                              [--batch 4] [--length 256] [--rounds 11] [--recompute all] [--json [FILE]] [--write]

Each tool is a process of its own that waits for its turn: on a CPU they take one step after the other, so that a busy
machine disturbs all alike, and the median of a tool's steps counts; on a GPU, where two do not fit, one tool runs after
the other. On a CPU the run is made twice: tokens per second of processor time on one thread, tokens per second of the
clock on two. Peak memory is that of the whole process (of the card on a GPU), the first step is counted from the start
of the process, alone on the machine.

`raw` is a bare PEFT loop in bfloat16, adapters too; `trl` is SFTTrainer as it is; `unfused` is ours with
`train.kernels: off`, `masked` and `by_document` with `base.attention: sdpa` and `varlen`, `compiled` with
`train.compile: layers`; `floor` is the frozen base alone, forward and the gradient of its input. Peers live in
environments of their own (`benchmarks/peers/README.md`), looked for in --peers or LORA_TUNE_PEERS; what is not there is
left out with a line. All start from the same adapter: a loss that is further than 0.01 from the raw loop's at any step
makes the exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, STDOUT, at_least_one, counts, machine, result_alone, result_file, seconds
from benchmarks.peers.protocol import ROOT, Job, stay_home

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2},
    "small": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
              "num_attention_heads": 8, "num_key_value_heads": 4},
    "8b": {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip
HERE = ("lora_tune", "unfused", "masked", "by_document", "compiled", "raw", "floor", "trl")
OWN_ENVIRONMENT = {"unsloth": "benchmarks.peers.with_unsloth", "llamafactory": "benchmarks.peers.with_llamafactory"}
PEERS = Path(os.environ.get("LORA_TUNE_PEERS", ROOT.parent / "peers"))
TOLERANCE = 0.01
WARM_UP = 2


@dataclass(frozen=True)
class Start:
    """How a side is started: the command, and folders of packages that only it sees."""

    command: list[str]
    packages: tuple[str, ...] = ()


class LeftOut(Exception):
    """A peer that cannot be measured, and why."""


def write_base(folder: Path, shape: str) -> None:
    """A random Llama of a shape in bfloat16, the same one every time, and a tokenizer that nobody asks."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(1)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    roomy = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 20 * 2**30
    with torch.device("cuda" if roomy else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    if roomy:
        torch.cuda.empty_cache()  # the sides are other processes
    words = Tokenizer(WordLevel({f"t{number}": number for number in range(16)}, unk_token="t2"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t1", unk_token="t2"
    ).save_pretrained(folder)


def write_rows(folder: Path, shape: str, *, rows: int, length: int) -> None:
    """Rows of tokens, all trained, some words far more often than others, so that the loss falls from the start."""
    draw, vocabulary = random.Random(2), SHAPES[shape]["vocab_size"]
    drawn = [[int(vocabulary ** draw.random()) for _ in range(length)] for _ in range(rows)]
    (folder / "rows.json").write_text(json.dumps(drawn))


def start_of(tool: str, peers: Path) -> Start:
    """How a side is started: `peers/TOOL` is an environment, or a folder of packages (`pip install --target`).

    Raises:
        LeftOut: its environment is not there.
    """
    if tool not in OWN_ENVIRONMENT:
        return Start([sys.executable, "-m", "benchmarks.peers.here", tool])
    python = peers / tool / "bin" / "python"
    if python.exists():
        return Start([str(python), "-m", OWN_ENVIRONMENT[tool], tool])
    if (peers / tool / tool).is_dir():  # the tool's own package
        return Start([sys.executable, "-m", OWN_ENVIRONMENT[tool], tool], (str(peers / tool),))
    raise LeftOut(f"there is no {python}; benchmarks/peers/README.md says how to install it")


class Side:
    """One tool in its process, paused between its steps."""

    def __init__(self, name: str, folder: Path, *, threads: int, peers: Path) -> None:
        start = start_of(name, peers)
        command = [*start.command, "--folder", str(folder)]
        several = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        # what the caller has on its path (packages of an offline machine) stays behind the side's own
        given = [] if start.command[0] != sys.executable else os.environ.get("PYTHONPATH", "").split(os.pathsep)
        several["PYTHONPATH"] = os.pathsep.join([str(ROOT), *start.packages, *filter(None, given)])
        self.name = name
        self.steps: list[dict[str, float]] = []
        self.versions: dict[str, str] = {}
        self.first_step_s = 0.0
        self._log = (folder / f"{name}.log").open("w")
        self._began = time.monotonic()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, cwd=folder,
            env={**stay_home(), **several},
        )  # fmt: skip

    def step(self) -> None:
        """Let it take one step; what it says of it is kept.

        Raises:
            LeftOut: it ended instead, with its last words.
        """
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            print("go", file=self.process.stdin, flush=True)
        while line := self.process.stdout.readline():
            word, _, facts = line.partition(" ")
            if word == "VERSIONS":
                self.versions = json.loads(facts)
            if word == "STEP":
                self.steps.append(json.loads(facts))
                self.first_step_s = self.first_step_s or time.monotonic() - self._began
                return
        said = Path(self._log.name).read_text().strip().splitlines() or ["it said nothing"]
        raise LeftOut(f"it ended after {len(self.steps)} steps: {said[-1].strip()}")

    def end(self) -> None:
        """Close the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._log):
            if stream is not None:
                stream.close()

    def seconds(self, clock: str) -> float:
        """The median of a step's seconds, without the first steps, which warm up, and the last, which ends the run."""
        return statistics.median(step[clock] for step in self.steps[WARM_UP:-1])


def one_pass(
    names: Sequence[str], folder: Path, job: Job, *, peers: Path, left_out: dict[str, str], ends: float = math.inf
) -> dict[str, Side]:
    """Start the tools one after the other, each alone up to its first step, then let them take turns.

    On a GPU a tool takes all of its steps before the next one starts. `left_out` collects who could not, and why;
    `ends` (of the monotonic clock, seconds) is when a tool that still runs is stopped, and none starts any more.
    """
    import torch

    job.write(folder)
    alone = torch.cuda.is_available()
    sides: dict[str, Side] = {}

    def lets(tool: str, *, steps: int) -> None:
        stop = None
        try:
            if time.monotonic() > ends:
                raise LeftOut
            if tool not in sides:
                sides[tool] = Side(tool, folder, threads=job.threads, peers=peers)
            if ends < math.inf:
                stop = threading.Timer(ends - time.monotonic(), sides[tool].process.kill)
                stop.start()
            for _ in range(steps):
                sides[tool].step()
        except LeftOut as reason:
            left_out[tool] = str(reason) if time.monotonic() < ends else "the time was over"
        finally:
            if stop is not None:
                stop.cancel()

    try:
        for tool in names:
            lets(tool, steps=job.steps if alone else 1)
            if alone and tool in sides:
                sides[tool].end()
        for _ in range(0 if alone else job.steps - 1):
            for tool in names:
                if tool not in left_out:
                    lets(tool, steps=1)
        return {tool: side for tool, side in sides.items() if tool not in left_out}
    finally:
        for side in sides.values():
            side.end()


def row_of(name: str, one: Side, two: Side, job: Job, *, raw: Side | None) -> dict[str, Any]:
    """A tool's line of the result: `one` ran on one thread, `two` on two (the same where there is a GPU)."""
    losses = [step["loss"] for step in one.steps]
    beside = [abs(loss - step["loss"]) for loss, step in zip(losses, raw.steps, strict=True)] if raw else [math.nan]
    tokens = job.batch * job.length
    return {
        "tool": name,
        "tokens_per_cpu_s": round(tokens / one.seconds("cpu_s"), 1),
        "tokens_per_s": round(tokens / two.seconds("wall_s"), 1),
        "peak_mib": round(max(step["peak_mib"] for step in one.steps), 1),
        "first_step_s": round(one.first_step_s, 1),
        "final_loss": round(losses[-1], 4),
        "furthest_from_raw": round(max(beside), 4),
        "losses": [round(loss, 4) for loss in losses],
        "cpu_s_of_steps": [round(step["cpu_s"], 3) for step in one.steps],
        "versions": one.versions,
    }


def measure(
    names: Sequence[str], *, shape: str, job: Job, threads: Sequence[int] = (1, 2), peers: Path = PEERS,
    base: Path | None = None, seconds: float = math.inf,
) -> dict[str, Any]:  # fmt: skip
    """Both passes; `{machine, versions, shape, method, …, rows, left_out}`. `base` is made once and kept there.
    After so many `seconds` the tools that are done are what is said, and the others are left out.

    Raises:
        SystemExit: lora_tune itself did not run, or on a CPU the raw loop (a card may be too small for it).
    """
    left_out: dict[str, str] = {}
    ends = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="step-") as name:
        folder = Path(name)
        if base is None or not (base / "config.json").exists():
            write_base(base or folder / "base", shape)
        if base is not None:
            (folder / "base").symlink_to(base.resolve(), target_is_directory=True)
        write_rows(folder, shape, rows=job.batch * job.steps, length=job.length)
        passes = []
        for count in threads:
            here = [tool for tool in names if tool not in left_out]
            this = Job(**{**vars(job), "threads": count})
            passes.append(one_pass(here, folder, this, peers=peers, left_out=left_out, ends=ends))
    for tool in HERE[:1] if machine()["gpu"] else HERE:
        if tool in left_out:
            raise SystemExit(f"{tool}: {left_out[tool]}")
    one, two = passes[0], passes[-1]
    rows = [row_of(tool, one[tool], two[tool], job, raw=one.get("raw")) for tool in names if tool in two]
    return {
        "machine": machine(),
        "versions": {row["tool"]: row.pop("versions") for row in rows},
        "shape": shape, "method": job.method, "tokens_of_a_step": job.batch * job.length, "batch": job.batch,
        "length": job.length, "rank": job.rank, "steps": job.steps, "threads": list(threads), "tolerance": TOLERANCE,
        "recompute": job.recompute,
        "rows": rows, "left_out": left_out,
    }  # fmt: skip


def said(result: dict[str, Any]) -> str:
    """The result as lines to read."""
    raw = next((row["tokens_per_cpu_s"] for row in result["rows"] if row["tool"] == "raw"), math.nan)
    lines = []
    for row in result["rows"]:
        lines.append(
            f"{row['tool']:13}{row['tokens_per_cpu_s']:8,.0f} tokens/CPU-s ({row['tokens_per_cpu_s'] / raw:4.2f} x raw)"
            f"{row['tokens_per_s']:8,.0f} tokens/s {row['peak_mib']:7,.0f} MiB, first step after"
            f" {row['first_step_s']:5.1f} s, loss {row['losses'][0]:.4f} … {row['final_loss']:.4f},"
            f" ±{row['furthest_from_raw']:.4f} from raw"
        )
    lines += [f"{tool} is left out: {reason}" for tool, reason in result["left_out"].items()]
    return "\n".join(lines)


def main() -> int:
    """Measure, print a table or the JSON object, keep it; 1 where a loss curve is not the raw loop's."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--method", choices=("lora", "qlora"), default="qlora")
    parser.add_argument("--against", default="raw,trl,unsloth,llamafactory")
    parser.add_argument("--batch", type=at_least_one, default=4, help="rows of a step")
    parser.add_argument("--length", type=at_least_one, default=256, help="tokens of a row")
    parser.add_argument("--rounds", type=at_least_one, default=11, help="steps that count, besides three that do not")
    parser.add_argument("--threads", type=counts, default="1,2", help="of the two passes; one number: one pass")
    parser.add_argument("--recompute", choices=("none", "all"), default="none", help="activations of all layers")
    parser.add_argument("--base", type=Path, help="a folder for the random base, made if it is empty, and kept")
    parser.add_argument("--seconds", type=seconds, default=math.inf, help="tools that are not done then are left out")
    parser.add_argument("--peers", type=Path, default=PEERS)
    kept = "print the result as one object, or keep it in a file"
    parser.add_argument("--json", nargs="?", type=result_file, const=STDOUT, help=kept)
    parser.add_argument("--write", action="store_true", help="keep it as benchmarks/results/step_SHAPE_METHOD.json")
    given = parser.parse_args()
    against = given.against.split(",")
    if unknown := [name for name in against if name not in (*HERE, *OWN_ENVIRONMENT)]:
        parser.error(f"--against knows {', '.join((*HERE[1:], *OWN_ENVIRONMENT))}, got {', '.join(unknown)}")
    steps = given.rounds + WARM_UP + 1
    job = Job(given.method, steps, 1, batch=given.batch, length=given.length, recompute=given.recompute)
    names = list(dict.fromkeys(["lora_tune", *against]))
    places = {"peers": given.peers, "base": given.base}
    with result_alone():
        result = measure(names, shape=given.shape, job=job, threads=given.threads, seconds=given.seconds, **places)
    text = json.dumps(result, indent=1)
    print(text if given.json == STDOUT else said(result))
    if given.json and given.json != STDOUT:
        given.json.write_text(text + "\n", encoding="utf-8")
    if given.write:
        (RESULTS / f"step_{given.shape}_{given.method}.json").write_text(text + "\n", encoding="utf-8")
    far = [row["tool"] for row in result["rows"] if row["furthest_from_raw"] > TOLERANCE and row["tool"] != "floor"]
    if far:
        print(f"losses further than {TOLERANCE} from the raw loop's: {', '.join(far)}", file=sys.stderr)
    return int(bool(far))


if __name__ == "__main__":
    sys.exit(main())

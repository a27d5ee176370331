"""Held-out loss of our default hyper-parameters beside TRL's and Unsloth's: same base, rows, tokens, mask and order.

    python -m benchmarks.quality [--data quickstart,gsm8k] [--seeds 5] [--stop-after 400] [--equal time] [--json [FILE]]

What is compared are hyper-parameters (rank, alpha, targets, dropout, learning rate, schedule, warm-up, batch, packing,
weight decay), each as its own project gives them, one epoch over the same rows; all run in our trainer, so that
nothing else differs: the loss is on answers for all, rows that are not packed are not padded, AdamW is torch's. The
base is the embedded one, so sequences have at most 1,024 tokens. Seeds are paired: a seed is the same order of rows
and draws for all. A run that the results file has already, with the same settings, is not made again, so that the
command may be stopped and started anew; `benchmarks/results/quality.md` is made from the file.

`--equal time`: one epoch of each is timed anew, in turns, and what takes less processor time than ours goes on to the
same time over the same rows, its schedule over all of its steps. Nothing is given less than its epoch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, STDOUT, at_least_one, machine, result_alone, result_file, versions
from lora_tune.model.rate import learning_rate
from lora_tune.model.source import find_base
from lora_tune.recipe import Base, DataSource, Limits, Lora, Train

ROOT = Path(__file__).parents[1]
RESULT = RESULTS / "quality.json"
HELD_OUT = 300  # most rows to measure on
LENGTH = 1024  # positions that the embedded base has
BASE = Base(name="builtin:quickstart", quantize="none", compute_dtype="bfloat16")
NO_LIMITS = Limits(dropped_rows="100%", lost_tokens="100%", lost_end_tokens="100%")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 10: 2.262}  # 97.5 % by seeds


@dataclass(frozen=True)
class Rows:
    """Rows to train on and rows that are held out; `held_out` is a file, or a number taken from the same file."""

    train: str
    held_out: str | int
    max_rows: int
    columns: tuple[str, str] = ("", "")  # prompt and completion of a table


@dataclass(frozen=True)
class Settings:
    """What a tool sets, and where that stands."""

    source: str
    rank: int
    alpha: float
    targets: str | tuple[str, ...]
    dropout: float
    learning_rate: float
    schedule: str
    warmup: int | str
    batch_size: int
    packing: bool
    weight_decay: float

    def lora(self) -> Lora:
        """The adapter."""
        targets: Any = self.targets
        return Lora(rank=self.rank, alpha=self.alpha, targets=targets, dropout=self.dropout)

    def train(self, steps: int | None = None) -> Train:
        """One epoch, or so many steps."""
        schedule: Any = self.schedule
        packed = self.batch_size if self.packing else 16
        return Train(
            learning_rate=self.learning_rate, schedule=schedule, warmup=self.warmup, batch_size=self.batch_size,
            packing=self.packing, weight_decay=self.weight_decay, max_length=LENGTH, optimizer="adamw",
            micro_batch_size=math.gcd(self.batch_size, 4 if self.packing else packed), gradient_checkpointing="none",
            save_every=10**6, max_steps=steps,
        )  # fmt: skip


DATA = {
    "quickstart": Rows("recipes/quickstart/train.jsonl", "recipes/quickstart/held_out.jsonl", 800),
    "gsm8k": Rows("CORPUS/data/datasets/gsm8k/train.jsonl", 100, 250, ("question", "answer")),
}  # the first is made by recipes/quickstart/make_data.py; the others lie in the folder LORA_TUNE_CORPUS


def ours() -> Settings:
    """The defaults of the recipe as they are now."""
    lora, train, config = Lora(), Train(), find_base(BASE).config
    return Settings(
        "lora_tune/recipe.py, at the width of 320 of the embedded base", lora.rank, lora.alpha, lora.targets,
        lora.dropout, learning_rate(train, config), train.schedule, train.warmup, train.batch_size, train.packing,
        train.weight_decay,
    )  # fmt: skip


_TRL_BATCH = 2 * 8
CONTROL = "Unsloth, at our rate"
TOOLS: dict[str, Settings] = {
    "lora_tune": ours(),
    "TRL, PEFT guide": Settings(
        "TRL docs/source/peft_integration.md, SFT with LoRA: --learning_rate 2.0e-4 --per_device_train_batch_size 2"
        " --gradient_accumulation_steps 8 --lora_r 32 --lora_alpha 16 with SFTConfig's and ModelConfig's other defaults"
        " (TRL 1.16.0: linear, no warm-up, lora_dropout 0.05, no packing; PEFT 0.21.2: q_proj and v_proj of a Llama)",
        32, 16.0, ("q_proj", "v_proj"), 0.05, 2e-4, "linear", 0, _TRL_BATCH, False, 0.0,
    ),
    "TRL, script": Settings(
        "the LoRA example in the docstring of trl/scripts/sft.py (TRL 1.16.0): the same with --packing",
        32, 16.0, ("q_proj", "v_proj"), 0.05, 2e-4, "linear", 0, _TRL_BATCH, True, 0.0,
    ),
    "TRL, bare": Settings(
        "SFTConfig() of TRL 1.16.0 with LoraConfig() of PEFT 0.21.2: no argument given, but for one epoch instead of 3",
        8, 8.0, ("q_proj", "v_proj"), 0.0, 2e-5, "linear", 0, 8, False, 0.0,
    ),
    "Unsloth": Settings(
        "github.com/unslothai/notebooks 169e112, Llama3.1_(8B)-Alpaca: r 16, alpha 16, all 7 projections, 2 x 4 rows,"
        " warmup_steps 5, 2e-4, linear, weight_decay 0.001; num_train_epochs 1 as its comment says for a full run",
        16, 16.0, "all-linear", 0.0, 2e-4, "linear", 5, 8, False, 0.001,
    ),
    CONTROL: Settings(
        "a control, nobody's default: as Unsloth, with the learning rate that lora_tune takes for this base",
        16, 16.0, "all-linear", 0.0, 2.56e-3, "linear", 5, 8, False, 0.001,
    ),
}  # fmt: skip


class Bench:
    """The base's tokenizer and the rows, read once; a model for every run."""

    def __init__(self, corpus: Path | None) -> None:
        import torch

        from lora_tune.data.chat_template import load_chat_template
        from lora_tune.model.source import load_tokenizer

        torch.set_num_threads(1)
        self.corpus = corpus
        self.source = find_base(BASE)
        self.chat = load_chat_template(load_tokenizer(self.source))
        self._conversations: dict[str, Any] = {}

    def run(self, data: str, settings: Settings, *, seed: int, steps: int | None = None) -> dict[str, Any]:
        """Train one epoch, or so many steps, and measure: nats per answer token, CPU seconds of the training alone."""
        from lora_tune.data.pipeline import encode
        from lora_tune.evaluation.losses import mean_loss, row_losses
        from lora_tune.model.base import load_base
        from lora_tune.model.methods import attach
        from lora_tune.training.trainer import build

        lora, train = settings.lora(), settings.train(steps)
        prepared = encode(
            self.conversations(data), self.chat, loss_on="assistant", train=train, limits=NO_LIMITS, seed=seed
        )
        model = attach(load_base(self.source, BASE), lora, source=self.source, base=BASE, seed=seed)
        self.chat.align(model)
        with tempfile.TemporaryDirectory(prefix="quality-") as folder:
            trainer = build(
                model, prepared.train, train=train, evaluation=None, seed=seed, folder=Path(folder), chat=self.chat
            )
            trainer.save_every = 10**9
            before = time.process_time()
            trainer.train()
            cpu_s = time.process_time() - before
        pad = self.chat.tokenizer.pad_token_id or 0
        held_out = prepared.held_out_rows[:HELD_OUT]
        return {
            "loss": round(mean_loss(row_losses(model, held_out, pad_id=pad)), 5),
            "steps": trainer.state.global_step, "rows": len(prepared.documents), "tokens": sum(trainer.row_tokens),
            "held_out_rows": len(held_out), "cpu_s": round(cpu_s, 1),
        }  # fmt: skip

    def conversations(self, data: str) -> Any:
        """Checked rows, split once and for all seeds alike."""
        from lora_tune.data.checking import read_conversations

        if data not in self._conversations:
            rows = DATA[data]
            columns = dict(zip(("prompt", "completion"), rows.columns, strict=True)) if rows.columns[0] else None
            source = DataSource(
                source=self.place(rows.train), max_rows=rows.max_rows, columns=columns,
                format="table" if columns else "alpaca", on_bad_row="drop",
            )  # fmt: skip
            held_out = rows.held_out if isinstance(rows.held_out, int) else self.place(rows.held_out)
            self._conversations[data] = read_conversations([source], hold_out=held_out, seed=0)
        return self._conversations[data]

    def place(self, name: str) -> str:
        """Where a file of DATA lies."""
        if not name.startswith("CORPUS/"):
            return str(ROOT / name)
        if self.corpus is None:
            raise SystemExit("quality: set LORA_TUNE_CORPUS, or measure --data quickstart only")
        return str(self.corpus / name.removeprefix("CORPUS/"))


def interval(ours_: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the paired differences (ours less theirs) and the ends of its 95 % interval by Student's t."""
    gaps = [left - right for left, right in zip(ours_, theirs, strict=True)]
    mean = statistics.fmean(gaps)
    half = STUDENT[len(gaps)] * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return mean, mean - half, mean + half


def losses(runs: Sequence[dict[str, Any]], data: str, tool: str) -> dict[int, float]:
    """Loss by seed."""
    return {run["seed"]: run["loss"] for run in runs if run["data"] == data and run["tool"] == tool}


def table(result: dict[str, Any]) -> str:
    """The results in words: a table for each set of rows, then what the settings are and where they were found."""
    runs, lines = result["runs"], [HEADER.format(**result["versions"], **result["machine"])]
    for data in dict.fromkeys(run["data"] for run in runs):
        here = [run for run in runs if run["data"] == data]
        lines += [
            f"\n## {data}: {here[0]['rows']:,} rows, {here[0]['held_out_rows']} held out\n",
            "| settings of | steps | tokens a step | CPU s | held-out loss (s.d.) | lora_tune less this [95 %] |",
            "|---|---|---|---|---|---|",
        ]
        own = losses(runs, data, "lora_tune")
        for tool in dict.fromkeys(run["tool"] for run in here):
            found, mine = losses(runs, data, tool), [run for run in here if run["tool"] == tool]
            shared = sorted(own.keys() & found.keys())
            gap = "-"
            if tool != "lora_tune" and len(shared) in STUDENT:
                mean, low, high = interval([own[seed] for seed in shared], [found[seed] for seed in shared])
                gap = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
            spread = f" ({statistics.stdev(found.values()):.4f})" if len(found) > 1 else ""
            cpu_s = statistics.median(run["cpu_s"] for run in mine)
            lines.append(
                f"| {tool} | {mine[0]['steps']} | {mine[0]['tokens'] / mine[0]['steps']:,.0f} | {cpu_s:.0f} |"
                f" {statistics.fmean(found.values()):.4f}{spread} | {gap} |"
            )
    if "equal_time" in result:
        lines += equal_time_lines(result)
    lines.append("\n## The settings\n")
    for tool, found in result["settings"].items():
        words = ", ".join(f"{key} {value}" for key, value in found.items() if key != "source")
        lines.append(f"* **{tool}**: {words}. From: {found['source']}.")
    return "\n".join(lines) + "\n"


def equal_time_lines(result: dict[str, Any]) -> list[str]:
    """What was reached in the processor time of our epoch."""
    runs, epochs = result["equal_time"]["runs"], result["equal_time"]["epochs"]
    head = "| rows | settings of | CPU s an epoch | its steps | steps here | held-out loss (s.d.) | seeds |"
    lines = [EQUAL_TIME, head, "|---" * 7 + "|"]
    for epoch in epochs:
        data, tool = epoch["data"], epoch["tool"]
        mine = [run for run in runs if (run["data"], run["tool"]) == (data, tool)]
        found = losses(mine or result["runs"], data, tool)
        spread = f" ({statistics.stdev(found.values()):.4f})" if len(found) > 1 else ""
        steps = f"{epoch['steps']} | {(mine or [epoch])[0]['steps']}"
        loss = f"{statistics.fmean(found.values()):.4f}{spread} | {len(found)}"
        lines.append(f"| {data} | {tool} | {epoch['cpu_s']:.1f} | {steps} | {loss} |")
    return lines


EQUAL_TIME = """
## In the same processor time (`--equal time`)

One epoch of each with seed 0, timed in turns in one run; what took less than ours went on to the same time, its
schedule over all of its steps. What took as long or longer has its epoch, as above: nothing was given less. Steps cost
here what they cost in our trainer; in their own they cost more (side_by_side.md), so that others have more steps here
than in the same time of their own.
"""

HEADER = """# Our default hyper-parameters beside those of others

`python -m benchmarks.quality` on the embedded base (5.7 M parameters, bfloat16), one epoch, one thread; loss in nats
per answer token on rows that were not trained on, mean over paired seeds. A negative difference means that our defaults
reach the lower loss. All hyper-parameters run in our trainer, rows that are not packed without padding; a step of their
own trainers costs what `benchmarks.step` measures. Most of the difference is the learning rate, which is in inverse
proportion to the width here and fixed there: for a 7B base ours is 2.3e-4, near their 2e-4, and nothing was measured
on one. The last line of each table is a control with our rate: what steps of other sizes alone do. Processor time is
that of a shared machine, of runs made at different times: it is compared below, where all were timed in turns.
{cores} cores, torch {torch}, transformers {transformers}, TRL {trl}, PEFT {peft}."""


def steps_in_our_time(epochs: Sequence[dict[str, Any]], data: str, tool: str) -> int | None:
    """Steps that fill the processor time of our epoch; None where an epoch takes as long."""
    found = {epoch["tool"]: epoch for epoch in epochs if epoch["data"] == data}
    epoch = found[tool]
    steps = round(epoch["steps"] * found["lora_tune"]["cpu_s"] / epoch["cpu_s"])
    return steps if steps > epoch["steps"] else None


def missing(kept: dict[str, Any], given: argparse.Namespace) -> Iterator[tuple[list[dict[str, Any]], str, str, int]]:
    """The runs that are not there yet: the list that each belongs to, data, tool and seed."""
    tools = given.tools
    if given.equal == "time":
        tools = [tool for tool in tools if tool != CONTROL]
        epochs, runs = kept["equal_time"]["epochs"], kept["equal_time"]["runs"]
        for data in given.data:
            if not any(epoch["data"] == data for epoch in epochs):
                yield from ((epochs, data, tool, 0) for tool in tools)
    else:
        runs = kept["runs"]
    for seed in range(given.seeds):
        for data in given.data:
            for tool in tools:
                if not any((run["data"], run["tool"], run["seed"]) == (data, tool, seed) for run in runs):
                    yield runs, data, tool, seed


def known_tools(text: str) -> list[str]:
    """Names of settings, with commas between them, as argparse reads them. Raises: ArgumentTypeError."""
    return _known([name.strip().replace("_ ", ", ") for name in text.split(",")], list(TOOLS))


def known_data(text: str) -> list[str]:
    """Names of rows, with commas between them, as argparse reads them. Raises: ArgumentTypeError."""
    return _known([name.strip() for name in text.split(",")], list(DATA))


def _known(names: list[str], known: list[str]) -> list[str]:
    if unknown := [name for name in names if name not in known]:
        written = ", ".join(name.replace(", ", "_ ") for name in known)
        raise argparse.ArgumentTypeError(f"knows {written}, got {unknown[0]!r}")
    return names


def main() -> None:
    """Make the runs that are missing, each written when it is done; print them, or with --json all in one object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=known_data, default=",".join(DATA))
    parser.add_argument(
        "--tools", type=known_tools, default=",".join(TOOLS).replace(", ", "_ "), help="names, `,` between them"
    )
    parser.add_argument("--seeds", type=at_least_one, default=5)
    parser.add_argument("--equal", choices=("data", "time"), default="data", help="one epoch, or our epoch's time")
    parser.add_argument("--stop-after", type=float, default=1e9, help="start no run after so many seconds")
    parser.add_argument("--out", type=result_file, default=RESULT)
    words = "print all runs as one object, or keep them in a file as well"
    parser.add_argument("--json", nargs="?", type=result_file, const=STDOUT, help=words)
    given = parser.parse_args()
    with result_alone() if given.json == STDOUT else nullcontext():
        text = json.dumps(made(given), indent=1)
    if given.json == STDOUT:
        print(text)
    elif given.json:
        given.json.write_text(text + "\n", encoding="utf-8")


def made(given: argparse.Namespace) -> dict[str, Any]:
    """Everything that was run for these arguments, now or before; written after every run."""
    corpus = os.environ.get("LORA_TUNE_CORPUS")
    began, bench = time.monotonic(), Bench(Path(corpus) if corpus else None)
    kept = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {"settings": {}, "runs": []}
    current = {tool: json.loads(json.dumps(asdict(settings))) for tool, settings in TOOLS.items()}
    for part in (kept, kept.get("equal_time", {})):
        for name in part.keys() & {"runs", "epochs"}:
            part[name] = [run for run in part[name] if kept["settings"].get(run["tool"]) == current.get(run["tool"])]
    if given.equal == "time":
        kept.setdefault("equal_time", {"epochs": [], "runs": []})
    result = kept
    for runs, data, tool, seed in missing(kept, given):
        if time.monotonic() - began > given.stop_after:
            break
        equal = kept.get("equal_time", {})
        steps = steps_in_our_time(equal["epochs"], data, tool) if runs is equal.get("runs") else None
        if runs is equal.get("runs") and steps is None:
            continue
        run = {"data": data, "tool": tool, "seed": seed, **bench.run(data, TOOLS[tool], seed=seed, steps=steps)}
        print(json.dumps(run), flush=True)
        runs.append(run)
        result = kept | {
            "machine": machine(),
            "versions": versions("torch", "transformers", "trl", "peft"),
            "settings": current,
        }
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        given.out.with_suffix(".md").write_text(table(result), encoding="utf-8")
    return result


if __name__ == "__main__":
    main()

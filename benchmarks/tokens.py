"""How fast conversations become token ids and loss mask: ours against TRL's own preparation, in one run, same rows.

    python -m benchmarks.tokens --data ROWS.json --tokenizer FOLDER [--rounds 15] [--threads 1] [--json FILE] [--write]

ROWS.json holds Alpaca records (`instruction`, `input`, `output`); the tokenizer needs a chat template. TRL's path is
`SFTTrainer._prepare_dataset` on conversational prompt/completion rows (completion-only loss), which renders and encodes
each row twice and builds `labels`; ours is `ChatTemplate.rows`. Reading, conversion to messages and loading are outside
the clock on both sides, and so is a first pass of each. Sides take turns, medians of the rounds count; CPU seconds, of
all threads, are for busy machines. `--threads` are those of the tokenizer library, which ours hands all rows at once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import datasets
import numpy as np
import trl
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.machine import RESULTS, STDOUT, at_least_one, machine, result_alone, result_file, versions
from lora_tune.data.chat_template import ChatTemplate, RowError, load_chat_template
from lora_tune.data.conversation import Conversation, Message

LIBRARIES = ("trl", "datasets", "transformers", "tokenizers")


def conversations_from(records: list[dict[str, str]]) -> list[Conversation]:
    """Alpaca records as one question and one answer each."""
    found = []
    for line, record in enumerate(records, start=1):
        question = "\n\n".join(part for part in (record["instruction"], record.get("input", "")) if part)
        found.append(
            Conversation(messages=(Message("user", question), Message("assistant", record["output"])), line=line)
        )
    return found


def ours(template: ChatTemplate, rows: list[Conversation]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(input_ids, mask) of every row."""
    found = template.rows(rows, loss_on="assistant")
    return [(row.input_ids, row.mask) for entry in found if not isinstance(entry, RowError) for row in entry]


def theirs(tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, args: trl.SFTConfig) -> datasets.Dataset:
    """TRL's prepared data set (`input_ids`, `labels`), by the method of the installed SFTTrainer itself."""
    trainer = SimpleNamespace(chat_template=None, _tokenizer=tokenizer, completion_only_loss=True)
    return trl.SFTTrainer._prepare_dataset(trainer, rows, tokenizer, args, False, None, "train")


def in_turns(rounds: int, *sides: Callable[[], Any]) -> list[tuple[float, float]]:
    """Median seconds of each side on the clock, and of processor time in all threads."""
    times: list[list[tuple[float, float]]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, taken in zip(sides, times, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            side()
            taken.append((time.perf_counter() - wall, time.process_time() - cpu))
    return [(statistics.median(s for s, _ in taken), statistics.median(cpu for _, cpu in taken)) for taken in times]


def row_of(tool: str, rows: int, taken: tuple[float, float], **more: int) -> dict[str, Any]:
    """A line of the result."""
    s, cpu_s = taken
    return {"tool": tool, "rows_per_s": round(rows / s), "rows_per_cpu_s": round(rows / cpu_s),
            "s": round(s, 4), "cpu_s": round(cpu_s, 4), **more}  # fmt: skip


def measure(data: Path, folder: Path, *, rounds: int) -> dict[str, Any]:
    """Both sides, how often ours is the faster, and how far the results agree; `{machine, versions, rows, …}`."""
    result: dict[str, Any] = {"machine": machine(), "versions": versions(*LIBRARIES)}
    rows = conversations_from(json.loads(data.read_text(encoding="utf-8")))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = load_chat_template(tokenizer)
    columns = [
        {"prompt": [row.messages[0].as_template_input()], "completion": [row.messages[1].as_template_input()]}
        for row in rows
    ]
    dataset = datasets.Dataset.from_list(columns)
    datasets.disable_progress_bars()
    datasets.disable_caching()
    with tempfile.TemporaryDirectory() as scratch:
        args = trl.SFTConfig(
            output_dir=scratch, max_length=None, shuffle_dataset=False, use_cpu=True, bf16=False, report_to="none"
        )
        mine, prepared = ours(template, rows), theirs(tokenizer, dataset, args)
        ours_took, trl_took = in_turns(rounds, lambda: ours(template, rows), lambda: theirs(tokenizer, dataset, args))
    trained = sum(label != -100 for labels in prepared["labels"] for label in labels)
    return {
        **result, "rounds": rounds, "data": data.name, "tokenizer": folder.name, "rows_of_data": len(rows),
        "rows_with_equal_ids": sum(
            ids.tolist() == other for (ids, _), other in zip(mine, prepared["input_ids"], strict=True)
        ),
        "rows": [
            row_of("lora_tune", len(rows), ours_took, tokens=sum(len(ids) for ids, _ in mine),
                   trained=int(sum(mask.sum() for _, mask in mine))),
            row_of("trl", len(rows), trl_took, tokens=sum(map(len, prepared["input_ids"])), trained=trained),
        ],
        "times_faster": round(trl_took[0] / ours_took[0], 2),
        "times_less_cpu": round(trl_took[1] / ours_took[1], 2),
    }  # fmt: skip


def main() -> None:
    """Measure, print a table or the object, keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a JSON file of Alpaca records")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder; it has a chat template")
    parser.add_argument("--rounds", type=at_least_one, default=15)
    parser.add_argument("--threads", type=int, default=1)
    kept = "print the result as one object, or keep it in a file"
    parser.add_argument("--json", nargs="?", type=result_file, const=STDOUT, help=kept)
    parser.add_argument("--write", action="store_true", help="keep it as benchmarks/results/tokens.json")
    given = parser.parse_args()
    several = "true" if given.threads > 1 else "false"
    os.environ |= {"RAYON_NUM_THREADS": str(given.threads), "TOKENIZERS_PARALLELISM": several}
    with result_alone():
        result = measure(given.data, given.tokenizer, rounds=given.rounds) | {"threads": given.threads}
    text = json.dumps(result, indent=1)
    for path in (given.json if given.json != STDOUT else None, RESULTS / "tokens.json" if given.write else None):
        if path:
            path.write_text(text + "\n", encoding="utf-8")
    if given.json == STDOUT:
        print(text)
        return
    for row in result["rows"]:
        took = f"{row['s']:.3f} s ({row['cpu_s']:.3f} s of CPU)"
        print(f"{row['tool']:10} {took}, {row['rows_per_s']:,} rows/s, {row['trained']:,} of {row['tokens']:,} trained")
    print(f"faster than TRL: {result['times_faster']:.2f} times ({result['times_less_cpu']:.2f} times less CPU)")
    print(f"equal ids in {result['rows_with_equal_ids']} of {result['rows_of_data']} rows")


if __name__ == "__main__":
    main()

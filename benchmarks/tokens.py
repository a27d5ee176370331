"""How fast conversations become token ids and loss mask: ours against TRL's own preparation, in one run, same rows.

    python benchmarks/tokens.py ROWS.json TOKENIZER_FOLDER [--repeats 5] [--json]

ROWS.json holds Alpaca records (`instruction`, `input`, `output`); the tokenizer needs a chat template. TRL's path is
`SFTTrainer._prepare_dataset` on conversational prompt/completion rows (completion-only loss), which renders and encodes
each row twice and builds `labels`; ours is `ChatTemplate.rows`. Reading, conversion to messages and loading are outside
the clock on both sides. The best of the repeats counts, sides alternating; CPU seconds are for busy machines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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
import transformers
import trl
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_tune.data.chat_template import ChatTemplate, RowError, load_chat_template
from lora_tune.data.conversation import Conversation, Message


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


def best_of(repeats: int, *sides: Callable[[], Any]) -> list[tuple[float, float]]:
    """The shortest time of each side on the wall, and in CPU seconds of all threads, the sides taking turns."""
    times: list[list[tuple[float, float]]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, taken in zip(sides, times, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            side()
            taken.append((time.perf_counter() - wall, time.process_time() - cpu))
    return [(min(wall for wall, _ in taken), min(cpu for _, cpu in taken)) for taken in times]


def measure(data: Path, folder: Path, *, repeats: int) -> dict[str, Any]:
    """Both times, their ratio, and how far the results agree."""
    rows = conversations_from(json.loads(data.read_text(encoding="utf-8")))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = load_chat_template(tokenizer)
    columns = [
        {"prompt": [row.messages[0].as_template_input()], "completion": [row.messages[1].as_template_input()]}
        for row in rows
    ]
    dataset = datasets.Dataset.from_list(columns)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        args = trl.SFTConfig(
            output_dir=scratch, max_length=None, shuffle_dataset=False, use_cpu=True, bf16=False, report_to="none"
        )
        mine, prepared = ours(template, rows), theirs(tokenizer, dataset, args)
        (ours_s, ours_cpu_s), (trl_s, trl_cpu_s) = best_of(
            repeats, lambda: ours(template, rows), lambda: theirs(tokenizer, dataset, args)
        )
    same_ids = sum(ids.tolist() == other for (ids, _), other in zip(mine, prepared["input_ids"], strict=True))
    tokens = sum(len(ids) for ids, _ in mine)
    return {
        "rows": len(rows),
        "tokens": tokens,
        "trained_tokens": int(sum(mask.sum() for _, mask in mine)),
        "trl_trained_tokens": sum(label != -100 for labels in prepared["labels"] for label in labels),
        "rows_with_equal_ids": same_ids,
        "ours_s": round(ours_s, 4),
        "trl_s": round(trl_s, 4),
        "ratio": round(trl_s / ours_s, 2),
        "ours_cpu_s": round(ours_cpu_s, 4),
        "trl_cpu_s": round(trl_cpu_s, 4),
        "cpu_ratio": round(trl_cpu_s / ours_cpu_s, 2),
        "ours_tokens_per_s": round(tokens / ours_s),
        "tokenizer": folder.name,
        "versions": {
            "trl": trl.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "cores": os.cpu_count(),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a JSON file of Alpaca records")
    parser.add_argument("tokenizer", type=Path, help="a folder with a tokenizer that has a chat template")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    found = measure(options.data, options.tokenizer, repeats=options.repeats)
    if options.json:
        print(json.dumps(found))
        return
    print(f"{found['rows']} rows, {found['tokens']:,} tokens, {found['trained_tokens']:,} of them trained")
    print(f"wall: TRL {found['trl_s']:.3f} s, ours {found['ours_s']:.3f} s: {found['ratio']:.1f}x")
    print(f"CPU:  TRL {found['trl_cpu_s']:.3f} s, ours {found['ours_cpu_s']:.3f} s: {found['cpu_ratio']:.1f}x")
    print(f"equal ids in {found['rows_with_equal_ids']} of {found['rows']} rows")


if __name__ == "__main__":
    main()

"""How fast base and adapter answer: batches of ours beside `generate` of transformers, row by row and in batches.

    python -m benchmarks.eval_speed [--rows 200] [--new-tokens 24] [--json FILE]

The embedded base with the example adapter answers held-out questions of the quickstart, greedily, on one CPU thread:
row by row as most evaluation scripts do, in batches of 64 by transformers' own loop, and by ours (rows sorted by
length, a KV cache, rows that have ended leave the batch). Once with the adapter, whose answers end after three tokens,
and once without it, where most answers run to the limit. The answers must be the same in all of them. Choices are
ranked with a shared prompt, beside a forward pass for the choices of each row with their prompts repeated; the
log-probabilities must agree.
Sides are measured in turns, three times each; the figure is the best.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

from benchmarks.machine import print_and_keep, result_file
from lora_tune.adapter.at_hand import base_at_hand, chat_of_folder
from lora_tune.adapter.load import load_adapter
from lora_tune.data.chat_template import ChatTemplate
from lora_tune.data.questions_file import read_questions
from lora_tune.evaluation.questions import Question
from lora_tune.evaluation.rank import RankedRow, choice_scores, ranked_rows
from lora_tune.model.base import load_base
from lora_tune.model.generation import _left_padded, _only_greedy, evaluating, generate, transformer

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 3
CHOICES = 4


def theirs(
    model: Any, chat: ChatTemplate, prompts: Sequence[Sequence[int]], *, new: int, batch: int
) -> list[list[int]]:
    """New ids by `generate` of transformers, in batches in the order of the prompts, without stop tokens."""
    base, found = transformer(model), []
    with evaluating(model), _only_greedy(base, chat, new):
        for start in range(0, len(prompts), batch):
            ids, mask = _left_padded(prompts[start : start + batch], chat.pad_id, device=base.device)
            made = base.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :].tolist()
            for row in made:
                end = next((n for n, token in enumerate(row) if token in chat.stop_ids), len(row))
                found.append(row[:end])
    return found


def ours(model: Any, chat: ChatTemplate, prompts: Sequence[Sequence[int]], *, new: int) -> list[list[int]]:
    """The same by ours."""
    return [list(answer.ids) for answer in generate(model, chat, prompts, max_new_tokens=new)]


def brute_force(model: Any, chat: ChatTemplate, rows: Sequence[RankedRow]) -> list[list[float]]:
    """Log-probabilities of all choices, each with its whole prompt: one forward pass for the choices of a row."""
    from lora_tune.evaluation.rank import _without_cache

    made = [_without_cache(model, [row], pad_id=chat.pad_id, progress=None)[0] for row in rows]
    return [[choice.log_prob for choice in row] for row in made]


def in_turns(sides: dict[str, Callable[[], Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Best seconds of each side over some rounds, and what each of them gave."""
    best: dict[str, float] = {}
    found: dict[str, Any] = {}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            began = time.process_time()
            found[name] = side()
            best[name] = min(best.get(name, float("inf")), time.process_time() - began)
    return best, found


def ranking(model: Any, chat: ChatTemplate, data: Path, count: int) -> dict[str, Any]:
    """Rank classification of held-out questions with four choices each."""
    texts = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()[:count]]
    names = sorted({text["output"] for text in texts})
    questions = []
    for place, (text, row) in enumerate(zip(texts, read_questions(data), strict=False)):
        others = [names[(place * 7 + step) % len(names)] for step in range(CHOICES + 1)]
        choices = tuple(dict.fromkeys([text["output"], *others]))[:CHOICES]
        questions.append(Question(row.messages, (), text["output"], "", choices=choices))
    rows = ranked_rows(chat, questions)
    seconds, found = in_turns(
        {
            "whole_prompts": lambda: brute_force(model, chat, rows),
            "shared_prompt": lambda: [
                [choice.log_prob for choice in row] for row in choice_scores(model, rows, pad_id=chat.pad_id)
            ],
        }
    )
    pairs = list(zip(chain(*found["whole_prompts"]), chain(*found["shared_prompt"]), strict=True))
    return {
        "rows": count,
        "choices": CHOICES,
        "rows_per_s": {name: round(count / value, 1) for name, value in seconds.items()},
        "times": round(seconds["whole_prompts"] / seconds["shared_prompt"], 2),
        "largest_difference_nats": float(f"{max(abs(one - two) for one, two in pairs):.2g}"),
        "largest_log_prob_nats": round(max(abs(one) for one, _ in pairs), 1),
    }


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=200)
    options.add_argument("--new-tokens", type=int, default=24)
    options.add_argument("--json", type=result_file)
    given = options.parse_args()
    torch.set_num_threads(1)
    folder, data = ROOT / "adapters" / "example", ROOT / "recipes" / "quickstart" / "held_out.jsonl"
    source, held = base_at_hand(folder)
    chat = chat_of_folder(folder)
    model = load_adapter(
        load_base(source, held.model_copy(update={"quantize": "none", "compute_dtype": "float32"})), folder
    )
    prompts = [chat.prompt_ids(row.messages) for row in read_questions(data)[: given.rows]]
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, one CPU thread",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "rows": given.rows,
        "new_tokens": given.new_tokens,
    }
    new, spent = given.new_tokens, dict.fromkeys(("row_by_row", "batches_of_transformers", "ours"), 0.0)
    for name, setting in (("adapter", nullcontext()), ("base", model.disable_adapter())):
        with setting:
            seconds, found = in_turns(
                {
                    "row_by_row": lambda: theirs(model, chat, prompts, new=new, batch=1),
                    "batches_of_transformers": lambda: theirs(model, chat, prompts, new=new, batch=64),
                    "ours": lambda: ours(model, chat, prompts, new=new),
                }
            )
        spent = {side: spent[side] + value for side, value in seconds.items()}
        same = sum(one == two for one, two in zip(found["row_by_row"], found["ours"], strict=True))
        result[name] = {
            "rows_per_s": {side: round(given.rows / value, 1) for side, value in seconds.items()},
            "times_row_by_row": round(seconds["row_by_row"] / seconds["ours"], 2),
            "times_batches": round(seconds["batches_of_transformers"] / seconds["ours"], 2),
            "tokens_per_answer": round(sum(map(len, found["ours"])) / given.rows, 1),
            "same_answers": f"{same} of {given.rows}",
        }
    result["both_sides"] = {
        "rows_per_s": {side: round(given.rows / value, 1) for side, value in spent.items()},
        "times_row_by_row": round(spent["row_by_row"] / spent["ours"], 2),
        "times_batches": round(spent["batches_of_transformers"] / spent["ours"], 2),
    }
    result["ranking"] = ranking(model, chat, data, min(100, given.rows))
    print_and_keep(result, given.json)


if __name__ == "__main__":
    main()

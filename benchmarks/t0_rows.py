"""The data sets behind T0's published training prompts: rows read back from the text that one template made of them.

The corpus holds prompts of T0 as they were trained on (`{prompt, completion}`, 200 rows a template; the copy of
yizhongw/self-instruct), not the data sets themselves. What a template wrapped round the columns is taken off again
here, so that other templates can show the same rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
END = "<|endoftext|>"
_TOPICS = ("World politics", "Sports", "Business", "Science and technology")


def published(folder: Path, name: str) -> list[tuple[str, str]]:
    """(prompt, answer) of one template's file, without the newline and the end token that were added there."""
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["prompt"].removesuffix("\n"), row["completion"].removesuffix(END)) for row in rows]


def raw_rows(folder: Path) -> dict[str, list[Row]]:
    """{data set: its rows, each once} with the columns that promptsource's templates read."""
    found = {}
    for name, (file, take) in _READERS.items():
        rows = [row for prompt, answer in published(folder, file) if (row := take(prompt, answer)) is not None]
        found[name] = list({json.dumps(row, sort_keys=True): row for row in rows}.values())
    return found


def _match(pattern: str, prompt: str) -> tuple[str, ...] | None:
    match = re.fullmatch(pattern, prompt, re.DOTALL)
    return match.groups() if match else None


def _mrpc(prompt: str, answer: str) -> Row | None:
    found = _match(r"Does the sentence\n(.*)\nparaphrase \(.*?\) this sentence\?\n(.*)", prompt)
    return found and {"sentence1": found[0], "sentence2": found[1], "label": int(answer == "yes")}


def _paws(prompt: str, answer: str) -> Row | None:
    found = _match(r"Sentence 1: (.*)\nSentence 2: (.*)\nQuestion: .*", prompt)
    return found and {"sentence1": found[0], "sentence2": found[1], "label": int(answer == "Yes")}


def _ag_news(prompt: str, answer: str) -> Row | None:
    found = _match(r"(.*) \nIs this a piece of news regarding .*", prompt)
    return found and {"text": found[0], "label": _TOPICS.index(answer)}


def _imdb(prompt: str, answer: str) -> Row | None:
    found = _match(r"The following movie review expresses what sentiment\? (.*)", prompt)
    return found and {"text": found[0], "label": int(answer == "positive")}


def _samsum(prompt: str, answer: str) -> Row | None:
    found = _match(r"Summarize: (.*)", prompt)
    return found and {"dialogue": found[0], "summary": answer}


def _xsum(prompt: str, answer: str) -> Row | None:
    found = _match(r"(.*)\n\nTL;DR:", prompt)
    return found and {"document": found[0], "summary": answer}


def _common_gen(prompt: str, answer: str) -> Row | None:
    found = _match(r"Ignoring the order of the concepts: (.*); \nGenerate a sentence with all the concepts :", prompt)
    return found and {"concepts": found[0].split(", "), "target": answer}


def _cosmos_qa(prompt: str, answer: str) -> Row | None:
    found = _match(r"(.*)\n([^\n]*)\nPick the best answer from the following options:\n- (.*)", prompt)
    options = found[2].split("\n - ") if found else []
    if not found or len(options) != 4 or answer not in options:
        return None
    answers = {f"answer{number}": option for number, option in enumerate(options)}
    return {"context": found[0], "question": found[1], **answers, "label": options.index(answer)}


_READERS: dict[str, tuple[str, Callable[[str, str], Row | None]]] = {
    "glue__mrpc": ("glue_mrpc_paraphrase", _mrpc),
    "paws__labeled_final": ("paws_labeled_final_Rewrite", _paws),
    "ag_news": ("ag_news_classify_with_choices", _ag_news),
    "imdb": ("imdb_Movie_Expressed_Sentiment_2", _imdb),
    "samsum": ("samsum_Summarize_", _samsum),
    "xsum": ("xsum_DOC_tldr", _xsum),
    "common_gen": ("common_gen_Given_concepts_type_2", _common_gen),
    "cosmos_qa": ("cosmos_qa_context_question_description_answer_text", _cosmos_qa),
}

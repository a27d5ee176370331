"""Real templates on real rows, against the text that T0 was trained on: rendered here, every character is the same."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from lora_tune.data.prompt_file import read_prompts
from lora_tune.data.rendering import Job, render

# data set: {template: published file, the one from which the rows are read back last}
PUBLISHED = {
    "glue__mrpc": {
        "generate_paraphrase": "glue_mrpc_generate_paraphrase",
        "paraphrase": "glue_mrpc_paraphrase",
    },
    "paws__labeled_final": {
        "context-question": "paws_labeled_final_context_question",
        "Rewrite": "paws_labeled_final_Rewrite",
    },
    "ag_news": {
        "classify_question_first": "ag_news_classify_question_first",
        "classify_with_choices": "ag_news_classify_with_choices",
    },
    "imdb": {
        "Movie Expressed Sentiment": "imdb_Movie_Expressed_Sentiment",
        "Movie Expressed Sentiment 2": "imdb_Movie_Expressed_Sentiment_2",
    },
    "samsum": {
        "Generate a summary for this dialogue": "samsum_Generate_a_summary_for_this_dialogue",
        "Summarize:": "samsum_Summarize_",
    },
    "xsum": {
        "DOC_write_summary_of_above": "xsum_DOC_write_summary_of_above",
        "DOC_tldr": "xsum_DOC_tldr",
    },
    "common_gen": {"Given concepts - type 2": "common_gen_Given_concepts_type_2"},
    "cosmos_qa": {
        "context_answer_to_question": "cosmos_qa_context_answer_to_question",
        "context_question_description_answer_text": "cosmos_qa_context_question_description_answer_text",
    },
}


@pytest.fixture(scope="module")
def t0_rows(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("t0_rows", root / "benchmarks" / "t0_rows.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_renders_are_those_that_t0_was_trained_on(name: str, corpus: Path, t0_rows: ModuleType) -> None:
    folder = corpus / "data" / "datasets"
    rows = t0_rows.raw_rows(folder / "t0")[name]
    assert len(rows) >= 199
    file = read_prompts(folder / "promptsource" / f"{name}.yaml", templates=tuple(PUBLISHED[name]))
    for number, published in enumerate(PUBLISHED[name].values()):
        jobs = [Job(number, 1, json.dumps(row), f"{name}:{line}") for line, row in enumerate(rows, 1)]
        made = {made.parts for _, made in render(file, jobs) if made.applies}
        expected = {(prompt.strip(), answer.strip()) for prompt, answer in t0_rows.published(folder / "t0", published)}
        assert made == expected, published

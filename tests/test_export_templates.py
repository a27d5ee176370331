"""The words of an exported folder, read by a transformers tokenizer alone, over chat templates of corpus and TRL."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from chat_template_cases import TEMPLATES, loaded, marked_conversations, needs_corpus

from lora_tune.adapter.parity import FIXED, check_parity
from lora_tune.adapter.transformers_words import transformers_words
from lora_tune.adapter.write import write_tokenizer
from lora_tune.errors import CheckFailed

CHOSEN = ("qwen3.jinja", "llama-3", "gemma-it", "mistral", "phi3.jinja", "idefics3.jinja", "gptoss.jinja")
IN_BRIEF = [name for name in TEMPLATES if name.startswith(CHOSEN)]
THE_REST = (
    [] if "LORA_TUNE_ENGINES_REQUIRED" not in os.environ else [name for name in TEMPLATES if name not in IN_BRIEF]
)


@needs_corpus
@pytest.mark.nightly
@pytest.mark.parametrize("name", [*IN_BRIEF, *THE_REST])
def test_a_folder_speaks_as_training_did(name: str, tmp_path: Path) -> None:
    try:
        chat = loaded(name)
    except CheckFailed:
        pytest.skip("refused before training")
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", chat.tokenizer)
    render, stops = transformers_words(tmp_path / "out")
    rows = [marked_conversations()[kind] for kind in ("one", "two", "system")]
    found = check_parity(chat, render, [*FIXED, *rows], stop_ids={*stops, *chat.stop_ids}, target=name)
    assert found.prompts >= 3
    if name.startswith("idefics3"):  # it reads contents as lists, which mlx-lm does not make of them
        render, _ = transformers_words(tmp_path / "out", contents="text")
        with pytest.raises(CheckFailed, match="would feed other words"):
            check_parity(chat, render, FIXED, stop_ids=chat.stop_ids, target="mlx")
    if name.startswith("phi3"):  # its template writes eos_token, which does not end an answer
        with pytest.raises(CheckFailed, match="does not stop"):
            check_parity(chat, render, FIXED, stop_ids=stops, target="an engine with the tokenizer's end alone")

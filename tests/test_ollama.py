"""Export to Ollama: a Modelfile whose words are those of training, or nothing at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import finished
import pytest
import tiny

from lora_tune.adapter.at_hand import chat_of_folder
from lora_tune.adapter.export_ollama import ollama_words
from lora_tune.adapter.modelfile import read_modelfile
from lora_tune.adapter.parity import FIXED, check_parity
from lora_tune.cli import main
from lora_tune.errors import CheckFailed
from lora_tune.model.gguf_tokenizer import gguf_tokenizer
from lora_tune.model.llama_tokens import llama_tokenizer

BOS = "{{ bos_token }}" + tiny.CHATML
STRIPS = tiny.CHATML.replace("message.content or ''", "(message.content or '') | trim")
DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}" + tiny.CHATML
)
REWRITES = tiny.CHATML.replace("(message.content or '')", "(message.content or '').replace('\\n\\n', '\\n')")


def exported(base: Path, folder: Path, *more: str) -> int:
    """Export an adapter that was made on this base; returns the exit code. The output is `folder / out`."""
    if not (folder / "adapter").exists():
        finished.write_finished(folder / "adapter", base)
    command = ["export", str(folder / "adapter"), "--base", str(base), "--output", str(folder / "out")]
    return main([*command, *([] if "--to" in more else ["--to", "ollama"]), *more])


def with_bos(folder: Path) -> None:
    """Let the base's tokenizer put its bos before every text."""
    content = json.loads((folder / "tokenizer.json").read_text())
    name, sequence = tiny.SPECIAL[tiny.DOCUMENT], {"Sequence": {"id": "A", "type_id": 0}}
    single = [{"SpecialToken": {"id": name, "type_id": 0}}, sequence]
    special = {name: {"id": name, "ids": [tiny.DOCUMENT], "tokens": [name]}}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": special,
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("template", "bos"),
    [(tiny.CHATML, "none"), (BOS, "text"), (BOS, "token"), (STRIPS, "none"), (DEFAULT, "none")],
    ids=["chatml", "bos in the text", "bos by the engine", "strips", "default system"],
)
def test_the_modelfile_says_what_training_said(
    template: str, bos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.write_base(tmp_path / "base", chat_template=template)
    if bos == "token":
        with_bos(base)
    rows = [
        {"messages": [{"role": "user", "content": " a\n\n"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": role, "content": f"{role} ä\t1"} for role in ("system", "user", "assistant")]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    merged = template == tiny.CHATML
    to = "ollama" if merged else "ollama-adapter"
    assert exported(base, tmp_path, "--data", str(tmp_path / "rows.jsonl"), "--json", "--to", to) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parity"]["rows"] == 5 and facts["parity"]["left_out"] == 0 and facts["tokens_by"]
    out = tmp_path / "out"
    files = ["model.gguf"] if merged else ["adapter.gguf", "base.gguf"]
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", *files]
    file = read_modelfile((out / "Modelfile").read_text(encoding="utf-8"))
    assert (file.model, file.adapter) == (("./model.gguf", "") if merged else ("./base.gguf", "./adapter.gguf"))
    assert file.stops == ("<|im_end|>",)
    assert file.system == ("Be brief." if template == DEFAULT else "")
    assert ("<|endoftext|>" in file.template) == (bos == "text")


def test_a_changed_template_is_noticed(tiny_base: Path, tmp_path: Path) -> None:
    """The comparison can fail: one newline less in the Modelfile, one stop token less, and it says where."""
    assert exported(tiny_base, tmp_path, "--to", "ollama-adapter") == 0
    text = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    chat = chat_of_folder(tmp_path / "adapter")
    words = llama_tokenizer(gguf_tokenizer(chat, rows=260), chat)
    found = check_parity(chat, ollama_words(text, words), FIXED, stop_ids=[tiny.END], target="ollama")
    assert found.prompts == 4 and found.tokens > 100
    broken = text.replace("<|im_start|>assistant\n", "<|im_start|>assistant")
    assert broken != text
    with pytest.raises(CheckFailed, match="would feed other words than training, from token"):
        check_parity(chat, ollama_words(broken, words), FIXED, stop_ids=[tiny.END], target="ollama")
    with pytest.raises(CheckFailed, match="does not stop"):
        check_parity(chat, ollama_words(text, words), FIXED, stop_ids=[], target="ollama")
    system = text.replace("PARAMETER", 'SYSTEM """Be long."""\nPARAMETER')
    with pytest.raises(CheckFailed, match="would feed other words"):
        check_parity(chat, ollama_words(system, words), FIXED, stop_ids=[tiny.END], target="ollama")


def test_a_template_that_go_cannot_say_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.write_base(tmp_path / "base", chat_template=REWRITES)
    assert exported(base, tmp_path, "--to", "ollama-adapter") == 1
    assert "cannot be said in Go's template language: a chat of user: at character" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["adapter", "base"]
    assert exported(base, tmp_path, "--to", "gguf") == 0  # llama.cpp runs the base's own


def test_tools_in_the_data_are_refused(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call: dict[str, Any] = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    more = ("--data", str(tmp_path / "rows.jsonl"), "--to", "ollama-adapter")
    assert exported(tiny_base, tmp_path, *more) == 1
    assert "tools and reasoning have no place in the Modelfile's template" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

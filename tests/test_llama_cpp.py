"""GGUF files executed in real llama.cpp, against PEFT: logits, tokens, cuts of text. `make nightly` installs it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
from pathlib import Path
from typing import Any

import gguf_kit
import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lora_tune.adapter.at_hand import chat_of_folder
from lora_tune.adapter.export_gguf import write_gguf_adapter
from lora_tune.adapter.modelfile import read_modelfile
from lora_tune.cli import main
from lora_tune.data.chat_template import load_chat_template
from lora_tune.model.export_gguf import write_gguf_base
from lora_tune.model.gguf_tokenizer import gguf_tokenizer
from lora_tune.model.llama_tokens import llama_tokenizer
from lora_tune.model.source import find_base
from lora_tune.recipe import Base

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None and "LORA_TUNE_ENGINES_REQUIRED" not in os.environ,
        reason="llama.cpp is not installed",
    ),
]
IDS = [4 + (37 * place) % 256 for place in range(100)]
GELU_IN_HALF = 5e-3  # llama.cpp reads gelu from a table of float16


def model_of(path: Path, *, adapter: Path | None = None) -> Any:
    llama_cpp = importlib.import_module("llama_cpp")
    lora = str(adapter) if adapter else None
    return llama_cpp.Llama(
        str(path),
        lora_path=lora,
        n_ctx=512,
        n_batch=512,
        logits_all=True,
        n_threads=1,
        verbose=False,
        type_k=0,
        type_v=0,
    )


def logits_of(path: Path, ids: list[int], *, adapter: Path | None = None) -> np.ndarray:
    model = model_of(path, adapter=adapter)
    model.eval(ids)
    found = np.array(model.scores[: len(ids)])
    model.close()
    return found


@pytest.mark.parametrize("kind", gguf_kit.KINDS)
def test_llama_cpp_computes_what_peft_computes(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = gguf_kit.random_base(tmp_path / "base", kind)
    model = gguf_kit.adapter_on(base, tmp_path / "adapter")
    source, chat = find_base(Base(name=str(base), quantize="none")), chat_of_folder(base)
    write_gguf_base(source, tmp_path / "base.gguf", chat=chat)
    write_gguf_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf", source=source)
    with torch.no_grad():
        adapted = model(torch.tensor([IDS])).logits[0].numpy()
        with model.disable_adapter():
            plain = model(torch.tensor([IDS])).logits[0].numpy()
    bare = np.abs(logits_of(tmp_path / "base.gguf", IDS) - plain).max()
    found = logits_of(tmp_path / "base.gguf", IDS, adapter=tmp_path / "adapter.gguf")
    effect, error = np.abs(adapted - plain).max(), np.abs(found - adapted).max()
    with capsys.disabled():
        print(
            f"\n{kind}: the adapter changes logits by {effect:.1f}; base differs {bare:.1e}, with adapter {error:.1e}"
        )
    most = GELU_IN_HALF if kind.startswith("gemma") else 5e-5
    assert bare <= most and error <= 2 * most and effect > 1
    assert (found.argmax(axis=1) == adapted.argmax(axis=1)).mean() >= (0.97 if kind.startswith("gemma") else 1.0)


def test_updates_of_embeddings_and_head(tmp_path: Path) -> None:
    base = gguf_kit.random_base(tmp_path / "base", "llama")
    model = gguf_kit.foreign_adapter(base, tmp_path / "adapter", ["embed_tokens", "lm_head", "k_proj"])
    source = find_base(Base(name=str(base), quantize="none"))
    write_gguf_base(source, tmp_path / "base.gguf", chat=chat_of_folder(base))
    write_gguf_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf", source=source)
    with torch.no_grad():
        adapted = model(torch.tensor([IDS])).logits[0].numpy()
    found = logits_of(tmp_path / "base.gguf", IDS, adapter=tmp_path / "adapter.gguf")
    bare = logits_of(tmp_path / "base.gguf", IDS)
    assert np.abs(found - adapted).max() <= 1e-4 < 0.1 < np.abs(bare - adapted).max()


def text_of(draw: random.Random, words: list[str]) -> str:
    """Words, numbers, blanks and characters of many scripts, in Unicode's form NFC."""
    pieces = []
    for _ in range(draw.randint(1, 12)):
        kinds = (
            draw.choice(words),
            draw.choice([" ", "  ", "\n", "\n\n", "\t", "   \n ", "\r\n"]),
            "".join(
                chr(draw.choice([draw.randint(0xE0, 0x17F), draw.randint(0x4E00, 0x4FFF), 0x1F642])) for _ in "12345"
            ),
            draw.choice(["it's", "I'LL", "don't", "12345", "3.14", "<b>", "  x", "==>"]),
        )
        pieces += [draw.choice(kinds), draw.choice([" ", ""])]
    return "".join(pieces)


@pytest.mark.parametrize("name", ["builtin", "gpt2_no-template", "qwen2.5-7b-unsloth_vision-pad", "mpt-gpt-neox"])
def test_llama_cpp_cuts_text_as_the_tokenizer_does(name: str, corpus: Path, root: Path) -> None:
    folder = root / "lora_tune/builtin/quickstart" if name == "builtin" else corpus / "data/tokenizers" / name
    chat = chat_of_folder(folder)
    written = gguf_tokenizer(chat, rows=len(chat.tokenizer) + 3)
    words = llama_tokenizer(written, chat)
    assert words.by == "llama.cpp"
    draw, known = random.Random(3), (root / "CHANGELOG.md").read_text(encoding="utf-8").split(" ")
    for _ in range(300):
        text = text_of(draw, known)
        assert words.ids(text) == chat.tokenizer.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize("prefix", ["space first", "no space"])
def test_llama_cpp_cuts_text_as_sentencepiece_did(prefix: str, corpus: Path, root: Path) -> None:
    """Phi-3's vocabulary of 32,000 pieces, with control tokens that leave blanks alone; Gemma's has no first space."""
    content = json.loads((corpus / "data/tokenizers/phi-3-mini/tokenizer.json").read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token["rstrip"] = False
    if prefix == "no space":
        content["normalizer"]["normalizers"].pop(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        eos_token="<|end|>",
        bos_token="<s>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = tiny.CHATML.replace("<|im_start|>", "<|user|>").replace("<|im_end|>", "<|end|>")
    chat = load_chat_template(tokenizer)
    words = llama_tokenizer(gguf_tokenizer(chat, rows=len(tokenizer) + 3), chat)
    draw, known = random.Random(4), (root / "CHANGELOG.md").read_text(encoding="utf-8").split(" ")
    differ = []
    for number in range(300):
        text = ("<|user|>" if number % 2 else "") + text_of(draw, known) + "<|end|>" + text_of(draw, known)
        if words.ids(text) != tokenizer.encode(text, add_special_tokens=False):
            differ.append(text)
    assert words.by == "llama.cpp" and differ == []


def test_the_example_answers_in_llama_cpp_as_in_peft(root: Path, tmp_path: Path) -> None:
    """Trained on a 4-bit base, exported for Ollama, with the words of its held-out rows: the same tokens, greedily."""
    from lora_tune.adapter.load import load_adapter
    from lora_tune.data.conversation import Message
    from lora_tune.model.base import load_base

    example = root / "adapters" / "example"
    command = ["export", str(example), "--to", "ollama-adapter", "--output", str(tmp_path / "out")]
    assert main([*command, "--dtype", "float32"]) == 0
    file = read_modelfile((tmp_path / "out" / "Modelfile").read_text(encoding="utf-8"))
    assert (file.model, file.adapter) == ("./base.gguf", "./adapter.gguf") and file.stops == ("<|im_end|>",)
    chat = chat_of_folder(example)
    held = Base(name="builtin:quickstart", quantize="nf4", compute_dtype="float32")
    peft = load_adapter(load_base(find_base(held), held), example)
    llama = model_of(tmp_path / "out" / "base.gguf", adapter=tmp_path / "out" / "adapter.gguf")
    same = total = 0
    for words in ("Name three colours.", "Write one sentence about the sea.", "What is 2 + 2?"):
        ids = torch.tensor([chat.prompt_ids([Message("user", words)])])
        with torch.no_grad():
            wanted = peft.generate(input_ids=ids, max_new_tokens=24, do_sample=False, eos_token_id=list(chat.stop_ids))
        new = [int(token) for token in wanted[0][ids.shape[1] :]]
        llama.reset()
        given = []
        for token in llama.generate(ids[0].tolist(), temp=0.0, top_k=1, repeat_penalty=1.0):
            given.append(int(token))
            if token in chat.stop_ids or len(given) == len(new):
                break
        same, total = same + sum(a == b for a, b in zip(new, given, strict=False)), total + len(new)
    assert total > 20 and same == total

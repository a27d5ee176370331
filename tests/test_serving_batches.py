"""Rows in slots: over architectures, rows that join and leave at different steps get the answers of the model alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lora_tune.data.chat_template import ChatTemplate, load_chat_template
from lora_tune.serving.answer_text import AnswerText, Vocabulary
from lora_tune.serving.backend import Finished, Request, Sampling
from lora_tune.serving.engine import Engine, Limits
from lora_tune.serving.job import Job
from lora_tune.serving.runner import Runner

SIZE: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 2,
}  # fmt: skip
PLAIN = {key: SIZE[key] for key in SIZE if key not in ("num_key_value_heads", "head_dim")}
WINDOWS: dict[str, Any] = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    "llama, eager": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, attn_implementation="eager")),
    "mistral, window of 8": lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=8)),
    "phi3, window of 8": lambda: Phi3ForCausalLM(Phi3Config(**PLAIN, num_key_value_heads=1, sliding_window=8)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE)),
    "gemma2, windows of 6": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZE, **WINDOWS)),
    "gemma3, windows of 6": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZE, **WINDOWS)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**PLAIN)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=2, pad_token_id=0, eos_token_id=2)
    ),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=2, pad_token_id=0, eos_token_id=2)
    ),
    "lfm2": lambda: Lfm2ForCausalLM(Lfm2Config(**PLAIN, num_key_value_heads=2, layer_types=["conv", "full_attention"])),
}
IN_TURN = {"phi3, window of 8", "bloom", "lfm2"}  # inputs of their own, positions by the mask, other states


@pytest.fixture(scope="module")
def chat(tiny_base: Path) -> ChatTemplate:
    return load_chat_template(AutoTokenizer.from_pretrained(tiny_base))


@cache
def model_of(name: str) -> PreTrainedModel:
    """A random model whose stop token is likely enough that some rows end early."""
    torch.manual_seed(4)
    model = MODELS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.2)
    model.get_output_embeddings().weight[2] *= 2.0
    return model


def prompts(count: int, *, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(4, 260) for _ in range(draw.randint(2, 30))] for _ in range(count)]


def solo(model: PreTrainedModel, prompt: list[int], most: int) -> list[int]:
    """transformers' own greedy answer, up to the stop token."""
    ids = torch.tensor([prompt])
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": most, "do_sample": False, "eos_token_id": 2}
    with torch.no_grad():
        new = model.generate(ids, **given)
    return [token for token in new[0, len(prompt) :].tolist() if token != 2]


async def answers(engine: Engine, words: Vocabulary, asked: list[tuple[list[int], int]]) -> list[list[int]]:
    """The answers of an engine to prompts that come one after the other while others are being answered."""

    async def one(number: int, prompt: list[int], most: int) -> list[int]:
        await asyncio.sleep(0.002 * number)
        request, loop = Request("base", tuple(prompt), Sampling(most)), asyncio.get_running_loop()
        job = Job(request, None, "shared batch", words, 260, loop, asyncio.Queue())
        engine.submit(job)
        found: list[int] = []
        while not isinstance(item := await job.items.get(), Finished):
            assert not isinstance(item, Exception), item
            found += item.ids
        return found

    return list(await asyncio.gather(*(one(number, *question) for number, question in enumerate(asked))))


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_come_and_go_get_the_answers_of_the_model_alone(name: str, chat: ChatTemplate) -> None:
    model = model_of(name)
    asked = [(prompt, 6 + 5 * (number % 4)) for number, prompt in enumerate(prompts(12))]
    expected = [solo(model, prompt, most) for prompt, most in asked]
    runner = Runner(model)
    assert runner.has_slots == (name not in IN_TURN)
    engine = Engine(runner, Limits(rows=5, prefill_tokens=16), cache_tokens=10**6)
    try:
        found = asyncio.run(answers(engine, Vocabulary(chat), asked))
    finally:
        engine.stop()
    assert found == expected
    if name == "llama":
        assert 1 < sum(len(ids) < most for ids, (_, most) in zip(expected, asked, strict=True)) < 12


PARTS = st.lists(
    st.one_of(st.integers(4, 259), st.sampled_from([0xF0 + 4, 0x9F + 4, 0x98 + 4, 0x80 + 4, 0xE2 + 4])), max_size=40
)


@given(ids=PARTS, stop=st.lists(st.text("ab\ufffd😀 ", min_size=1, max_size=3), max_size=3))
def test_text_in_pieces_is_the_text_up_to_its_first_stop_string(ids: list[int], stop: list[str]) -> None:
    words = vocabulary()
    text = AnswerText(words, stop)
    sent = ""
    for token in ids:
        sent += text.add(token)
        if text.stopped:
            break
    sent += text.rest()
    whole = words.decode(ids)
    places = [whole.find(word) for word in stop if word in whole]
    if "\ufffd" in "".join(stop):  # what is broken may become whole later
        assert whole.startswith(sent)
    else:
        assert sent == (whole[: min(places)] if places else whole)


@cache
def vocabulary() -> Vocabulary:
    import tempfile

    import tiny

    with tempfile.TemporaryDirectory() as folder:
        return Vocabulary(load_chat_template(AutoTokenizer.from_pretrained(tiny.write_base(Path(folder) / "base"))))


def test_characters_come_whole_and_stop_strings_are_held_back() -> None:
    words = vocabulary()
    ids = words_of("ab😀STOPcd")
    text = AnswerText(words, ["STOP"])
    sent = [text.add(token) for token in ids[:9]]
    assert sent == ["a", "b", "", "", "", "😀", "", "", ""]
    assert text.add(ids[9]) == "" and text.stopped and text.rest() == ""
    held = AnswerText(words, ["STOP"])
    assert [held.add(token) for token in words_of("aSTa")] == ["a", "", "", "STa"]
    cut = AnswerText(words, [])
    assert [cut.add(token) for token in words_of("a😀")[:3]] == ["a", "", ""] and cut.rest() == "\ufffd"


def words_of(text: str) -> list[int]:
    """Ids of the tiny tokenizer: one for each byte."""
    return [byte + 4 for byte in text.encode()]


def test_bytes_of_tokens_that_are_parts_of_a_character() -> None:
    words = vocabulary()
    said = [words.logprob(token, -1.0) for token in words_of("é!")]
    assert b"".join(one.data for one in said) == "é!".encode() and [one.text for one in said][-1] == "!"

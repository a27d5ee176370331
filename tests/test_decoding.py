"""Decoding and ranking with a KV cache, over architectures: rows that leave the batch change no answer, shared prompts
change no log-probability, and what is drawn depends on the seed and the row alone."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
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
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lora_tune.data.chat_template import ChatTemplate, RowError, TokenRow, load_chat_template
from lora_tune.data.conversation import Conversation, Message
from lora_tune.errors import DataError, UsageError
from lora_tune.evaluation import rank
from lora_tune.evaluation.losses import row_losses
from lora_tune.evaluation.questions import Question, as_question
from lora_tune.evaluation.rank import Choice, choice_scores, ranked_rows
from lora_tune.model import decoding as loop
from lora_tune.model import generation
from lora_tune.model.decoding import Decoding, has_plain_cache
from lora_tune.model.generation import Answer, answer_batches, generate

SIZE: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 2,
}  # fmt: skip
PLAIN = {key: SIZE[key] for key in SIZE if key not in ("num_key_value_heads", "head_dim")}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    "mistral, window of 8": lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=8)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE)),
    "gemma3, windows of 6": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZE, sliding_window=6, layer_types=["sliding_attention", "full_attention"])
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**PLAIN)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=2, pad_token_id=0, eos_token_id=2)
    ),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=2, pad_token_id=0, eos_token_id=2)
    ),
    "lfm2": lambda: Lfm2ForCausalLM(Lfm2Config(**PLAIN, num_key_value_heads=2, layer_types=["conv", "full_attention"])),
}
WITH_CACHE = [name for name in MODELS if name != "lfm2"]


@pytest.fixture(scope="module")
def chat(tiny_base: Path) -> ChatTemplate:
    return load_chat_template(AutoTokenizer.from_pretrained(tiny_base))


@cache
def model_of(name: str) -> PreTrainedModel:
    """A random model whose stop token is likely enough that some rows end early."""
    torch.manual_seed(4)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
        model.get_output_embeddings().weight[2] *= 2.0
    return model


def prompts(count: int, *, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(4, 260) for _ in range(draw.randint(2, 30))] for _ in range(count)]


@pytest.mark.parametrize("name", MODELS)
def test_batches_answer_as_transformers_does_row_by_row(name: str, chat: ChatTemplate) -> None:
    model, asked = model_of(name), prompts(9)
    assert has_plain_cache(model) == (name in WITH_CACHE)
    expected = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            new = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False, eos_token_id=2
            )
        expected.append([token for token in new[0, len(prompt) :].tolist() if token != 2])
    found = generate(model, chat, asked, max_new_tokens=14)
    assert [list(answer.ids) for answer in found] == expected
    if name == "llama":
        assert 1 < sum(answer.stopped for answer in found) < 9, "some rows must end early and some not"


@pytest.mark.parametrize("name", WITH_CACHE)
def test_a_row_too_long_for_the_device_has_the_same_answer(
    name: str, chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys and values are kept in the machine's memory, after rows together and alone did not fit."""
    model, asked = model_of(name), prompts(5)
    expected = generate(model, chat, asked, max_new_tokens=14)
    tried: list[tuple[int, str]] = []

    def decode(base: Any, ids: Any, mask: Any, *, held: Any, **given: Any) -> Any:
        tried.append((len(ids), held))
        if held == "device" and ids.shape[1] > 12:
            raise torch.OutOfMemoryError
        return loop.decode(base, ids, mask, held=held, **given)

    monkeypatch.setattr(generation, "decode", decode)
    assert generate(model, chat, asked, max_new_tokens=14) == expected
    assert (
        (5, "device") in tried and (1, "host") in tried and all(count == 1 for count, held in tried if held == "host")
    )


def test_rows_that_have_ended_leave_the_batch(chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = model_of("llama"), prompts(24)
    seen: list[int] = []
    forward = model.forward

    def watched(*args: Any, **given: Any) -> Any:
        seen.append(len(given["input_ids"]))
        return forward(*args, **given)

    watched.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", watched)
    found = generate(model, chat, asked, max_new_tokens=30)
    longest = max(len(answer.ids) + answer.stopped for answer in found)
    assert len(seen) == longest and seen[0] == 24 and seen == sorted(seen, reverse=True) and seen[-1] < 24
    left = [sum(len(answer.ids) + answer.stopped > step for answer in found) for step in range(longest)]
    assert all(rows <= max(1, 8 * wanted / 7) for rows, wanted in zip(seen, left, strict=True))


def test_looking_less_often_changes_no_answer(chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = model_of("llama"), prompts(12)
    expected = generate(model, chat, asked, max_new_tokens=20)
    monkeypatch.setattr(loop, "_LEAVE_SHARE", 1)
    assert generate(model, chat, asked, max_new_tokens=20) == expected


def answers(model: PreTrainedModel, chat: ChatTemplate, asked: list[list[int]], **how: Any) -> dict[int, Answer]:
    found: dict[int, Answer] = {}
    for batch in answer_batches(model, chat, asked, decoding=Decoding(12, **how)):
        found |= batch
    return found


def test_what_is_drawn_depends_on_seed_and_row_alone(chat: ChatTemplate) -> None:
    model, asked = model_of("llama"), prompts(10)
    state = torch.get_rng_state()
    warm = answers(model, chat, asked, temperature=0.8, seed=5)
    assert warm == answers(model, chat, asked, temperature=0.8, seed=5)
    assert warm == answers(model, chat, asked, temperature=0.8, seed=5, batch_size=3)
    assert warm != answers(model, chat, asked, temperature=0.8, seed=6)
    assert torch.equal(state, torch.get_rng_state())
    greedy = answers(model, chat, asked)
    assert greedy == answers(model, chat, asked, temperature=1.0, top_k=1)
    assert greedy == answers(model, chat, asked, temperature=1.0, top_p=1e-6)
    same = answers(model, chat, [asked[0]] * 6, temperature=1.0)
    assert len({answer.ids for answer in same.values()}) > 1, "rows with one prompt get answers of their own"


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).log_softmax(-1).repeat(20_000, 1)
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(1))

    def shares(**how: Any) -> np.ndarray:
        chosen = loop._choose(logits, Decoding(1, temperature=1.0, **how), draws)
        return np.bincount(chosen.numpy(), minlength=4) / 20_000

    right = logits[0].exp().numpy()
    assert shares() == pytest.approx(right, abs=0.012)
    assert shares(top_k=2) == pytest.approx([*right[:2] / right[:2].sum(), 0, 0], abs=0.012)
    assert shares(top_p=0.8) == pytest.approx([*right[:2] / right[:2].sum(), 0, 0], abs=0.012)  # 0.64 + 0.24 > 0.8


def test_done_batches_are_passed_over_and_others_answered_whole(chat: ChatTemplate) -> None:
    model, asked = model_of("llama"), prompts(10)
    how = Decoding(8, batch_size=4)
    all_batches = list(answer_batches(model, chat, asked, decoding=how))
    assert [len(batch) for batch in all_batches] == [4, 4, 2]
    rest = list(answer_batches(model, chat, asked, decoding=how, done={*all_batches[0], next(iter(all_batches[1]))}))
    assert rest == all_batches[1:]


def test_an_architecture_without_a_plain_cache_does_not_draw(chat: ChatTemplate) -> None:
    with pytest.raises(UsageError, match="greedy search only"):
        answers(model_of("lfm2"), chat, prompts(2), temperature=1.0)


# --- ranking ----------


def question(prompt: str, choices: tuple[str, ...]) -> Question:
    turns = (Message("user", prompt), Message("assistant", choices[0]))
    made = as_question(Conversation(turns, choices=choices), seed=0)
    assert made
    return made


QUESTIONS = [
    question("Is it?", ("yes", "no", "maybe so")),
    question("Which of them " * 3, ("the first one", "the first two", "the last")),
    question("a", ("b", "bb")),
    question("Choose. " * 8, tuple("ABCDE")),
    question("One?", ("same", "same again")),
]


def by_definition(model: PreTrainedModel, chat: ChatTemplate, asked: Question) -> list[Choice]:
    """One forward pass for each choice, all logits, float64; the words' tokens without the end of the turn."""
    found = []
    for choice in asked.choices:
        turns = (*asked.messages, Message("assistant", choice))
        (encoded,) = chat.rows([Conversation(turns)], loss_on="last_assistant")
        assert not isinstance(encoded, RowError)
        ids, mask = torch.tensor(encoded[0].input_ids.astype(np.int64)), encoded[0].mask.copy()
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0].double().log_softmax(-1)
        places = [place for place in np.flatnonzero(mask) if int(ids[place]) not in chat.stop_ids]
        assert chat.tokenizer.decode(ids[places]).strip() == choice
        found.append(Choice(float(sum(log_probs[place - 1, ids[place]] for place in places)), len(places)))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_ranking_equals_the_brute_force(name: str, chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    expected = [by_definition(model, chat, asked) for asked in QUESTIONS]
    for tokens in (1, 200, 8192):
        monkeypatch.setattr(rank, "_BATCH_TOKENS", tokens)
        found = choice_scores(model, ranked_rows(chat, QUESTIONS), pad_id=chat.pad_id)
        for mine, right in zip(found, expected, strict=True):
            assert [choice.tokens for choice in mine] == [choice.tokens for choice in right]
            assert [one.log_prob for one in mine] == pytest.approx([one.log_prob for one in right], abs=1e-5)


def test_sharing_the_prompt_is_exact_up_to_rounding(chat: ChatTemplate) -> None:
    model = MODELS["llama"]().eval().double()
    found = choice_scores(model, ranked_rows(chat, QUESTIONS), pad_id=chat.pad_id)
    for mine, asked in zip(found, QUESTIONS, strict=True):
        right = [one.log_prob for one in by_definition(model, chat, asked)]
        # the last step, log-probabilities from logits, is made in float32
        assert [one.log_prob for one in mine] == pytest.approx(right, abs=2e-6)


def test_the_prompt_goes_through_the_model_once(chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    seen: list[tuple[int, ...]] = []
    forward = model.forward

    def watched(*args: Any, **given: Any) -> Any:
        seen.append(tuple(given["input_ids"].shape))
        return forward(*args, **given)

    watched.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", watched)
    rows = ranked_rows(chat, QUESTIONS)
    counted: list[int] = []
    choice_scores(model, rows, pad_id=chat.pad_id, progress=counted.append)
    assert sum(counted) == 5 and [shape[0] for shape in seen] == [5, 15]
    assert seen[1][1] <= 1 + max(row.longest - row.shared for row in rows)


def test_choices_that_memory_does_not_hold_at_once_are_halved(
    chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = model_of("qwen3"), ranked_rows(chat, QUESTIONS)
    expected = choice_scores(model, rows, pad_id=chat.pad_id)
    forward = model.forward

    def full(*args: Any, **given: Any) -> Any:
        if len(given["input_ids"]) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **given)

    full.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", full)
    found = choice_scores(model, rows, pad_id=chat.pad_id)
    for mine, right in zip(found, expected, strict=True):
        assert [one.log_prob for one in mine] == pytest.approx([one.log_prob for one in right], abs=1e-5)


def test_a_choice_without_words_is_an_error(chat: ChatTemplate) -> None:
    rows = ranked_rows(chat, [question("Is it?", ("yes", "no"))])
    assert all(any(mask) for mask in rows[0].scored)
    empty = TokenRow(np.arange(4, 8, dtype=np.int32), np.zeros(4, bool), 0, "", 1, frozenset())
    with pytest.raises(DataError, match="no token to predict"):
        rank._last([empty], "")
    with pytest.raises(DataError, match="cannot render the choice 'x': because"):
        rank._last(RowError("because"), "x")


def test_ranking_leaves_modes_and_random_numbers_alone(chat: ChatTemplate) -> None:
    model = model_of("mistral, window of 8").train()
    state = torch.get_rng_state()
    rows = ranked_rows(chat, QUESTIONS)
    assert choice_scores(model, rows, pad_id=chat.pad_id) == choice_scores(model, rows, pad_id=chat.pad_id)
    assert all(module.training for module in model.modules()) and torch.equal(state, torch.get_rng_state())
    model.eval()
    alone = row_losses(
        model,
        [TokenRow(np.array(rows[0].ids[0]), np.array(rows[0].scored[0]), 0, "", 1, frozenset())],
        pad_id=chat.pad_id,
    )
    assert choice_scores(model, rows[:1], pad_id=0)[0][0].log_prob == pytest.approx(-alone[0].nll, abs=1e-5)

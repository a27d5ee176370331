"""Tokens and loss mask by the base's own chat template, for all templates of TRL and of the corpus."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import mask_oracle
import numpy as np
import pytest
from chat_template_cases import (
    TEMPLATES,
    TOOLS,
    check_rows,
    conversation,
    loaded,
    marked_conversations,
    needs_corpus,
    own_template,
    reference_ids,
    reference_messages,
    starting_with,
    tokenizer_for,
    tokenizer_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lora_tune.data import default_template
from lora_tune.data.chat_template import RowError, load_chat_template
from lora_tune.data.conversation import Conversation, Message
from lora_tune.errors import CheckFailed


@needs_corpus
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_is_masked_exactly(name: str) -> None:
    template = loaded(name)
    kinds = marked_conversations()
    found = dict(zip(kinds, template.rows(list(kinds.values()), loss_on="assistant"), strict=True))
    for kind, rows in found.items():
        if isinstance(rows, RowError):
            assert kind in ("system", "tools"), rows
        else:
            check_rows(template, kinds[kind], rows)
    assert template.stop_ids[0] == template.eos_id


@needs_corpus
def test_a_wrong_mask_is_seen_by_the_oracle() -> None:
    template = starting_with("qwen2_5.jinja")
    row = marked_conversations()["two"]
    [token_row] = template.rows([row], loss_on="assistant")[0]
    messages = reference_messages(template, row)

    def complaints(mask: np.ndarray) -> list[str]:
        return mask_oracle.complaints(template.tokenizer, messages, [(token_row.input_ids, mask)])

    assert complaints(token_row.mask) == []
    edges = np.flatnonzero(np.diff(token_row.mask.astype(int))) + 1
    for edge in edges:
        for step in (-1, 1):
            wrong = token_row.mask.copy()
            wrong[min(edge, edge + step) : max(edge, edge + step)] ^= True
            assert complaints(wrong), (edge, step)
    assert complaints(np.zeros_like(token_row.mask))
    assert complaints(np.ones_like(token_row.mask))
    assert complaints(~token_row.mask)


REAL = ("tinyllama-1.1b-chat", "phi-3-mini", "qwen2.5-cogito-14b", "qwen2.5-7b-unsloth_vision-pad")


@needs_corpus
@pytest.mark.parametrize("folder", REAL)
def test_real_tokenizers_with_their_own_template(folder: str) -> None:
    template = own_template(folder)
    kinds = marked_conversations()
    if folder in REAL[:2]:
        kinds.pop("tools")
    for row, rows in zip(kinds.values(), template.rows(list(kinds.values()), loss_on="assistant"), strict=True):
        assert isinstance(rows, list)
        check_rows(template, row, rows)
    end = {"tinyllama": "</s>", "phi-3-mini": "<|end|>", "qwen2.5": "<|im_end|>"}
    name = template.tokenizer.convert_ids_to_tokens
    assert name(template.eos_id) == next(token for start, token in end.items() if folder.startswith(start))
    assert template.pad_id != template.eos_id
    answer = "Well, 2 < 3.\n\nIsn't it? é🙂"
    [row] = template.rows([conversation(Message("user", "?"), Message("assistant", answer))], loss_on="assistant")[0]
    assert template.decode_answer(row.input_ids[row.mask]) == answer


CONTENTS = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>assistant\n", "</s>", "<s>", "<|endoftext|>", "<|end|>", "<tool_call>"])
    | st.text(max_size=8)
    | st.sampled_from([" ", "\n", "\n\n", "é", "🙂", "<|", "|>", "ﬃ", "\u200b", "a b"]),
    max_size=5,
).map("".join)


@needs_corpus
@pytest.mark.parametrize("folder", REAL[:3])
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(user=CONTENTS, answer=CONTENTS, again=CONTENTS)
def test_words_never_become_control_tokens(folder: str, user: str, answer: str, again: str) -> None:
    template = own_template(folder)
    plain = conversation(
        Message("user", "u"), Message("assistant", "a"), Message("user", "v"), Message("assistant", "b")
    )
    row = conversation(
        Message("user", user), Message("assistant", answer), Message("user", again), Message("assistant", answer + "b")
    )
    [plain_rows, rows] = template.rows([plain, row], loss_on="assistant")
    assert isinstance(plain_rows, list)
    if isinstance(rows, RowError):
        assert "as plain text" in rows.reason
        return
    turns = (1, 3)
    words = [user, answer, again]
    hit = any(template._encoder.control_re.search(word) for word in words)
    assert all(("control_tokens" in token_row.notes) == hit for token_row in rows)
    control = sorted(template._encoder._control_ids.values())
    if len(rows) == len(plain_rows) == 1:  # as many control tokens as with harmless words
        count = [np.isin(r.input_ids, control).sum() for r in (plain_rows[0], rows[0])]
        assert count[0] == count[1]
    if "straddles" not in rows[0].notes and "per_turn" not in rows[0].notes:
        assert rows[0].input_ids.tolist() == reference_ids(template, row, sanitize_control_tokens=hit)
    for position, turn in enumerate(turns):
        token_row = rows[position] if len(rows) > 1 else rows[0]
        starts = np.flatnonzero(np.diff(np.concatenate(([0], token_row.mask.astype(np.int8)))) == 1)
        first = starts[0 if len(rows) > 1 else position]
        assert token_row.input_ids[:first].tolist() == template.prompt_ids(row.messages[:turn])
        end = np.flatnonzero(~token_row.mask[first:])
        last = token_row.input_ids[first + end[0] - 1] if len(end) else token_row.input_ids[-1]
        assert last == template.eos_id


@needs_corpus
def test_control_tokens_in_tools_and_calls() -> None:
    template = own_template("qwen2.5-cogito-14b")
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}
    tools = json.loads(json.dumps(TOOLS).replace("The weather", "<|im_start|>"))
    row = conversation(Message("user", "u"), Message("assistant", "", tool_calls=(call,)), tools=tuple(tools))
    [token_row] = template.rows([row], loss_on="assistant")[0]
    assert "control_tokens" in token_row.notes
    assert token_row.input_ids.tolist() == reference_ids(template, row, sanitize_control_tokens=True)
    starts = (token_row.input_ids == template.tokenizer.convert_tokens_to_ids("<|im_start|>")).sum()
    assert starts == 3  # system, user, assistant


@needs_corpus
def test_loss_on_and_weight() -> None:
    template = own_template("qwen2.5-cogito-14b")
    turns = (Message("user", "u"), Message("assistant", "one"), Message("user", "v"), Message("assistant", "two"))
    silent = (*turns[:1], Message("assistant", "one", weight=0), *turns[2:])
    decode = template.tokenizer.decode

    def trained(messages: tuple[Message, ...], loss_on: Any) -> tuple[str, frozenset[str]]:
        [row] = template.rows([conversation(*messages)], loss_on=loss_on)[0]
        return decode(row.input_ids[row.mask]), row.notes

    assert trained(turns, "assistant")[0] == "one<|im_end|>two<|im_end|>"
    assert trained(turns, "last_assistant")[0] == "two<|im_end|>"
    assert trained(silent, "assistant")[0] == "two<|im_end|>"
    whole = template.tokenizer.apply_chat_template([m.as_template_input() for m in turns], tokenize=False)
    assert trained(turns, "all")[0] == whole
    assert trained(silent, "all")[0] == whole.replace("one<|im_end|>", "")
    assert trained((*turns[:3], Message("assistant", "two", weight=0)), "last_assistant") == ("", {"no_trained_token"})
    assert trained(turns[:1], "assistant") == ("", {"no_trained_token"})


@needs_corpus
def test_plain_text() -> None:
    template = own_template("tinyllama-1.1b-chat")
    tokenizer = template.tokenizer
    text, control = Conversation(text="Once upon a time."), Conversation(text="Once </s> more")
    [[row], [marked]] = template.rows([text, control], loss_on="assistant")
    assert row.input_ids.tolist() == [*tokenizer("Once upon a time.").input_ids, tokenizer.eos_token_id]
    assert row.mask.tolist() == [False] + [True] * (len(row.mask) - 1)
    assert "control_tokens" in marked.notes
    assert (marked.input_ids == tokenizer.eos_token_id).sum() == 1


@needs_corpus
@pytest.mark.parametrize("folder", ["gpt2_no-template", "mpt-gpt-neox", "t5_wrong-task"])
def test_a_base_without_template_gets_the_default(folder: str) -> None:
    template = load_chat_template(copy.deepcopy(tokenizer_of(folder)), data="tools")
    assert template.is_default
    assert default_template.DEFAULT_TEMPLATE_NAME == "lora_tune plain"
    assert template.eos_id == template.tokenizer.eos_token_id
    kinds = marked_conversations()
    for row, rows in zip(kinds.values(), template.rows(list(kinds.values()), loss_on="assistant"), strict=True):
        assert isinstance(rows, list)
        if folder != "t5_wrong-task":  # this one cannot write a newline, so its decoded text tells nothing
            check_rows(template, row, rows)
        assert all(token_row.input_ids[token_row.mask][-1] == template.eos_id for token_row in rows)


@needs_corpus
def test_a_token_across_prompt_and_answer_is_split_as_serving_does() -> None:
    text = (
        "{% for m in messages %}{{ m.role | capitalize + ': ' + m.content }}"
        "{{ eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    )
    template = load_chat_template(tokenizer_for(None), template=text)
    turns = (Message("user", "u"), Message("assistant", "hello"))
    [row] = template.rows([conversation(*turns)], loss_on="assistant")[0]
    encode = template.tokenizer.encode
    assert row.notes == {"straddles"}
    assert row.input_ids.tolist() == encode("User: u\nAssistant: ") + encode("hello") + [template.eos_id]
    assert template.tokenizer.decode(row.input_ids[row.mask]) == "hello<|endoftext|>"
    rows = template.rows([conversation(*turns, *turns)], loss_on="assistant")[0]
    assert [token_row.notes for token_row in rows] == [{"straddles", "per_turn"}] * 2
    assert rows[1].input_ids[: int(np.argmax(rows[1].mask))].tolist() == template.prompt_ids((*turns, turns[0]))


@needs_corpus
def test_a_conversation_that_the_template_refuses_is_one_error() -> None:
    template = starting_with("gemma.jinja")
    good = conversation(Message("user", "u"), Message("assistant", "a"))
    bad = conversation(Message("user", "u"), Message("user", "v"), Message("assistant", "a"))
    system = conversation(Message("system", "s"), *good.messages)
    first, refused, refused_system, last = template.rows([good, bad, system, good], loss_on="assistant")
    assert isinstance(refused, RowError)
    assert "must alternate" in refused.reason
    assert isinstance(refused_system, RowError)
    assert isinstance(first, list)
    assert isinstance(last, list)
    assert first[0].input_ids.tolist() == last[0].input_ids.tolist()
    with pytest.raises(CheckFailed, match="must alternate"):
        template.prompt_ids(bad.messages)


@needs_corpus
@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("qwen3.jinja", "<think>\nwhy\n</think>\n\nanswer<|im_end|>"),
        ("qwen3_5_think.jinja", "why\n</think>\n\nanswer<|im_end|>"),
        ("deepseek_r1_distill.jinja", "why\n</think>\n\nanswer<｜end▁of▁sentence｜>"),
        ("nemotron_3_nano.jinja", "why\n</think>\nanswer<|im_end|>"),
    ],
)
def test_reasoning_is_trained_with_its_answer(name: str, trained: str) -> None:
    template = starting_with(name)
    turn = Message("assistant", "answer", reasoning="why")
    rows = template.rows([conversation(Message("user", "u"), turn, Message("user", "v"), turn)], loss_on="assistant")[0]
    assert isinstance(rows, list)
    assert [template.tokenizer.decode(row.input_ids[row.mask]) for row in rows] == [trained, trained]
    assert all("per_turn" in row.notes for row in rows)


@needs_corpus
def test_a_reasoning_block_within_the_words_keeps_its_tags() -> None:
    text = next(text for name, text in TEMPLATES.items() if name.startswith("qwen3.jinja"))
    tokenizer = tokenizer_for(text)
    tokenizer.add_tokens(["<think>", "</think>"])
    template = load_chat_template(tokenizer, template=text)
    row = conversation(
        Message("user", "what is <think>?"), Message("assistant", "<think>\nwhy\n</think>\n\nanswer <think>")
    )
    [token_row] = template.rows([row], loss_on="assistant")[0]
    tags = np.isin(token_row.input_ids, tokenizer.convert_tokens_to_ids(["<think>", "</think>"]))
    assert tags.sum() == 2
    assert tags[int(np.argmax(token_row.mask))]
    assert "control_tokens" in token_row.notes


class _Model:
    def __init__(self, eos: int | list[int] | None) -> None:
        self.config = type("Config", (), {"eos_token_id": 0, "pad_token_id": None, "bos_token_id": 5})()
        self.generation_config = type("Generation", (), {"eos_token_id": eos, "pad_token_id": None})()


@needs_corpus
def test_align_sets_eos_and_pad_everywhere() -> None:
    chatml = starting_with("qwen2_5.jinja").text
    tokenizer = tokenizer_for(chatml)
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"  # as the folders of Qwen's base models have it
    template = load_chat_template(tokenizer, template=chatml)
    end, text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert (template.eos_id, template.pad_id, template.stop_ids) == (end, text, (end, text))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (end, text)
    model = _Model(eos=[7, text])
    template.align(model)
    assert (model.config.eos_token_id, model.config.pad_token_id, model.config.bos_token_id) == (end, text, 5)
    assert model.generation_config.eos_token_id == [end, text, 7]
    assert model.generation_config.pad_token_id == text


@needs_corpus
def test_pad_is_not_the_end_token_where_another_is_free() -> None:
    tokenizer = tokenizer_for(None, "mpt-gpt-neox")
    assert tokenizer.convert_ids_to_tokens(load_chat_template(tokenizer).pad_id) == "<|padding|>"
    llama = tokenizer_for(None, "tinyllama-1.1b-chat")  # pad is eos in its folder
    assert llama.convert_ids_to_tokens(load_chat_template(llama).pad_id) == "<unk>"
    gpt2 = copy.deepcopy(tokenizer_of("gpt2_no-template"))
    template = load_chat_template(gpt2)
    assert template.pad_id == template.eos_id


@needs_corpus
def test_batches_and_named_templates() -> None:
    with_tools, plain = starting_with("qwen2_5.jinja").text, starting_with("lfm2_training").text
    tokenizer = tokenizer_for(with_tools)
    tokenizer.chat_template = {"default": plain, "tool_use": with_tools}
    template = load_chat_template(tokenizer)
    kinds = list(marked_conversations().values())
    many = [kinds[i % len(kinds)] for i in range(600)]
    together = template.rows(many, loss_on="assistant")
    for i in (0, 1, 2, 3, 255, 256, 599):
        alone = template.rows([many[i]], loss_on="assistant")[0]
        assert [row.input_ids.tolist() for row in together[i]] == [row.input_ids.tolist() for row in alone]
        check_rows(template, many[i], together[i])
    assert template.text == plain
    assert template.sha256 != hashlib.sha256(plain.encode()).hexdigest()
    tokenizer.chat_template = {"tool_use": with_tools}
    with pytest.raises(CheckFailed, match="default"):
        load_chat_template(tokenizer)


def test_tiny_base(tiny_base: Path) -> None:
    """The whole journey without the corpus: rows, prompt, answer, sha256."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    template = load_chat_template(tokenizer)
    row = marked_conversations()["two"]
    [token_row] = template.rows([row], loss_on="assistant")[0]
    check_rows(template, row, [token_row])
    assert template.sha256 == hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    assert not template.is_default
    assert template.notices == ()
    assert template.decode_answer([*tokenizer.encode("Ja."), template.eos_id, 7, 8]) == "Ja."

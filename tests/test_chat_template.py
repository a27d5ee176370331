"""Tokens and loss mask by the base's own chat template, for all templates of TRL and of the corpus."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import re
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import mask_oracle
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lora_tune.data import chat_template, default_template
from lora_tune.data.chat_template import ChatTemplate, RowError, TokenRow, load_chat_template
from lora_tune.data.conversation import Conversation, Message
from lora_tune.data.template_check import probe_template
from lora_tune.errors import CheckFailed

CORPUS = Path(os.environ.get("LORA_TUNE_CORPUS") or "/nonexistent")
TRL = importlib.util.find_spec("trl")
needs_corpus = pytest.mark.skipif(not CORPUS.is_dir(), reason="LORA_TUNE_CORPUS does not name the corpus folder")
SPECIAL = re.compile(
    r"<[|｜][^<>\s'\"{}]*[|｜]>|<(?:start|end)_of_[a-z]+>|<end_of_utterance>|<turn\|>|<\|turn>|</?s>|\[/?INST\]"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "zq_weather",
            "description": "The weather of a place",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string", "description": "where"}},
                "required": ["place"],
            },
        },
    }
]


def _all_templates() -> dict[str, str]:
    """Every distinct template of the installed TRL and of the corpus, by name."""
    files = sorted((Path(TRL.origin).parent / "chat_templates").glob("*.jinja")) if TRL and TRL.origin else []
    if CORPUS.is_dir():
        files += sorted((CORPUS / "data/chat_templates").iterdir())
    found: dict[str, tuple[str, str]] = {}
    for file in files:
        text = file.read_text(encoding="utf-8")
        text = json.loads(text)["chat_template"] if file.suffix == ".json" else text
        found.setdefault(hashlib.sha256(text.encode()).hexdigest(), (file.name, text))
    return {f"{name}:{digest[:4]}": text for digest, (name, text) in found.items()}


TEMPLATES = _all_templates()


@lru_cache
def tokenizer_of(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(CORPUS / "data/tokenizers" / folder)


def tokenizer_for(text: str | None, folder: str = "gpt2_no-template") -> Any:
    """A copy of a real tokenizer in which the special tokens of a template are special tokens."""
    tokenizer = copy.deepcopy(tokenizer_of(folder))
    if text is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": sorted({*SPECIAL.findall(text), "<s>"})})
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "bos_token": "<s>"})
    return tokenizer


def conversation(*messages: Message, tools: tuple = ()) -> Conversation:
    return Conversation(messages=messages, tools=tools, source=1, file="data.jsonl", line=7)


def marked_conversations() -> dict[str, Conversation]:
    """Conversations whose contents are unique words, for the oracle."""
    user, answer = (
        [Message("user", mask_oracle.marker(i)) for i in (1, 2)],
        [Message("assistant", mask_oracle.marker(i) + " x.\n\nY " + mask_oracle.marker(i + 1)) for i in (10, 20)],
    )
    system = Message("system", mask_oracle.marker(3))
    call = {
        "type": "function",
        "id": "call00001",
        "function": {"name": "zq_weather", "arguments": {"place": mask_oracle.marker(30)}},
    }
    called = Message("assistant", "", tool_calls=(call,))
    result = Message("tool", mask_oracle.marker(31), name="zq_weather", tool_call_id="call00001")
    return {
        "one": conversation(user[0], answer[0]),
        "two": conversation(user[0], answer[0], user[1], answer[1]),
        "system": conversation(system, user[0], answer[0], user[1], answer[1]),
        "tools": conversation(user[0], called, result, answer[0], tools=tuple(TOOLS)),
    }


def reference_messages(template: ChatTemplate, row: Conversation) -> list[dict[str, Any]]:
    """The messages as the template reads them (a few take contents as lists of parts, or arguments as text)."""
    probe = template._drafter._probe
    messages = [message.as_template_input() for message in row.messages]
    for message in messages:
        if probe.content_as_parts:
            message["content"] = [{"type": "text", "text": message["content"]}]
        if probe.arguments_as_text and "tool_calls" in message:
            message["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
    return messages


def reference_ids(template: ChatTemplate, row: Conversation, turns: int | None = None, **more: Any) -> list[int]:
    messages = reference_messages(template, row)[:turns]
    return template.tokenizer.apply_chat_template(messages, tools=list(row.tools) or None, return_dict=False, **more)


def check_rows(template: ChatTemplate, row: Conversation, rows: list[TokenRow]) -> None:
    """Equality with the reference, the prefix property, exactness of the mask, something to train."""
    turns = [i for i, message in enumerate(row.messages) if message.role == "assistant"]
    for token_row in rows:
        assert token_row.input_ids.dtype == np.int32
        assert token_row.mask.dtype == bool
        assert len(token_row.mask) == len(token_row.input_ids)
        assert (token_row.source, token_row.file, token_row.line) == (1, "data.jsonl", 7)
        assert token_row.mask.any()
        assert token_row.notes <= set(chat_template.NOTES)
    if "per_turn" in rows[0].notes:
        assert len(rows) == len(turns)
        starts = [
            (turn, token_row, int(np.argmax(token_row.mask))) for turn, token_row in zip(turns, rows, strict=True)
        ]
    else:
        assert len(rows) == 1
        firsts = np.flatnonzero(np.diff(np.concatenate(([0], rows[0].mask.astype(np.int8)))) == 1)
        starts = [(turn, rows[0], int(first)) for turn, first in zip(turns, firsts, strict=True)]
        if "straddles" not in rows[0].notes:
            want = reference_ids(template, row)
            got = rows[0].input_ids.tolist()
            if template._end.mode == "rendered":
                assert got == want
            else:  # nothing ends the turn: one token comes after the render without its trailing white space
                assert got[-1] == template.eos_id
                assert want[: len(got) - 1] == got[:-1]
    for turn, token_row, first in starts:
        before = token_row.input_ids[:first].tolist()
        assert before == template.prompt_ids(row.messages[:turn], tools=row.tools)
        assert before == reference_ids(template, row, turn, add_generation_prompt=True)
    pairs = [(token_row.input_ids, token_row.mask) for token_row in rows]
    tools = list(row.tools) or None
    assert not mask_oracle.complaints(template.tokenizer, reference_messages(template, row), pairs, tools=tools)


@lru_cache
def loaded(name: str) -> ChatTemplate:
    """The template of that name with a tokenizer that has its special tokens."""
    by_sentencepiece = re.match(r"llama-2|mistral|vicuna|phi|gemma|zephyr|llava|hf_", name)
    folder = "tinyllama-1.1b-chat" if by_sentencepiece else "gpt2_no-template"
    return load_chat_template(tokenizer_for(TEMPLATES[name], folder), template=TEMPLATES[name])


def starting_with(name: str) -> ChatTemplate:
    return loaded(next(other for other in TEMPLATES if other.startswith(name)))


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


REFUSED: dict[str, str] = {}  # none of TRL's and the corpus's templates, as long as the data has no tools


@needs_corpus
def test_which_templates_are_refused() -> None:
    refused = {}
    for name in TEMPLATES:
        try:
            loaded(name)
        except CheckFailed as error:
            refused[name] = str(error)
    assert refused == REFUSED
    families = ("llama3_1", "llama3_2", "chatml", "qwen2_5", "qwen3", "gemma", "mistral", "phi", "llama-2", "vicuna")
    assert all(any(name.startswith(family) for name in TEMPLATES) for family in families)


DROPS = {  # what these templates leave out without a word, where the data has tools
    "deepseek_r1_distill": "drops tool_calls and tools",
    "deepseekv3": "drops tools",
    "granite-3.0-instruct": "drops tool and tool_calls",
    "hf_tinyllama_zephyr": "drops tool and tool_calls and tools",
    "idefics3": "drops tool_calls and tools",
    "lfm2": "drops tool_calls",
    "llama3": "drops tool_calls and tools",
    "phi3": "drops tool and tool_calls and tools",
    "phi3_5": "drops tool and tool_calls and tools",
    "qwen2_5_vl": "drops tool_calls and tools",
    "smolvlm": "drops tool_calls and tools",
}
FAILS = [  # these refuse the order of roles that a tool call needs
    "alpaca",
    "amberchat",
    "chatml",
    "chatqa",
    "cohere",
    "cohere2",
    "falcon-instruct",
    "gemma",
    "gemma-it",
    "gemma3",
    "llama-2-chat",
    "llama-3-instruct",
    "llava_next",
    "mistral-instruct",
    "openchat-3.5",
    "phi-3",
    "phi-3-small",
    "saiga",
    "solar-instruct",
    "vicuna",
    "zephyr",
]


@needs_corpus
def test_templates_without_tools_are_refused_where_the_data_has_tools() -> None:
    expected = DROPS | dict.fromkeys(FAILS, "fails with tools")
    found = {}
    for name in TEMPLATES:
        probe = loaded(name)._drafter._probe
        lost = sorted(probe.drops & {"tools", "tool_calls", "tool"})
        if probe.tools_error or lost:
            reason = "fails with tools" if probe.tools_error else f"drops {' and '.join(lost)}"
            found[re.sub(r"(_training)?\.jinja:.*", "", name)] = reason
    assert found == expected
    for name in ("phi3", "gemma3", "llama3"):
        tokenizer = copy.deepcopy(starting_with(f"{name}.jinja").tokenizer)
        with pytest.raises(CheckFailed, match=f"{found[name]}.*, but the data has tools; use another template"):
            load_chat_template(tokenizer, tools=True)


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


def _hostile_cases() -> list[dict[str, Any]]:
    file = CORPUS / "cases/templates/expected.json"
    return json.loads(file.read_text(encoding="utf-8"))["cases"] if file.is_file() else []


@needs_corpus
@pytest.mark.parametrize("case", _hostile_cases(), ids=lambda case: case["file"])
def test_hostile_templates(case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stored = CORPUS / "cases/templates" / case["file"]
    text = case["unit"] * case["times"] if "unit" in case else stored.read_text(encoding="utf-8")
    started = time.perf_counter()
    try:
        probe = probe_template(text, variables={"bos_token": "<s>", "eos_token": "</s>"}, where="base.chat_template")
    except CheckFailed as error:
        assert "refuse" in (case["verdict"], case.get("or"))
        assert "\n" not in str(error)
        assert str(error).startswith("base.chat_template: the chat template is refused: ")
        if "internals" in case["reason"]:
            assert "internals" in str(error)
        if "syntax" in case["reason"]:
            assert "line 1" in str(error)
    else:
        assert case["verdict"] in ("accept", "warn")
        assert bool(probe.notices) == (case["verdict"] == "warn")
    assert time.perf_counter() - started < 8  # 1 s of CPU time, on a machine that may be busy
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "adds nothing"),
        ("{% for m in messages[-2:] %}<{{ m.role }}>{{ m.content }}{% endfor %}", "user's words"),
        ("{% for m in messages | reverse %}<{{ m.role }}>{{ m.content }}{% endfor %}", "assistant's words"),
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ 'x' * 2000000 }}",
            "more than 1,048,576 bytes",
        ),
        (
            "{% for m in messages %}[{{ m.role }}{{ m.content }}]{% endfor %}{{ 'END' if add_generation_prompt }}",
            "ends in",
        ),
    ],
)
def test_unusable_templates_are_named(text: str, reason: str) -> None:
    with pytest.raises(CheckFailed, match=reason):
        probe_template(text, variables={}, where="base.chat_template")


REAL = ("tinyllama-1.1b-chat", "phi-3-mini", "qwen2.5-cogito-14b", "qwen2.5-7b-unsloth_vision-pad")


@needs_corpus
@pytest.mark.parametrize("folder", REAL)
def test_real_tokenizers_with_their_own_template(folder: str) -> None:
    template = load_chat_template(tokenizer_for(None, folder))
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
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(user=CONTENTS, answer=CONTENTS, again=CONTENTS)
def test_words_never_become_control_tokens(folder: str, user: str, answer: str, again: str) -> None:
    template = _own_template(folder)
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


@lru_cache
def _own_template(folder: str) -> ChatTemplate:
    return load_chat_template(tokenizer_for(None, folder))


@needs_corpus
def test_control_tokens_in_tools_and_calls() -> None:
    template = _own_template("qwen2.5-cogito-14b")
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
    template = _own_template("qwen2.5-cogito-14b")
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
    template = _own_template("tinyllama-1.1b-chat")
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
    template = load_chat_template(copy.deepcopy(tokenizer_of(folder)), tools=True)
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
        "{{ eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
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
def test_a_template_that_drops_what_a_row_has_refuses_the_row() -> None:
    text = "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    template = load_chat_template(tokenizer_for(None), template=text)
    turns = (Message("user", "u"), Message("assistant", "a"))
    rows = [
        conversation(Message("system", "s"), *turns),
        conversation(turns[0], Message("assistant", "a", reasoning="because")),
        conversation(*turns, tools=tuple(TOOLS)),
    ]
    reasons = [entry.reason for entry in template.rows(rows, loss_on="assistant") if isinstance(entry, RowError)]
    assert [reason.rpartition("drops ")[2] for reason in reasons] == [
        "the system turn without a word",
        "the reasoning of answers without a word",
        "the tools without a word",
    ]


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
    tokenizer = tokenizer_for(None, "qwen2.5-cogito-14b")
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"  # as the folders of Qwen's base models have it
    template = load_chat_template(tokenizer)
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
    tokenizer = tokenizer_for(None, "qwen2.5-cogito-14b")
    with_tools = tokenizer.chat_template
    plain = next(text for name, text in TEMPLATES.items() if name.startswith("lfm2_training"))
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

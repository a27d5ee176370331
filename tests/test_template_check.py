"""Which chat templates are refused, by which reason, and that a hostile one harms nobody."""

from __future__ import annotations

import copy
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from chat_template_cases import (
    CORPUS,
    TEMPLATES,
    TOOLS,
    conversation,
    loaded,
    needs_corpus,
    starting_with,
    tokenizer_for,
)

from lora_tune.data.chat_template import RowError, load_chat_template
from lora_tune.data.conversation import Message
from lora_tune.data.template_check import probe_template
from lora_tune.errors import CheckFailed

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
            load_chat_template(tokenizer, data="tools")


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

"""The server through the official client; tool calls of real templates; what the checks themselves find."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from http_kit import Running, Scripted, serving
from hypothesis import given
from hypothesis import strategies as st

from lora_tune import cli
from lora_tune.data.chat_template import ChatTemplate, load_chat_template
from lora_tune.data.conversation import Message
from lora_tune.model.source import find_base, load_tokenizer
from lora_tune.recipe import Base
from lora_tune.serving.conformance import CHECKS, app, run_conformance
from lora_tune.serving.engine import Limits
from lora_tune.serving.local import LocalBackend
from lora_tune.serving.settings import ServeSettings
from lora_tune.serving.tool_format import tool_format
from lora_tune.terminal import run_app

EXAMPLE = Path(__file__).resolve().parent.parent / "adapters" / "example"
QUICKSTART = "builtin:quickstart"
TOKEN = "conformance-token-0"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
    for name in ("get_weather", "get_time")
]
ASK: Any = [{"role": "user", "content": "What is it like in Oslo?"}]
CALLS: list[tuple[str, dict[str, Any]]] = [("get_weather", {"city": "Oslo", "days": 2}), ("get_time", {"city": "Rome"})]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """The embedded base with the example adapter, behind a token."""
    section = Base.model_validate({"name": QUICKSTART, "quantize": "none", "compute_dtype": "float32"})
    backend = LocalBackend.start(section, adapters={"example": EXAMPLE}, limits=Limits(rows=16))
    with serving(backend, ServeSettings(token=TOKEN)) as (running,):
        yield running


def test_every_check_passes(server: Running) -> None:
    found = run_conformance(server.url, token=TOKEN, model="example")
    assert [check.name for check in found] == list(CHECKS)
    assert [check for check in found if check.outcome != "passed"] == []


def test_the_base_answers_beside_its_adapter(server: Running) -> None:
    found = run_conformance(server.url, token=TOKEN, model=QUICKSTART, only=["a chat is answered", "models are listed"])
    assert [check.outcome for check in found] == ["passed", "passed"]
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0)
    base, adapter = client.models.list().data
    assert (base.id, adapter.id, adapter.model_dump()["parent"]) == (QUICKSTART, "example", QUICKSTART)
    assert client.models.retrieve(QUICKSTART).id == QUICKSTART


def test_the_checks_fail_where_an_engine_is_wrong(tiny_base: Path) -> None:
    """An engine that ignores what it is asked, and says the same to everything."""
    chat = load_chat_template(load_tokenizer(find_base(Base.model_validate({"name": str(tiny_base)}))))
    with serving(Scripted(chat, "a fixed answer, whatever is asked"), ServeSettings()) as (running,):
        found = {check.name: check for check in run_conformance(running.url, token=None, model="scripted")}
        assert found["a stream says the same"].outcome == "passed"
        assert found["tools"].outcome == "not offered"  # this template drops them
        for name in ("a chat is answered", "max_completion_tokens", "logprobs", "stop", "response_format json_object"):
            assert found[name].outcome == "failed", name
        assert run_app(app, name="conformance", arguments=[running.url, "--model", "scripted"]) == 1


def test_conformance_without_a_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, name="conformance", arguments=["http://127.0.0.1:9", "--model", "x"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


# ----- tool calls -----
def template(text: str) -> ChatTemplate:
    """A template on the tokenizer of the embedded base."""
    tokenizer = load_tokenizer(find_base(Base.model_validate({"name": QUICKSTART})))
    return load_chat_template(tokenizer, template=text)


HEAD = (
    "{%- if tools -%}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{%- endif -%}"
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
)
TAIL = "<|im_end|>\n{% endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
FORMS = {
    "a list": "{%- if m.tool_calls -%}[TOOL_CALLS] [{%- for c in m.tool_calls -%}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{{ ', ' if not loop.last }}{%- endfor -%}]{%- endif -%}",
    "bare JSON": "{%- if m.tool_calls -%}{%- for c in m.tool_calls -%}{{ '; ' if not loop.first }}"
    '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{%- endfor -%}{%- endif -%}',
    "nested": "{%- for c in m.tool_calls or [] -%}<call>{{ c | tojson }}</call>{%- endfor -%}",
    "named": "{%- if m.tool_calls -%}<calls>{%- for c in m.tool_calls -%}<call>{{ c.function.name }}\n```json\n"
    "{{ c.function.arguments | tojson }}\n```</call>{%- endfor -%}</calls>{%- endif -%}",
    "fields": "{%- for c in m.tool_calls or [] -%}\n<call>\n<function={{ c.function.name }}>\n"
    "{%- for k, v in c.function.arguments.items() -%}<parameter={{ k }}>\n{{ v if v is string else v | tojson }}\n"
    "</parameter>\n{%- endfor -%}</function>\n</call>{%- endfor -%}",
}


def written(chat: ChatTemplate, calls: list[tuple[str, dict[str, Any]]], content: str = "") -> str:
    """What the template writes for an assistant's turn with these calls, as a model would have to answer."""
    made = tuple({"type": "function", "id": "call_1234", "function": {"name": n, "arguments": a}} for n, a in calls)
    turns = [Message("user", "q"), Message("assistant", content, tool_calls=made)]
    whole, prompt = (
        chat.tokenizer.decode(ids)
        for ids in (
            chat.prompt_ids([*turns, Message("user", "q")], tools=TOOLS),
            chat.prompt_ids(turns[:1], tools=TOOLS),
        )
    )
    return str(whole)[len(prompt) :].partition("<|im_end|>")[0]


@pytest.mark.parametrize("form", FORMS)
def test_calls_are_read_back_in_every_form(form: str) -> None:
    chat = template(HEAD + FORMS[form] + TAIL)
    found = tool_format(chat)
    assert found is not None
    assert found.parse(written(chat, CALLS), tools=TOOLS) == ("", CALLS)
    assert found.parse(written(chat, CALLS[:1], "Let me see."), tools=TOOLS) in (
        ("Let me see.", CALLS[:1]),
        ("Let me see." + written(chat, CALLS[:1]), []),  # bare JSON is a call only where nothing stands before it
    )
    cut = written(chat, CALLS[:1])[:-12]
    assert found.parse(cut, tools=TOOLS)[1] in ([], CALLS[:1])
    for text in ("It rains.", "", "{", "[", '{"city": "Oslo"}', "<call>", "[TOOL_CALLS]"):
        assert found.parse(text, tools=TOOLS) == (text, [])


def test_a_template_without_calls_has_no_form(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(find_base(Base.model_validate({"name": str(tiny_base)})))
    assert tool_format(load_chat_template(tokenizer)) is None


@given(st.text(max_size=80))
def test_no_answer_breaks_the_reader(text: str) -> None:
    for found in _forms():
        said, calls = found.parse(found.opener + text, tools=TOOLS)
        assert calls or said == found.opener + text


def _forms(known: list[Any] = []) -> list[Any]:  # noqa: B006  (made once)
    if not known:
        known += [tool_format(template(HEAD + form + TAIL)) for form in FORMS.values()]
    return known


@pytest.mark.parametrize("form", ["a list", "named", "fields", "bare JSON"])
@pytest.mark.parametrize("stream", [True, False])
def test_calls_reach_the_client(form: str, stream: bool) -> None:
    chat = template(HEAD + FORMS[form] + TAIL)
    said = "" if form == "bare JSON" else "Let me see."
    backend = Scripted(chat, said + written(chat, CALLS))
    with serving(backend, ServeSettings()) as (running,):
        client: Any = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        asked = {"model": "scripted", "messages": ASK, "tools": TOOLS}
        if stream:
            with client.chat.completions.stream(**asked) as events:
                choice = events.get_final_completion().choices[0]
        else:
            choice = client.chat.completions.create(**asked).choices[0]
        plain = client.chat.completions.create(**asked, tool_choice="none").choices[0]
    names = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert choice.finish_reason == "tool_calls"
    assert names == [("get_weather", '{"city": "Oslo", "days": 2}'), ("get_time", '{"city": "Rome"}')]
    assert (choice.message.content or "").strip() == said
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert plain.message.tool_calls is None and plain.finish_reason == "stop"


def test_a_forced_call_begins_in_the_prompt() -> None:
    chat = template(HEAD + FORMS["nested"] + TAIL)
    rest = ' {"city": "Oslo"}}}</call>'
    backend = Scripted(chat, rest)
    with serving(backend, ServeSettings()) as (running,):
        asked = {"model": "scripted", "messages": ASK, "tools": TOOLS}
        choice = {"type": "function", "function": {"name": "get_time"}}
        found = running.ask("/v1/chat/completions", {**asked, "tool_choice": choice}).json["choices"][0]
        auto = running.ask("/v1/chat/completions", asked).json["choices"][0]
    call = found["message"]["tool_calls"][0]["function"]
    assert (call["name"], call["arguments"], found["finish_reason"]) == ("get_time", '{"city": "Oslo"}', "tool_calls")
    assert "tool_calls" not in auto["message"] and auto["message"]["content"] == rest
    forced, free = (chat.tokenizer.decode(one.prompt_ids) for one in backend.asked)
    assert forced.startswith(free) and "get_time" in forced[len(free) :]


def test_the_verb_is_in_the_table() -> None:
    assert cli.COMMANDS["serve"][0] == "lora_tune.serve"

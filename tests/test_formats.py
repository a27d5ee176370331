"""Every data format: what a row becomes, what is refused and how it is said."""

from __future__ import annotations

import json

import pytest

from lora_tune.data.detect import chosen
from lora_tune.data.formats import FIELDS, FORMATS, NEEDED, check_columns, fields_of
from lora_tune.data.messages import order_notes
from lora_tune.data.rows import BadRow

CALL = {"name": "add", "arguments": {"a": 1}}
TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": TOOL}


def read(name, row, columns=None):
    fields = fields_of(name, columns)
    check_columns(row, name, fields)
    return FORMATS[name](row, fields)


def turns(conversation):
    return [(message.role, message.content) for message in conversation.messages]


def answered(**answer):
    return {"messages": [*chat(("user", "a")), {"role": "assistant", **answer}]}


def calling(function):
    return answered(tool_calls=[{"function": function}])


def chat(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


GOOD = {
    "alpaca": ({"instruction": "Add", "input": "1 2", "output": "3"}, [("user", "Add\n\n1 2"), ("assistant", "3")]),
    "alpaca, empty input": ({"instruction": "Hi", "input": "", "output": "Ho"}, [("user", "Hi"), ("assistant", "Ho")]),
    "alpaca, no input": ({"instruction": "Hi", "output": "Ho"}, [("user", "Hi"), ("assistant", "Ho")]),
    "alpaca, system and history": (
        {"instruction": "c", "input": None, "output": "d", "system": "s", "history": [["a", "b"]]},
        [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
    ),
    "messages": ({"messages": chat(("user", "a"), ("assistant", "b"))}, [("user", "a"), ("assistant", "b")]),
    "messages, text parts": (
        {
            "messages": chat(
                ("user", [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]), ("assistant", "c")
            )
        },
        [("user", "ab"), ("assistant", "c")],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        [("system", "s"), ("user", "a"), ("assistant", "b")],
    ),
    "sharegpt, role and content": (
        {"conversations": chat(("human", "a"), ("assistant", "b"))},
        [("user", "a"), ("assistant", "b")],
    ),
    "prompt_completion": ({"prompt": "a", "completion": " b"}, [("user", "a"), ("assistant", " b")]),
    "prompt_completion, messages": (
        {"prompt": chat(("system", "s"), ("user", "a")), "completion": chat(("assistant", "b"))},
        [("system", "s"), ("user", "a"), ("assistant", "b")],
    ),
    "table": ({"prompt": 1, "completion": 2.5, "system": "s"}, [("system", "s"), ("user", "1"), ("assistant", "2.5")]),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_row_becomes_turns(name):
    row, expected = GOOD[name]
    assert turns(read(name.split(",")[0], row)) == expected


def test_text_is_a_conversation_without_turns():
    assert read("text", {"text": "abc"}).text == "abc"


@pytest.mark.parametrize("name", FORMATS)
def test_columns_rename_every_field(name):
    row = {
        "alpaca": {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["x", "y"]]},
        "messages": {"messages": chat(("user", "a"), ("assistant", "b")), "tools": [TOOL]},
        "sharegpt": {"conversations": [{"from": "gpt", "value": "b"}], "system": "s", "tools": [TOOL]},
        "prompt_completion": {"prompt": "a", "completion": "b", "system": "s"},
        "text": {"text": "a"},
        "table": {"prompt": "a", "completion": "b", "system": "s", "input": "i"},
        "sni": {"definition": "d", "input": "i", "output": ["a", "b"], "task": "t", "category": "c"},
    }[name]
    columns = {field: f"my {field}" for field in FIELDS[name]}
    assert read(name, {columns[field]: value for field, value in row.items()}, columns) == read(name, row)
    with pytest.raises(BadRow, match="missing"):
        read(name, row, columns)


@pytest.mark.parametrize("given", [[TOOL], [WRAPPED], json.dumps([TOOL]), [{"type": "function", "function": WRAPPED}]])
def test_tools_in_any_known_form_become_openais(given):
    row = {"messages": chat(("user", "a"), ("assistant", "b")), "tools": given}
    assert read("messages", row).tools == (WRAPPED,)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"role": "assistant", "content": None, "function_call": CALL},
        {"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 1}}'}]},
    ],
)
def test_tool_calls_in_any_known_form_become_openais_with_an_object(turn):
    message = read("messages", {"messages": [*chat(("user", "a")), turn]}).messages[1]
    assert message.content == "" and message.tool_calls == ({"type": "function", "function": CALL},)


def test_sharegpt_calls_and_observations():
    rows = [
        ("human", "1+2?"),
        ("function_call", '{"name": "add", "arguments": {"a": 1}}'),
        ("observation", "3"),
        ("gpt", "3"),
    ]
    found = read("sharegpt", {"conversations": [{"from": role, "value": value} for role, value in rows]})
    assert [message.role for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1].tool_calls == ({"type": "function", "function": CALL},)
    assert order_notes(found.messages) == ()


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_reasoning_is_kept_apart_from_the_answer(key):
    found = read("messages", {"messages": [*chat(("user", "a")), {"role": "assistant", "content": "b", key: "hm"}]})
    assert found.messages[1].reasoning == "hm"


@pytest.mark.parametrize(("key", "value"), [("weight", 0), ("loss_weight", 0.0)])
def test_weight_zero_is_kept(key, value):
    answers = [{"role": "assistant", "content": "b", key: value}, {"role": "assistant", "content": "c"}]
    assert [m.weight for m in read("messages", {"messages": [*chat(("user", "a")), *answers]}).messages] == [1, 0, 1]


BAD = [
    ("messages", answered(role="Assistant", content="b"), "unknown role `Assistant`", "did you mean `assistant`"),
    ("messages", answered(role="asistant", content="b"), "unknown role `asistant`", "did you mean `assistant`"),
    ("messages", answered(role="bot", content="b"), "unknown role `bot`", "say `assistant`"),
    ("messages", answered(role="human", content="b"), "unknown role `human`", "format: sharegpt"),
    ("messages", answered(role=3, content="b"), "role must be text, got the number 3", "use one of"),
    (
        "messages",
        {"messages": [{"rolle": "user", "content": "a"}]},
        "role is missing",
        "did you mean `role` by `rolle`",
    ),
    ("messages", {"messages": ["hi"]}, "turn 1 must be an object", ""),
    ("messages", answered(content=True), "content must be text, got true", ""),
    ("messages", answered(content="b", name=5), "name must be text, got the number 5", ""),
    ("messages", answered(content=[{"type": "image", "image": "x"}]), "only text can be trained", "drop"),
    ("messages", answered(content=["a", 5]), "text parts, got a part", ""),
    ("messages", answered(content="b", weight=2), "weight must be 0 or 1", ""),
    ("messages", answered(content="b", weight=0), "weight 0", "drop"),
    ("messages", answered(role="user", content="", tool_calls=[CALL]), "only the assistant calls tools", ""),
    ("messages", calling({"name": "f", "arguments": "{"}), "arguments of `f` must be JSON", ""),
    ("messages", calling({"name": "f", "arguments": [1]}), "must be an object, got a list", ""),
    ("messages", calling({}), "needs a name", ""),
    ("messages", {**answered(content="b"), "tools": {"name": "f"}}, "tools must be a list", ""),
    ("messages", {**answered(content="b"), "tools": [{}]}, "tool 1 needs a name", ""),
    ("messages", {**answered(content="b"), "images": ["x.png"]}, "holds media", "drop"),
    ("messages", {"conversations": []}, "`messages` is missing, got `conversations`", "format: sharegpt"),
    ("messages", {}, "the row is empty", "delete"),
    (
        "sharegpt",
        {"conversations": [{"from": "Customer", "value": "a"}]},
        "unknown role `Customer`",
        "use one of human",
    ),
    ("sharegpt", {"conversations": [{"from": "Human", "value": "a"}]}, "unknown role `Human`", "did you mean `human`"),
    ("sharegpt", {"conversations": [{"from": "gpt", "val": "a"}]}, "value is missing", "did you mean `value` by `val`"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "add(1)"}]}, "must be JSON", ""),
    (
        "sharegpt",
        {"conversations": [{"form": "gpt", "value": "b"}]},
        "from is missing",
        "did you mean `from` by `form`",
    ),
    ("sharegpt", {"conversations": ["a"]}, "turn 1 must be an object with from and value", ""),
    ("alpaca", {"instruction": "a", "output": ""}, "empty answer", "write the answer"),
    ("alpaca", {"instruction": "a", "output": "b", "input": 4}, "`input` must be text, got the number 4", ""),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["a"]]}, "history 1 must be a pair", ""),
    ("alpaca", {"instruction": "a", "outputs": "b"}, "`output` is missing", "did you mean `output`"),
    ("prompt_completion", {"prompt": ["a"], "completion": ["b"]}, "turn 1 must be an object", ""),
    ("prompt_completion", {"prompt": "a", "completion": "\n"}, "blank answer", ""),
    ("table", {"prompt": "a", "completion": None}, "`completion` is null", ""),
    ("table", {"prompt": True, "completion": "b"}, "`prompt` must be text, got true", ""),
    ("text", {"text": " \n"}, "`text` is blank", ""),
]


@pytest.mark.parametrize(("name", "row", "reason", "fix"), BAD, ids=[f"{b[0]}: {b[2]}" for b in BAD])
def test_a_bad_row_says_why_and_what_to_do(name, row, reason, fix):
    with pytest.raises(BadRow) as caught:
        read(name, row)
    assert reason in caught.value.reason and fix in caught.value.fix


@pytest.mark.parametrize(
    ("roles", "note"),
    [
        ("ua", None),
        ("sua", None),
        ("uaua", None),
        ("aua", "starts with the assistant"),
        ("uua", "two user turns in a row"),
        ("uaa", "two assistant turns in a row"),
        ("usa", "system turn in the middle"),
        ("uau", "the last user turn has no answer"),
        ("uta", "tool result without a tool call"),
    ],
)
def test_odd_orders_of_turns_are_noted(roles, note):
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    found = read("messages", {"messages": chat(*((names[role], "x") for role in roles))})
    assert order_notes(found.messages) == ((note,) if note else ())


AUTO = [
    ({"instruction": "", "input": "", "output": ""}, "alpaca", {"output": "output", "input": "input"}),
    ({"instruction": "", "context": "", "response": ""}, "alpaca", {"output": "response", "input": "context"}),
    ({"messages": chat(("user", "a"))}, "messages", {"messages": "messages"}),
    ({"conversations": [{"from": "human", "value": ""}]}, "sharegpt", {"conversations": "conversations"}),
    ({"conversations": chat(("user", "a"))}, "sharegpt", {"conversations": "conversations"}),
    ({"dialogue": [{"from": "human", "value": ""}]}, "sharegpt", {"conversations": "dialogue"}),
    ({"prompt": "", "completion": ""}, "prompt_completion", {"prompt": "prompt", "completion": "completion"}),
    ({"inputs": "", "targets": ""}, "prompt_completion", {"prompt": "inputs", "completion": "targets"}),
    ({"question": "", "answer": ""}, "prompt_completion", {"prompt": "question", "completion": "answer"}),
    ({"input": "", "output": "", "source": ""}, "prompt_completion", {"prompt": "input", "completion": "output"}),
    ({"text": "", "id": 1}, "text", {"text": "text"}),
]


@pytest.mark.parametrize(("row", "name", "fields"), AUTO, ids=[" ".join(row[0]) for row in AUTO])
def test_auto_takes_the_format_and_says_why(row, name, fields):
    found = chosen("auto", None, [row])
    assert found.format == name and fields.items() <= found.fields.items()
    assert found.why and any(column in found.why for column in row)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "", "chosen": "", "rejected": ""}, "preference pairs"),
        ({"messages": chat(("user", "a")), "label": False}, "preference labels"),
        ({"Definition": "", "Instances": []}, "Super-NaturalInstructions"),
        ({"instruction": "", "instances": []}, "self-instruct"),
        ({"a": 1, "b": 2}, "no format fits the columns `a`, `b`"),
        ({}, "(none)"),
    ],
)
def test_auto_refuses_what_it_does_not_know(row, words):
    with pytest.raises(BadRow) as caught:
        chosen("auto", None, [row])
    assert words in caught.value.reason and caught.value.fix


def test_auto_with_columns_takes_the_format_that_has_those_fields():
    row = {"q": "a", "a": "b", "s": "c"}
    found = chosen("auto", {"prompt": "q", "completion": "a", "system": "s"}, [row])
    assert (found.format, found.fields["system"]) == ("prompt_completion", "s")
    assert chosen("auto", {"text": "q"}, [row]).format == "text"
    assert chosen("auto", {"prompt": "q", "completion": "a", "input": "s"}, [row]).format == "table"


def test_every_format_stands_in_the_three_tables():
    assert FORMATS.keys() == FIELDS.keys() == NEEDED.keys()

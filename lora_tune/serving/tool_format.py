"""How a chat template writes tool calls, found out by rendering marked ones; and calls read back from an answer.

No list of known templates is involved: the template renders an assistant's turn with one and with two calls of marked
names and arguments, through the same function as training, and what stands around the marks is the format. A format is
used only if it reads its own renders back. Where none can be told, or an answer does not follow it, calls stay text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lora_tune.data.conversation import Conversation, Message
from lora_tune.serving.settings import TOOL_NAME

if TYPE_CHECKING:
    from lora_tune.data.chat_template import ChatTemplate

Call = tuple[str, dict[str, Any]]
"""Name and arguments."""
_FIRST: Call = ("zqfirst", {"zqkey": "zqvalue", "zqother": "zqthing"})
_SECOND: Call = ("zqsecond", {"zqthird": "zqlast", "zqfourth": "zqend"})
_JSON = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How one template writes calls.

    `kind`: "object", a JSON object holds name and arguments (`within` are the keys that lead to it, `name_key` and
    `arguments_key` its own); "named", the name stands before a JSON object of the arguments; "fields", every argument
    stands by itself between literal words. `opener` is what comes before the first call, `between` what stands between
    two, `closer` what follows the last, the token that ends the turn excluded. `example` is the render of one call.
    """

    kind: Literal["object", "named", "fields"]
    opener: str
    between: str
    closer: str
    example: str
    within: tuple[str, ...] = ()
    name_key: str = ""
    arguments_key: str = ""
    words: tuple[str, ...] = ()
    """named: what stands between name and arguments. fields: before a key, before its value, behind its value."""
    signal_id: int | None = None
    """The first token of `opener` where it is a control token, which is not in the text of an answer."""

    def parse(self, text: str, *, tools: Sequence[Mapping[str, Any]] = ()) -> tuple[str, list[Call]]:
        """What an answer says before its calls, and the calls; the whole text and none where it does not follow."""
        start = text.find(self.opener) if self.opener else len(text) - len(text.lstrip())
        if start < 0:
            return text, []
        rest = text[start + len(self.opener) :]
        readers = {"object": self._objects, "named": self._named, "fields": self._fields}
        calls = readers[self.kind](rest, tools)
        return (text[:start].strip(), calls) if calls else (text, [])

    def forced(self, name: str | None) -> str:
        """The beginning of a call, up to its arguments where it has a name: what an answer must begin with."""
        if name is None:
            return self.example[: self.example.index(_FIRST[0])]
        before = self.example[: self.example.index("zqkey")].rstrip('"').rstrip("{").rstrip()
        before = before if self.kind != "fields" else self.example[: self.example.index(_FIRST[0]) + len(_FIRST[0])]
        return before.replace(_FIRST[0], name)

    def _objects(self, rest: str, tools: Sequence[Mapping[str, Any]]) -> list[Call]:
        calls: list[Call] = []
        fillers = [word for word in (self.between.strip(), self.closer.strip(), self.opener.strip(), ",", ";") if word]
        while rest := _without(rest, fillers):
            try:
                value, end = _JSON.raw_decode(rest)
            except (ValueError, RecursionError):
                return []
            for one in value if isinstance(value, list) else [value]:
                call = self._call_of(one)
                if call is None:
                    return []
                calls.append(call)
            rest = rest[end:]
        return calls

    def _call_of(self, value: Any) -> Call | None:
        for key in self.within:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, dict):
            return None
        name, arguments = value.get(self.name_key), _as_object(value.get(self.arguments_key))
        return (name, arguments) if isinstance(name, str) and arguments is not None else None

    def _named(self, rest: str, tools: Sequence[Mapping[str, Any]]) -> list[Call]:
        calls: list[Call] = []
        while True:
            found = re.match(rf"\s*({TOOL_NAME.pattern}){re.escape(self.words[0])}\s*", rest)
            if found is None:
                return []
            try:
                value, end = _JSON.raw_decode(rest, found.end())
            except (ValueError, RecursionError):
                return []
            if not isinstance(value, dict):
                return []
            calls.append((found[1], value))
            rest = rest[end:]
            if not rest.startswith(self.between):
                return calls if not _without(rest, [word for word in (self.closer.strip(),) if word]) else []
            rest = rest[len(self.between) :]

    def _fields(self, rest: str, tools: Sequence[Mapping[str, Any]]) -> list[Call]:
        key_word, value_word, end_word = self.words
        calls: list[Call] = []
        end = self.closer.rstrip()
        if not rest.rstrip().endswith(end):
            return []  # cut off
        for part in rest.rstrip().removesuffix(end).split(self.between):
            name, *fields = part.split(key_word)
            if not TOOL_NAME.fullmatch(name.strip()):
                return []
            arguments: dict[str, Any] = {}
            for field in fields:
                key, middle, value = field.partition(value_word)
                if not middle or not value.endswith(end_word):
                    return []
                value = value.removesuffix(end_word)
                arguments[key.strip()] = _typed(value, name.strip(), key.strip(), tools)
            calls.append((name.strip(), arguments))
        return calls


def tool_format(chat: ChatTemplate) -> ToolFormat | None:
    """The format of a template, or None where it drops or refuses calls, or writes them in a way that is not told.

    Not for two threads at once, like the template itself.
    """
    one, two = _rendered(chat, [_FIRST]), _rendered(chat, [_FIRST, _SECOND])
    if one is None:
        return None
    lead = _common_start(_rendered(chat, []) or "", one)  # an empty `<think></think>`, which is no call's
    one, two = one.removeprefix(lead), (two or "").removeprefix(lead)
    for derive in (_derive_object, _derive_named, _derive_fields):
        found = derive(one, two)
        if found is None or found.parse(one) != ("", [_FIRST]):
            continue
        if _SECOND[0] not in two or found.parse(two) == ("", [_FIRST, _SECOND]):  # some templates write one call alone
            opener = chat.tokenizer.encode(found.opener, add_special_tokens=False)[:1] if found.opener else []
            special = set(opener) & set(chat.tokenizer.all_special_ids)
            return replace(found, signal_id=special.pop()) if special else found
    return None


def _common_start(one: str, other: str) -> str:
    size = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:size]


def _rendered(chat: ChatTemplate, calls: Sequence[Call]) -> str | None:
    """The text that training would teach for these calls, without the token that ends the turn."""
    made = tuple(
        {"type": "function", "id": f"zqcall{number}9", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(calls)
    )
    tools = tuple(_tool(name, arguments) for name, arguments in calls)
    turns = (Message("user", "zqask"), Message("assistant", "" if made else "#", tool_calls=made))
    found = chat.rows([Conversation(messages=turns, tools=tools)], loss_on="last_assistant")[0]
    if not isinstance(found, list) or not found:
        return None
    row = found[-1]
    ids = [int(token) for token, trained in zip(row.input_ids, row.mask, strict=True) if trained]
    while ids and ids[-1] in chat.stop_ids:
        ids.pop()
    return str(chat.tokenizer.decode(ids, skip_special_tokens=False))


def _tool(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": "d"} for key in arguments}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


def _derive_object(one: str, two: str) -> ToolFormat | None:
    places = _json_values(one, _FIRST[0])
    if not places:
        return None
    start, end, value = places[0]
    path = _path_to(value[0] if isinstance(value, list) and value else value)
    if path is None:
        return None
    within, name_key, arguments_key = path
    both = [*_json_values(two, _FIRST[0]), *_json_values(two, _SECOND[0])]
    between = two[both[0][1] : both[1][0]] if len(both) == 2 and both[0][1] <= both[1][0] else ""
    return ToolFormat(
        "object", one[:start].strip(), between, one[end:], one, within=within, name_key=name_key,
        arguments_key=arguments_key,
    )  # fmt: skip


def _derive_named(one: str, two: str) -> ToolFormat | None:
    name, places = one.find(_FIRST[0]), _json_values(one, "zqkey")
    if name < 0 or not places or places[0][0] < name:
        return None
    start, end, _ = places[0]
    middle = one[name + len(_FIRST[0]) : start]
    second, before = two.find(_SECOND[0]), _json_values(two, "zqkey")
    between = two[before[0][1] : second] if before and second >= before[0][1] else "\0"
    return ToolFormat("named", one[:name].lstrip(), between, one[end:], one, words=(middle.rstrip(),))


def _derive_fields(one: str, two: str) -> ToolFormat | None:
    marks = [_FIRST[0], *(word for pair in _FIRST[1].items() for word in pair)]
    at = [one.find(mark) for mark in marks]
    if -1 in at or at != sorted(at):
        return None
    gaps = [one[start + len(mark) : end] for mark, start, end in zip(marks, at, at[1:], strict=False)]
    behind = one[at[-1] + len(marks[-1]) :]
    key_word, value_word, next_key = gaps[0], gaps[1], gaps[2]
    if not key_word.strip() or not value_word.strip() or gaps[3] != value_word or not next_key.endswith(key_word):
        return None
    end_word = next_key.removesuffix(key_word)
    closer = behind.removeprefix(end_word)
    last, second = two.find("zqthing"), two.find(_SECOND[0])
    between = two[last + len("zqthing") : second].removeprefix(end_word) if 0 <= last < second else "\0"
    return ToolFormat(
        "fields", one[: at[0]].lstrip(), between or "\0", closer, one, words=(key_word, value_word, end_word)
    )


def _json_values(text: str, mark: str) -> list[tuple[int, int, Any]]:
    """Start, end and content of the outermost JSON values of a text that hold a mark."""
    found: list[tuple[int, int, Any]] = []
    place = 0
    while True:
        starts = [start for start in (text.find("{", place), text.find("[", place)) if start >= 0]
        if not starts:
            return found
        place = min(starts)
        try:
            value, end = _JSON.raw_decode(text, place)
        except (ValueError, RecursionError):
            place += 1
            continue
        if mark in text[place:end]:
            found.append((place, end, value))
        place = end


def _path_to(value: Any, within: tuple[str, ...] = ()) -> tuple[tuple[str, ...], str, str] | None:
    """The keys that lead to the object that holds the first call's name and arguments, and their own."""
    if not isinstance(value, dict):
        return None
    name_key = next((key for key, item in value.items() if item == _FIRST[0]), None)
    arguments_key = next((key for key, item in value.items() if _as_object(item) == _FIRST[1]), None)
    if name_key is not None and arguments_key is not None:
        return within, name_key, arguments_key
    deeper = (_path_to(item, (*within, key)) for key, item in value.items())
    return next((found for found in deeper if found is not None), None)


def _as_object(value: Any) -> dict[str, Any] | None:
    """Arguments as an object, also where they are written as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def _without(text: str, words: Sequence[str]) -> str:
    """The text without white space and these words at its start."""
    text = text.lstrip()
    while word := next((one for one in words if text.startswith(one)), None):
        text = text[len(word) :].lstrip()
    return text


def _typed(value: str, name: str, key: str, tools: Sequence[Mapping[str, Any]]) -> Any:
    """A value that stands as bare text, by the type that the tool's schema gives it."""
    for tool in tools:
        function = tool["function"]
        parameters = function.get("parameters") if function["name"] == name else None
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        schema = properties.get(key) if isinstance(properties, dict) else None
        if isinstance(schema, dict) and schema.get("type") not in (None, "string"):
            try:
                return json.loads(value)
            except (ValueError, RecursionError):
                return value
    return value

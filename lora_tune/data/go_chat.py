"""A base's chat template as the Go template that Ollama reads: found out by rendering, not by the template's name.

The chat template is rendered with marker words for contents. What it writes between two turns, by the roles of both, is
a table; the Go template writes exactly that table. A longer list of conversations is then rendered by both. A template
that says something else than such a table (it looks back further, writes today's date, changes words) is refused,
naming the conversation and the place where the two part.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from lora_tune.data.go_template import GoTemplate, go_quoted
from lora_tune.data.template_check import common_prefix
from lora_tune.errors import CheckFailed, Problem

Turn = tuple[str, str]
"""(role, content)."""
Pair = tuple[str, str]
"""The roles of two turns that follow each other; "" before the first, "end" after the last."""
Rendered = Callable[[Sequence[Turn]], str]
"""A request (its last turn is no assistant's) to the text that the model is fed. Raises CheckFailed where refused."""
Strip = Literal["both", "left", "right", "none"]
ROLES = ("system", "user", "assistant")
_STRIPS: tuple[Strip, ...] = ("both", "left", "right")
_START, _END = "", "end"
_BLANKS = " \t\n\r\v\f"
_IS_BLANK = "eq {} " + " ".join(f'"{escaped}"' for escaped in (" ", "\\t", "\\n", "\\r", "\\u000b", "\\u000c"))
_LAST = "(slice . (len (slice . 1)))"
_BUT_LAST = "(slice . 0 (len (slice . 1)))"
_FIX = "merge it and serve it with an engine that runs the base's own template: vLLM, llama.cpp's server with --jinja"
_MUST: tuple[tuple[str, ...], ...] = (("user",), ("user", "assistant", "user"))
_SYSTEM: tuple[tuple[str, ...], ...] = (("system", "user"), ("system", "user", "assistant", "user"))
_ODD: tuple[tuple[str, ...], ...] = (
    ("system", "assistant", "user"),
    ("assistant", "user"),
    ("user", "assistant", "system", "user"),
)
_WORDS = "  Zq{} {}\nä ß\t\"x\" 'y' <b>&amp; {{{{z}}}} \\n 雪\n\n1,\r\n2 \n"
_DATE = re.compile(r"strftime_now")


@dataclass(frozen=True, slots=True)
class GoChat:
    """A chat template in Go: its text, and the system message that it writes where a request has none ("" if none).

    `notes`: requests that Ollama refuses with this template, or renders otherwise.
    """

    text: str
    default_system: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Table:
    """What is written before a turn, by the roles of the turn before it and its own, and how its words are stripped."""

    gaps: dict[Pair, str]
    strips: dict[Pair, Strip]


def go_chat(render: Rendered, *, source: str, bos: str = "") -> GoChat:
    """The Go template that says the same as `render`, the chat template with the text `source`.

    `bos` is the text that the engine itself puts before a prompt.

    Raises: CheckFailed where Go's template language, as Ollama fills it, cannot say it, and where they part.
    """
    refused: CheckFailed | None = None
    for learned in ((*_MUST, *_SYSTEM, *_ODD), (*_MUST, *_SYSTEM), _MUST):
        try:
            table = _learned(render, learned)
            _refuse_dates(table, source)
            text = _written(_without(table, bos))
            _compare(render, GoTemplate(text), table=table, bos=bos)
        except CheckFailed as error:
            refused = error
            continue
        return GoChat(text, _default_system(table.gaps), tuple(_notes(render, GoTemplate(text), table, bos=bos)))
    raise refused or _inexpressible("nothing could be rendered")


def ollama_text(template: GoTemplate, turns: Sequence[Turn], *, system: str = "") -> str:
    """What Ollama feeds the model for a request of these turns; `system` is the SYSTEM of the Modelfile.

    Neighbours of one role become one turn, with two newlines between. Source: ollama `server/routes.go`,
    `template/template.go`.
    """
    if system and turns and turns[0][0] != "system":
        turns = [("system", system), *turns]
    messages: list[dict[str, str]] = []
    for role, content in turns:
        if messages and messages[-1]["Role"] == role and role != "tool":
            messages[-1]["Content"] += "\n\n" + content
        else:
            messages.append({"Role": role, "Content": content})
    said = "\n\n".join(content for role, content in turns if role == "system")
    return template.render({"System": said, "Messages": messages, "Response": ""})


def _learned(render: Rendered, conversations: Sequence[Sequence[str]]) -> _Table:
    """The table that these conversations show; those that the base's template refuses say nothing."""
    gaps: dict[Pair, str] = {}
    for roles in conversations:
        try:
            found = _gaps(render, roles)
        except CheckFailed as error:
            if roles in _MUST:
                raise _inexpressible(f"{_said(roles)}: {error.problems[0].reason}") from None
            continue
        for pair, text in found.items():
            if gaps.setdefault(pair, text) != text:
                reason = f"{_said(roles)}: between {_pair(pair)} it writes {text!r}, elsewhere {gaps[pair]!r}"
                raise _inexpressible(reason)
    strips: dict[Pair, Strip] = {}
    for pair in gaps:
        if pair[1] != _END:
            roles = next(one for one in conversations if pair in itertools.pairwise((_START, *one)))
            strips[pair] = _strip(render, roles, place=[*itertools.pairwise((_START, *roles))].index(pair))
    return _Table(gaps, strips)


def _gaps(render: Rendered, roles: Sequence[str]) -> dict[Pair, str]:
    """What stands before, between and after the turns of these roles. Raises: CheckFailed."""
    turns = [(role, f"Zq{number}{role}") for number, role in enumerate(roles)]
    text = render(turns)
    found: dict[Pair, str] = {}
    before = _START
    for role, marker in turns:
        if text.count(marker) != 1:
            raise CheckFailed(f"the words of the {role} stand there {text.count(marker)} times, or before earlier ones")
        gap, _, text = text.partition(marker)
        if found.setdefault((before, role), gap) != gap:
            raise CheckFailed(f"between {_pair((before, role))} it writes {gap!r}, earlier {found[before, role]!r}")
        before = role
    found[before, _END] = text
    return found


def _strip(render: Rendered, roles: Sequence[str], *, place: int) -> Strip:
    """Which blanks around the words of the turn at `place` the template takes away."""
    sides = []
    for content in (f"{_BLANKS}Zqx", f"Zqx{_BLANKS}"):
        turns = [(role, content if number == place else f"Zq{number}{role}") for number, role in enumerate(roles)]
        sides.append(content not in render(turns))
    kinds: dict[tuple[bool, bool], Strip] = {(True, True): "both", (True, False): "left", (False, True): "right"}
    return kinds.get((sides[0], sides[1]), "none")


def _refuse_dates(table: _Table, source: str) -> None:
    year = str(datetime.now().year)
    dated = [text for text in table.gaps.values() if year in text]
    if dated and _DATE.search(source):
        raise _inexpressible(f"it writes the date of the day ({dated[0][-60:]!r})")


def _without(table: _Table, bos: str) -> _Table:
    """The table without the bos that the engine writes itself."""
    if not bos:
        return table
    starts = {pair: text for pair, text in table.gaps.items() if pair[0] == _START}
    if not all(text.startswith(bos) for text in starts.values()):
        raise _inexpressible(f"the engine puts {bos!r} before a prompt, and the template does not")
    return _Table(table.gaps | {pair: text[len(bos) :] for pair, text in starts.items()}, table.strips)


def _written(table: _Table) -> str:
    """The table as a template: for each turn what stands before its words, by the role of the turn before it."""
    used: set[Strip] = set(table.strips.values()) - {"none"}
    used |= {"right"} if "both" in used else set()
    defined = "".join(_stripper(strip) for strip in _STRIPS if strip in used)
    roles = [role for role in ROLES if any(pair[1] == role for pair in table.gaps)]
    body = ""
    for number, role in enumerate(roles):
        body += "{{" + ("else if" if number else "if") + f' eq .Role "{role}"}}}}' + _before(table, role)
    refusal = "{{else}}" + _refuse("the chat template takes no such role") + "{{end}}"
    loop = "{{range .Messages}}" + body + refusal + "{{$last = .Role}}{{end}}"
    return f'{defined}{{{{$last := ""}}}}{loop}{_before(table, _END)}'


def _before(table: _Table, role: str) -> str:
    """What is written before the words of a turn, and they, or at the end: it depends on the turn before."""
    strips = {table.strips[pair] for pair in table.gaps if pair[1] == role and role != _END}
    apart = len(strips) > 1  # the words of this role are stripped after some turns, after others not
    cases: dict[str, list[str]] = {}
    for (before, after), text in table.gaps.items():
        if after == role:
            words = _content(table.strips[before, after]) if apart else ""
            cases.setdefault(_literal(text) + words, []).append(before)
    parts = []
    for number, (text, befores) in enumerate(cases.items()):
        condition = "eq $last " + " ".join(f'"{before}"' for before in befores)
        parts.append("{{" + ("else if " if number else "if ") + condition + "}}" + text)
    if role == _END:  # a request that ends in an answer is to be continued: nothing follows its words
        return "".join(parts) + '{{else if eq $last "assistant"}}{{else}}' + _refuse("no answer is due") + "{{end}}"
    common = "" if apart else _content(*strips)
    return "".join(parts) + "{{else}}" + _refuse(f"the chat template takes no {role} there") + "{{end}}" + common


def _content(strip: Strip) -> str:
    """The words of a turn, without blanks where the base's template takes them away."""
    return "{{.Content}}" if strip == "none" else f'{{{{template "{strip}" .Content}}}}'


def _stripper(strip: Strip) -> str:
    """A template that writes its dot without blanks: it calls itself with one byte less as long as there is one."""
    shorter, byte = ("(slice . 1)", "(slice . 0 1)") if strip != "right" else (_BUT_LAST, _LAST)
    rest = '{{template "right" .}}' if strip == "both" else "{{.}}"
    again = f'{{{{template "{strip}" {shorter}}}}}'
    body = f"{{{{if .}}}}{{{{if {_IS_BLANK.format(byte)}}}}}{again}{{{{else}}}}{rest}{{{{end}}}}{{{{end}}}}"
    return f'{{{{define "{strip}"}}}}{body}{{{{end}}}}'


def _refuse(words: str) -> str:
    """An action that fails in Go, with these words in the message."""
    return "{{slice " + go_quoted(words) + " 999}}"


def _literal(text: str) -> str:
    """Text as it stands, or as constants where Go or the Modelfile would read it otherwise."""
    if "{{" in text or '"""' in text or "\r" in text or text.endswith(("{", '"')) or text.startswith('"'):
        return "{{" + go_quoted(text) + "}}" if text else ""
    return text


def _default_system(gaps: dict[Pair, str]) -> str:
    """The system message that stands where a request has none, read off the two ways in which a chat begins."""
    head, tail = gaps.get((_START, "system")), gaps.get(("system", "user"))
    whole = gaps[_START, "user"]
    if head is None or tail is None or len(whole) <= len(head) + len(tail):
        return ""
    return whole[len(head) : len(whole) - len(tail)] if whole.startswith(head) and whole.endswith(tail) else ""


def _requests(table: _Table) -> Iterator[tuple[str, ...]]:
    """The roles of every request of up to six turns that the table has all pairs of."""
    for length in range(6):
        for earlier in itertools.product(ROLES, repeat=length):
            roles = (*earlier, "user")
            pairs = [*itertools.pairwise((_START, *roles, _END))]
            if all(one != other and (one, other) in table.gaps for one, other in pairs):
                yield roles


def _compare(render: Rendered, template: GoTemplate, *, table: _Table, bos: str) -> None:
    """Both renders of these requests, with words that a template may touch. Raises: CheckFailed where they part."""
    for roles in _requests(table):
        turns = [(role, _WORDS.format(number, role)) for number, role in enumerate(roles)]
        try:
            wanted = render(turns)
        except CheckFailed as error:
            reason = error.problems[0].reason
            raise _inexpressible(f"{_said(roles)} is refused by the base's template ({reason}), not in Go") from None
        given = bos + ollama_text(template, turns)
        if wanted != given:
            raise _inexpressible(f"{_said(roles)}: {_parting(wanted, given)}")


def _notes(render: Rendered, template: GoTemplate, table: _Table, *, bos: str) -> Iterator[str]:
    if (_START, "system") not in table.gaps:
        yield "Ollama refuses requests with a system message"
    for role in ROLES:
        found = [roles for roles in _requests(table) if role in roles]
        turns = [(one, "" if one == role else f"Zq{one}") for one in min(found, key=len)] if found else []
        try:
            if turns and render(turns) != bos + ollama_text(template, turns):
                yield f"a turn of the {role} without words is rendered otherwise than in training"
        except CheckFailed:
            continue


def _parting(wanted: str, given: str) -> str:
    place = len(common_prefix(wanted, given))
    return f"at character {place} it writes {wanted[place : place + 40]!r}, in Go {given[place : place + 40]!r}"


def _pair(pair: tuple[str, str]) -> str:
    return f"{pair[0] or 'the beginning'} and {pair[1]}"


def _said(roles: Sequence[str]) -> str:
    return "a chat of " + ", ".join(roles)


def _inexpressible(reason: str) -> CheckFailed:
    return CheckFailed(Problem(f"the chat template cannot be said in Go's template language: {reason}", _FIX))

"""The part of Go's text/template that our Ollama templates are written in, executed: what Ollama will say, without Go.

Literal text, `{{"…"}}` constants, `{{.Field}}`, `{{$variable}}` with `:=` and `=`, `if … else if … else … end`,
`range … end`, `define … end` with `template`, and the functions eq, or, len, slice. Strings are bytes, as in Go.
Anything else is an error, never a guess. Source: https://pkg.go.dev/text/template; the tests compare it with Go itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_tune.errors import CheckFailed, Problem

_ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|:=|=|\(|\)|\$\w*|(?:\.\w+)+|\.|\w+)')
_DEEPEST = 4000  # templates that call each other


class GoTemplateError(CheckFailed):
    """A template that Go would not parse or execute, or that is not of the part executed here."""


@dataclass(frozen=True, slots=True)
class _Text:
    text: bytes


@dataclass(frozen=True, slots=True)
class _Output:
    expression: list[Any]


@dataclass(frozen=True, slots=True)
class _Assign:
    name: str
    expression: list[Any]
    declares: bool


@dataclass(frozen=True, slots=True)
class _Branch:
    """`if` (or `range`, `each`) over an expression, with what is written if it holds and if not."""

    expression: list[Any]
    then: list[Any]
    otherwise: list[Any]
    each: bool = False


@dataclass(frozen=True, slots=True)
class _Call:
    name: str
    expression: list[Any]


@dataclass(slots=True)
class _Scope:
    """The dot and the variables of one template call."""

    dot: Any
    variables: dict[str, Any] = field(default_factory=dict)


def go_quoted(text: str) -> str:
    """A Go string constant; quotation marks are escaped so that three of them never stand together."""
    return json.dumps(text, ensure_ascii=False).replace('\\"', "\\u0022").replace("{{", "{\\u007b")


class GoTemplate:
    """A parsed template. `GoTemplate(text).render(data)` is what Go's `Execute` would write.

    Raises: GoTemplateError where the text is not of the part that is known here.
    """

    def __init__(self, text: str) -> None:
        self._defined: dict[str, list[Any]] = {}
        self._pieces = list(_pieces(text))
        self._root, closed = self._block(top="yes")
        if closed:
            raise _bad(f"{closed[0]!r} without a beginning")

    def render(self, data: Mapping[str, Any]) -> str:
        """The text for these data: strings, lists and mappings. Raises: GoTemplateError where Go would fail."""
        out: list[bytes] = []
        self._run(self._root, _Scope(data, {"$": data}), out, depth=0)
        return b"".join(out).decode("utf-8", "replace")

    def _block(self, *, top: str = "no") -> tuple[list[Any], list[str]]:
        """Nodes up to the `end` or `else` that closes them, and the words of that action."""
        nodes: list[Any] = []
        while self._pieces:
            kind, content = self._pieces.pop(0)
            if kind == "text":
                nodes.append(_Text(content.encode()))
                continue
            words = _words(content)
            head = words[0]
            if head == "end" or head == "else":
                return nodes, words
            if head == "define" and top == "yes":
                self._defined[json.loads(words[1])], _ = self._block()
            elif head in ("if", "range"):
                nodes.append(self._branch(words))
            elif head == "template":
                nodes.append(_Call(json.loads(words[1]), _expression(words[2:])))
            elif head.startswith("$") and words[1:2] in (["="], [":="]):
                nodes.append(_Assign(head, _expression(words[2:]), words[1] == ":="))
            else:
                nodes.append(_Output(_expression(words)))
        if top == "no":
            raise _bad("a block is not ended")
        return nodes, []

    def _branch(self, words: list[str]) -> _Branch:
        then, closed = self._block()
        otherwise: list[Any] = []
        if closed == ["else"]:
            otherwise, closed = self._block()
        elif closed[:2] == ["else", "if"]:
            otherwise, closed = [self._branch(closed[1:])], ["end"]
        if closed != ["end"]:
            raise _bad(f"{' '.join(closed)!r} where a block ends")
        return _Branch(_expression(words[1:]), then, otherwise, words[0] == "range")

    def _run(self, nodes: Sequence[Any], scope: _Scope, out: list[bytes], *, depth: int) -> None:
        for node in nodes:
            if isinstance(node, _Text):
                out.append(node.text)
            elif isinstance(node, _Output):
                out.append(_printed(_value(node.expression, scope)))
            elif isinstance(node, _Assign):
                if not node.declares and node.name not in scope.variables:
                    raise _bad(f"undefined variable {node.name!r}")
                scope.variables[node.name] = _value(node.expression, scope)
            elif isinstance(node, _Call):
                if depth > _DEEPEST or node.name not in self._defined:
                    raise _bad(f"template {node.name!r} is not there, or calls itself too often")
                dot = _value(node.expression, scope)
                self._run(self._defined[node.name], _Scope(dot, {"$": dot}), out, depth=depth + 1)
            else:
                self._run_branch(node, scope, out, depth=depth)

    def _run_branch(self, node: _Branch, scope: _Scope, out: list[bytes], *, depth: int) -> None:
        value = _value(node.expression, scope)
        if not node.each:
            self._run(node.then if value else node.otherwise, scope, out, depth=depth)
            return
        for item in value:
            inner = _Scope(item, scope.variables)
            self._run(node.then, inner, out, depth=depth)
        if not value:
            self._run(node.otherwise, scope, out, depth=depth)


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """("text" or "action", content), in order."""
    end = 0
    for match in _ACTION.finditer(text):
        if match.start() > end:
            yield "text", text[end : match.start()]
        content = match[1]
        if content.startswith(("-", "/*")) or content.endswith(" -") or not content.strip():
            raise _bad(f"the action {match[0]!r}")
        yield "action", content
        end = match.end()
    if "{{" in text[end:]:
        raise _bad("an action is not closed")
    if end < len(text):
        yield "text", text[end:]


def _words(action: str) -> list[str]:
    words, position = [], 0
    action = action.strip()
    while position < len(action):
        match = _TOKEN.match(action, position)
        if match is None:
            raise _bad(f"the action {action!r}")
        words.append(match[1])
        position = match.end()
    return words


def _expression(words: Sequence[str]) -> list[Any]:
    """Words with what stands in parentheses as lists of their own."""
    stack: list[list[Any]] = [[]]
    for word in words:
        if word == "(":
            stack.append([])
        elif word == ")":
            if len(stack) == 1:
                raise _bad("a closing parenthesis too many")
            inner = stack.pop()
            stack[-1].append(inner)
        else:
            stack[-1].append(word)
    if len(stack) != 1 or not stack[0]:
        raise _bad(f"the expression {' '.join(words)!r}")
    return stack[0]


def _value(expression: list[Any], scope: _Scope) -> Any:
    head, *rest = expression
    arguments = [_argument(word, scope) for word in rest]
    if isinstance(head, str) and head in ("eq", "or", "len", "slice"):
        return _called(head, arguments)
    if rest:
        raise _bad(f"the call of {head!r}")
    return _argument(head, scope)


def _argument(word: Any, scope: _Scope) -> Any:
    if isinstance(word, list):
        return _value(word, scope)
    if word.startswith('"'):
        return json.loads(word).encode()
    if word.isdigit():
        return int(word)
    if word.startswith("$"):
        if word not in scope.variables:
            raise _bad(f"undefined variable {word!r}")
        return scope.variables[word]
    if word.startswith("."):
        found = scope.dot
        for name in word.split(".")[1:]:
            found = found if not name else found.get(name)
        return found.encode() if isinstance(found, str) else found
    raise _bad(f"the word {word!r}")


def _called(name: str, arguments: list[Any]) -> Any:
    if name == "eq" and len(arguments) >= 2:
        return any(arguments[0] == other for other in arguments[1:])
    if name == "or" and arguments:
        return next((one for one in arguments if one), arguments[-1])
    if name == "len" and len(arguments) == 1:
        return len(arguments[0])
    if name == "slice" and len(arguments) in (2, 3):
        whole, start = arguments[0], arguments[1]
        stop = arguments[2] if len(arguments) == 3 else len(whole)
        if not 0 <= start <= stop <= len(whole):
            shown = whole.decode("utf-8", "replace") if isinstance(whole, bytes) else "a list"
            raise GoTemplateError(Problem(f"the template refuses it: {shown[:100]}", "change the conversation"))
        return whole[start:stop]
    raise _bad(f"the call of {name!r} with {len(arguments)} arguments")


def _printed(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool) or value is None or not isinstance(value, int):
        raise _bad(f"writing {value!r}")
    return str(value).encode()


def _bad(what: str) -> GoTemplateError:
    return GoTemplateError(Problem(f"not understood in a Go template: {what}", "write the template in another way"))

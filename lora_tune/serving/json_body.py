"""The bytes of a request's body to JSON, within limits: no duplicate key, nothing deep, nothing that is no number."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from lora_tune.serving.refusals import Refusal
from lora_tune.serving.settings import Caps

if TYPE_CHECKING:
    from starlette.requests import Request


def parse_body(body: bytes, *, caps: Caps) -> dict[str, Any]:
    """The object that a body holds.

    Raises: Refusal (400) for anything but one JSON object in UTF-8 without duplicate keys, NaN, Infinity, half
    surrogates and numbers of thousands of digits, nested at most `caps.depth` deep with at most `caps.values` values.
    """
    try:
        content = json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise Refusal(400, "the body is not UTF-8 text") from None
    except RecursionError:
        raise Refusal(400, f"the body is nested deeper than {caps.depth}") from None
    except _Wrong as error:
        raise Refusal(400, str(error)) from None
    except ValueError as error:  # JSONDecodeError, and numbers with thousands of digits
        raise Refusal(400, f"the body is not JSON: {str(error)[:120]}") from None
    if not isinstance(content, dict):
        raise Refusal(400, "the body must be a JSON object")
    _measure(content, caps)
    if _SURROGATE in body.lower():  # nothing else can make one
        _check_text(content)
    return content


def body_of(request: Request) -> dict[str, Any]:
    """The body as the guard has parsed it. Raises: Refusal where there was none."""
    content = getattr(request.state, "json", None)
    if not isinstance(content, dict):
        raise Refusal(400, "a body in JSON is needed")
    return content


_SURROGATE = b"\\ud"


class _Wrong(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _Wrong(f"the body has the key {twice[:80]!r} twice")
    return content


def _no_constant(name: str) -> float:
    raise _Wrong(f"the body is not JSON: {name} is no number")


def _measure(content: dict[str, Any], caps: Caps) -> None:
    """Walk through all values. Raises: Refusal where they are too deep, too many, or a number is infinite."""
    waiting: list[tuple[Any, int]] = [(content, 1)]
    count = 1
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise Refusal(400, "the body has a number that is too large")
        if not isinstance(value, (dict, list)):
            continue
        count += len(value)
        if depth >= caps.depth and value:
            raise Refusal(400, f"the body is nested deeper than {caps.depth}")
        if count > caps.values:
            raise Refusal(400, f"the body has more than {caps.values:,} values")
        waiting += [(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value)]


def _check_text(value: Any) -> None:
    """Raises: Refusal for text, keys included, that UTF-8 cannot write."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, str) and not _is_text(one):
            raise Refusal(400, "the body has half of a surrogate pair, which is no character")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

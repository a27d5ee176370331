"""Values that keys of the recipe take: counts, shares, names; each says in words what it must be."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?%")
DURATION = re.compile(r"(?:([0-9]{1,5})h)?(?:([0-9]{1,5})m)?(?:([0-9]{1,7})s)?")


def share_of(amount: int | str, total: int) -> int:
    """How many of `total` things `amount` means: a number as it is, "2%" as a share of the total, rounded half up.

    Raises:
        ValueError: neither a number nor a share.
    """
    if isinstance(amount, int):
        return amount
    match = SHARE.fullmatch(amount)
    if match is None:
        raise ValueError(f"a number or a share such as 2%, got {amount!r}")
    return int(total * float(match[1]) / 100 + 0.5)


def seconds_of(duration: str) -> int:
    """The seconds that a duration such as "45s", "90m", "2h" or "1h30m" means.

    Raises:
        ValueError: no such duration, or none of at least a second.
    """
    match = DURATION.fullmatch(duration)
    parts = match.groups() if match else ()
    seconds = sum(int(part or 0) * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if not seconds:
        raise ValueError(f"a duration such as 45s, 90m, 2h or 1h30m, got {duration!r}")
    return seconds


def refuse(expected: str, fix: str = "") -> PydanticCustomError:
    """A value that cannot be: what it must be, and what to do."""
    return PydanticCustomError("expected", "{expected}", {"expected": expected, "fix": fix})


def conflict(found: list[tuple[str, str, str]]) -> PydanticCustomError:
    """Values that are right alone and wrong together: (key below the section, reason, fix) of each."""
    text = "; ".join(f"{key} {reason}" for key, reason, _ in found)
    return PydanticCustomError("conflict", "{text}", {"text": text, "found": found})


def _share_fix(value: Any) -> str:
    """`0.03` was meant as a share: say how it is written."""
    return f"write {100 * value:g}%" if isinstance(value, float) and 0 < value < 1 else ""


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _amount(value: Any) -> Any:
    """A whole number from 0 on, or a share in per cent."""
    match = SHARE.fullmatch(value) if isinstance(value, str) else None
    if _is_count(value, 0) or (match and float(match[1]) <= 100):
        return value
    raise refuse("must be a whole number from 0 on or a share from 0% to 100%", _share_fix(value))


def _hold_out(value: Any) -> Any:
    """A share below 100 %, a number of rows, or a data file."""
    match = SHARE.fullmatch(value) if isinstance(value, str) else None
    if match and float(match[1]) >= 100:
        raise refuse("must leave rows to train on: a share below 100%")
    if _is_count(value, 0) or match or (isinstance(value, str) and value.strip()):
        return value
    raise refuse("must be a share such as 2%, a number of rows from 0 on, or a data file", _share_fix(value))


def _auto_or_count(value: Any) -> Any:
    if value == "auto" or _is_count(value, 1):
        return value
    raise refuse("must be a whole number, at least 1 or auto")


def _auto_or_rate(value: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value == "auto" or (number and 0 < value < 1e300):
        return value if value == "auto" else float(value)
    fix = "with 0 nothing would be learned; the default is auto" if number and value <= 0 else ""
    raise refuse("must be a number above 0 or auto", fix)


def _checkpointing(value: Any) -> Any:
    if value in ("auto", "all", "none") or _is_count(value, 0):
        return value
    raise refuse("must be auto, all, none or a number of layers")


def _duration(value: Any) -> Any:
    """A text such as 1h30m; a bare number has no unit, and is told how it would be written."""
    fix = f"write {value}s, {value}m or {value}h" if _is_count(value, 1) else ""
    try:
        seconds_of(value if isinstance(value, str) else "")
    except ValueError:
        raise refuse("must be a duration such as 45s, 90m, 2h or 1h30m", fix) from None
    return value


def _targets(value: Any) -> Any:
    if value == "all-linear":
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(name, str) and name for name in value):
        if len(set(value)) < len(value):
            raise refuse("must name each module once")
        if any(not re.fullmatch(r"[A-Za-z0-9_.]+", name) for name in value):
            raise refuse("must be plain module names such as q_proj; regular expressions are not supported")
        return tuple(value)
    raise refuse("must be all-linear or a list of module names such as [q_proj, v_proj]")


def _share(value: Any) -> Any:
    match = SHARE.fullmatch(value) if isinstance(value, str) else None
    if match and float(match[1]) <= 100:
        return value
    raise refuse("must be a share from 0% to 100%", _share_fix(value))


def _all_or_names(value: Any) -> Any:
    if value == "all":
        return value
    if isinstance(value, str) and value:
        return (value,)
    if isinstance(value, (list, tuple)) and value and all(isinstance(name, str) and name for name in value):
        if len(set(value)) < len(value):
            raise refuse("must name each template once")
        return tuple(value)
    raise refuse("must be all or a list of template names")


def strings(value: Any) -> Any:
    """A list of names, each once, as a tuple."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) and item for item in value):
        if len(set(value)) < len(value):
            raise refuse("must name each thing once")
        return tuple(value)
    raise refuse("must be a list of text")


def _schema(*kinds: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(kinds)} if len(kinds) > 1 else kinds[0])


_SHARE_SCHEMA = {"type": "string", "pattern": r"^\d+(\.\d+)? ?%$"}
_LIST_SCHEMA = {"type": "array", "items": {"type": "string"}}
_COUNT = {"type": "integer", "minimum": 1}
Amount = Annotated[int | str, BeforeValidator(_amount), _schema({"type": "integer", "minimum": 0}, _SHARE_SCHEMA)]
HoldOut = Annotated[
    int | str, BeforeValidator(_hold_out), _schema({"type": "integer", "minimum": 0}, {"type": "string"})
]
AutoCount = Annotated[int | Literal["auto"], BeforeValidator(_auto_or_count), _schema({"const": "auto"}, _COUNT)]
AutoRate = Annotated[
    float | Literal["auto"],
    BeforeValidator(_auto_or_rate),
    _schema({"const": "auto"}, {"type": "number", "exclusiveMinimum": 0}),
]
Checkpointing = Annotated[
    int | Literal["auto", "all", "none"],
    BeforeValidator(_checkpointing),
    _schema({"enum": ["auto", "all", "none"]}, {"type": "integer", "minimum": 0}),
]
Targets = Annotated[
    tuple[str, ...] | Literal["all-linear"], BeforeValidator(_targets), _schema({"const": "all-linear"}, _LIST_SCHEMA)
]
Strings = Annotated[tuple[str, ...], BeforeValidator(strings), _schema(_LIST_SCHEMA)]
Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Share = Annotated[str, BeforeValidator(_share), _schema(_SHARE_SCHEMA)]
Templates = Annotated[
    tuple[str, ...] | Literal["all"], BeforeValidator(_all_or_names), _schema({"const": "all"}, _LIST_SCHEMA)
]
Duration = Annotated[
    str, BeforeValidator(_duration), _schema({"type": "string", "pattern": r"^(?=.*[1-9])(\d+h)?(\d+m)?(\d+s)?$"})
]

"""A regular expression as `target_modules`: refused, with the list that it would match. No torch.

A stranger's expression may never end (`(a+)+!`), so it is matched in a process of its own, with a limit on its time and
memory; the process reads the names from its input and nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence

from lora_tune.errors import Problem

SECONDS = 1.0
_MOST_CHARACTERS = 2000
_MOST_MODULES = 20_000
_MOST_PARTS = 32
_SHOWN = 400
_CHILD = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
except (ImportError, ValueError, OSError):
    pass
pattern, modules = json.load(sys.stdin)
try:
    expression = re.compile(pattern)
except (re.error, RecursionError, OverflowError):
    sys.exit(3)
json.dump([module for module in modules if expression.fullmatch(module)], sys.stdout)
"""


def pattern_problem(pattern: str, modules: Sequence[str], *, where: str) -> Problem:
    """Why the expression is refused: what it would match among these modules, and the list to write instead."""
    reason, found = "not supported: a regular expression", matched(pattern, modules)
    fix = "write a list of module names, or all-linear"
    if found is None:
        reason += " that is no sound one or takes too long to match"
    elif modules:
        names = short_names(found, modules[:_MOST_MODULES])
        shown = json.dumps(names)
        reason += f"; it would match {len(found)} of {len(modules)} modules"
        if found and len(shown) <= _SHOWN:
            fix = f'write the list: "target_modules": {shown}'
        elif found:
            reason += f": {', '.join(names[:5])} …"
    shown = pattern if len(pattern) <= 60 else pattern[:57] + "…"
    return Problem(f"{reason}, got {shown}", fix, where, key="target_modules")


def matched(pattern: str, modules: Sequence[str]) -> list[str] | None:
    """The modules that PEFT would find by this expression (it must match a whole name).

    None where the expression is unsound, or does not end within `SECONDS`.
    """
    if len(pattern) > _MOST_CHARACTERS:
        return None
    content = json.dumps([pattern, list(modules)[:_MOST_MODULES]])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=content,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return list(json.loads(done.stdout)) if done.returncode == 0 else None


def short_names(found: Sequence[str], modules: Sequence[str]) -> list[str]:
    """The shortest ends of names (`q_proj`, else `self_attn.q_proj`, …) that mean these modules and no others."""
    wanted = set(found)
    meant_elsewhere = {end for module in modules if module not in wanted for end in _ends(module)}
    return sorted({
        next((end for end in _ends(module) if end not in meant_elsewhere), module) for module in wanted
    })  # fmt: skip


def _ends(module: str) -> Iterator[str]:
    """`a.b.c`: c, b.c, a.b.c, and the whole name at last."""
    parts = module.split(".", _MOST_PARTS)
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[-count:])

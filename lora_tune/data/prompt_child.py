"""Renders untrusted prompt templates over rows, inside a process with hard limits. Run as a script, never imported.

Reads one JSON object from stdin: `prompts`, a list of [jinja, choices or null], and `jobs`, a list of [number of the
prompt, seed, row]. Writes one JSON line for each prompt, then one for each job, each as soon as it is known, so that
the parent knows at which one the process ended:

    prompt  {"variables": […]}                        or  {"error": …}
    job     {"parts": […], "choices": […] or null}    or  {"error": …}

`parts` is what stands between the separators, `input ||| target`; one part means that the template does not apply. A
separator inside a value of the row is text. The environment is promptsource's (`promptsource/templates.py`: filters
`choice` and `most_frequent`, function `zip`), sandboxed, with null written as nothing and choices drawn by the seed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

CPU_S = 1  # for one render
BATCH_CPU_S = 60  # for one request; a usual row takes 0.1 ms
OUTPUT_CHARACTERS = 1 << 20  # of one render
SEPARATOR = "|||"
_HIDDEN = "\ue000zqpipes\ue000"  # stands for a separator inside a value
_GIVEN = frozenset({"answer_choices", "zip", "range", "dict", "lipsum", "cycler", "joiner", "namespace"})


def _limits() -> Any:
    """The module `template_child.py`, which stands beside this script and needs no package either."""
    spec = importlib.util.spec_from_file_location("template_child", Path(__file__).with_name("template_child.py"))
    if spec is None or spec.loader is None:
        raise ImportError("template_child.py is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment() -> Any:
    """promptsource's jinja2 environment, sandboxed."""
    from jinja2 import pass_context
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    @pass_context  # so that jinja2 does not draw once for all rows when it folds constants
    def choice(_: Any, items: Any) -> Any:
        return random.choice(list(items))

    def most_frequent(items: Any) -> list[Any]:
        counts = Counter(items).most_common()
        return [item for item, count in counts if count == counts[0][1]]

    env = ImmutableSandboxedEnvironment(finalize=lambda value: "" if value is None else value)
    env.filters["choice"] = choice
    env.filters["most_frequent"] = most_frequent
    env.globals["zip"] = zip
    return env


def hidden(value: Any) -> Any:
    """`value` with separators in its texts replaced, at every depth."""
    if isinstance(value, str):
        return value.replace(SEPARATOR, _HIDDEN)
    if isinstance(value, list):
        return [hidden(item) for item in value]
    if isinstance(value, dict):
        return {key: hidden(item) for key, item in value.items()}
    return value


def split(text: str) -> list[str]:
    """The parts between separators, without the white space around them."""
    return [part.strip().replace(_HIDDEN, SEPARATOR) for part in text.split(SEPARATOR)]


def written(template: Any, values: dict[str, Any]) -> str:
    """The render of a template. Raises: ValueError where it is too long, and whatever the template raises."""
    pieces, size = [], 0
    for piece in template.generate(**values):
        pieces.append(piece)
        size += len(piece)
        if size > OUTPUT_CHARACTERS:
            raise ValueError(f"it writes more than {OUTPUT_CHARACTERS:,} characters")
    return "".join(pieces)


def clock(seconds: float) -> None:
    """Let the system end this process when it computes for that long from now on (POSIX; else the parent's clock)."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    """Answer one request from stdin on stdout."""
    request = json.load(sys.stdin)
    limits = _limits()
    from jinja2 import meta

    env = environment()
    limits.limit_resources(cpu_s=BATCH_CPU_S)

    def answer(content: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(content) + "\n")
        sys.stdout.flush()

    templates: list[tuple[Any, Any]] = []
    for texts in request["prompts"]:
        clock(CPU_S)
        try:
            given = [text for text in texts if text is not None]
            trees = [env.parse(text) for text in given]
            internal = next(filter(None, map(limits.reaches_for_internals, trees)), None)
            if internal is not None:
                answer({"error": f"it reaches for Python's internals ({internal!r})"})
                continue
            names = set().union(*(meta.find_undeclared_variables(tree) for tree in trees)) - _GIVEN
            templates.append((env.from_string(texts[0]), env.from_string(texts[1]) if len(given) > 1 else None))
            answer({"variables": sorted(names)})
        except Exception as error:
            answer({"error": f"it does not compile: {limits.one_line(error)}"})
    if len(templates) < len(request["prompts"]):
        os._exit(0)
    for number, seed, row in request["jobs"]:
        clock(CPU_S)
        random.seed(seed)
        template, choices = templates[number]
        try:
            values = hidden(row)
            listed = None
            if choices is not None:
                listed = [choice.strip() for choice in written(choices, values).split(SEPARATOR)]
                values = {**values, "answer_choices": listed}
            parts = split(written(template, values))
            answer({"parts": parts, "choices": listed and [choice.replace(_HIDDEN, SEPARATOR) for choice in listed]})
        except Exception as error:
            answer({"error": limits.one_line(error)})
    os._exit(0)  # without clean-up: a hostile template may have left much behind


if __name__ == "__main__":
    main()

"""Renders an untrusted chat template a few times, inside a process with hard limits. Run as a script, never imported.

Reads one JSON object from stdin: `text`, `variables`, `renders`, a list of `messages`, `tools` and
`add_generation_prompt`. Writes one to stdout: `renders`, for each its `text` or an `error`; or `refused`, why the
template as a whole is unusable. It imports jinja2 and the standard library only, so that it starts in about 0.1 s, and
rebuilds the environment in which transformers renders chat templates (`_compile_jinja_template` in
`transformers/utils/chat_template_utils.py`).
"""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import datetime
from typing import Any

CPU_S = 1  # for start, imports and all renders of one template together; usual templates take about 0.1 s
MEMORY_BYTES = 1 << 30
OUTPUT_BYTES = 1 << 20  # of one render
_INTERNALS = re.compile(r"__[a-z]+__")


def limit_resources(*, cpu_s: int = CPU_S) -> None:
    """Let the kernel end this process when it takes too much CPU time or memory (POSIX; else the parent's clock)."""
    try:
        import resource
    except ImportError:
        return
    limits = {
        "RLIMIT_CPU": (cpu_s, cpu_s + 1),  # the soft limit sends SIGXCPU, by which the parent tells time from memory
        "RLIMIT_AS": (MEMORY_BYTES, MEMORY_BYTES),
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_FSIZE": (0, 0),
    }
    for name, limit in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), limit)
        except (AttributeError, OSError, ValueError):
            continue  # e.g. macOS has no usable RLIMIT_AS: the output cap and the clock remain


def environment() -> Any:
    """The sandboxed jinja2 environment of transformers, without the tracker of its `generation` tag."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> str:
            return str(caller())

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def reaches_for_internals(tree: Any) -> str | None:
    """The first name by which a template reaches for Python's internals (`__class__`, `'{0.__class__}'`), or None."""
    from jinja2 import nodes

    for node in tree.find_all((nodes.Getattr, nodes.Name)):
        name = node.attr if isinstance(node, nodes.Getattr) else node.name
        if _INTERNALS.fullmatch(name):
            return str(name)
    for node in tree.find_all(nodes.Const):
        value = node.value
        if isinstance(value, str) and (_INTERNALS.fullmatch(value) or re.search(r"\{[^{}]*__[a-z]+__[^{}]*\}", value)):
            return value
    return None


def one_line(error: BaseException) -> str:
    """An exception as one line of at most 200 characters, with the template's line where jinja2 knows it."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    line = getattr(error, "lineno", None)
    if isinstance(error, RecursionError | MemoryError):
        text = f"it is nested too deeply or needs too much memory ({type(error).__name__})"
    return f"line {line}: {text}" if line else text


def main() -> None:
    """Answer one request from stdin on stdout."""
    request = json.load(sys.stdin)
    limit_resources()
    answer: dict[str, Any] = {"renders": []}
    try:
        env = environment()
        internal = reaches_for_internals(env.parse(request["text"]))
        if internal is not None:
            answer["refused"] = f"it reaches for Python's internals ({internal!r})"
        else:
            template = env.from_string(request["text"])
    except Exception as error:
        answer["refused"] = f"it does not compile: {one_line(error)}"
    for case in [] if "refused" in answer else request["renders"]:
        try:
            pieces, size = [], 0
            for piece in template.generate(documents=None, **case, **request["variables"]):
                pieces.append(piece)
                size += len(piece)
                if size > OUTPUT_BYTES:
                    answer["refused"] = f"it writes more than {OUTPUT_BYTES:,} bytes for two short messages"
                    break
            answer["renders"].append({"text": "".join(pieces)})
        except Exception as error:
            answer["renders"].append({"error": one_line(error)})
        if "refused" in answer:
            answer["renders"] = []
            break
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # without clean-up: a hostile template may have left much behind


if __name__ == "__main__":
    main()

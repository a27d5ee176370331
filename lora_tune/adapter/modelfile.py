"""Ollama's Modelfile: FROM, ADAPTER, TEMPLATE, SYSTEM and the stop words, written and read back. No torch.

Source: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lora_tune.errors import CheckFailed, Problem

_QUOTES = '"""'
_LINE = re.compile(
    r'(?P<name>[A-Z]+) +(?:"""(?P<long>.*?)"""|"(?P<short>[^"\n]*)"|(?P<plain>[^"\n]+))[ \t]*(?:\n|\Z)', re.DOTALL
)
_STOP = re.compile(r'PARAMETER stop (?:"""(?P<long>.*?)"""|"(?P<short>[^"\n]*)")[ \t]*(?:\n|\Z)', re.DOTALL)
_KNOWN = ("FROM", "ADAPTER", "TEMPLATE", "SYSTEM", "LICENSE")


@dataclass(frozen=True, slots=True)
class Modelfile:
    """What a Modelfile says: the model's file, an adapter's ("" without), the template, system message and stops."""

    model: str
    adapter: str
    template: str
    system: str
    stops: tuple[str, ...]

    def text(self) -> str:
        """The file. Raises: CheckFailed for texts that hold three quotation marks, which it cannot quote."""
        lines = [f"FROM {self.model}"]
        lines += [f"ADAPTER {self.adapter}"] if self.adapter else []
        lines.append(f"TEMPLATE {_quoted(self.template, 'template')}")
        lines += [f"SYSTEM {_quoted(self.system, 'system message')}"] if self.system else []
        lines += [f"PARAMETER stop {_short(stop)}" for stop in self.stops]
        return "\n".join(lines) + "\n"


def read_modelfile(text: str) -> Modelfile:
    """Read a Modelfile of ours back. Raises: CheckFailed for an instruction that is not known here."""
    found: dict[str, str] = {}
    stops: list[str] = []
    position = 0
    while position < len(text):
        stop, match = _STOP.match(text, position), _LINE.match(text, position)
        if stop is not None:
            stops.append(stop["long"] if stop["long"] is not None else stop["short"])
            position = stop.end()
        elif match is not None and match["name"] in _KNOWN:
            value = next(match[group] for group in ("long", "short", "plain") if match[group] is not None)
            found[match["name"]] = value
            position = match.end()
        elif text[position] in "\n#":
            position = (text.find("\n", position) + 1) or len(text)
        else:
            line = text[position:].partition("\n")[0]
            raise CheckFailed(Problem(f"not known in a Modelfile: {line[:80]!r}", "export it again"))
    names = ("FROM", "ADAPTER", "TEMPLATE", "SYSTEM")
    model, adapter, template, system = (found.get(name, "") for name in names)
    return Modelfile(model, adapter, template, system, tuple(stops))


def _quoted(text: str, what: str) -> str:
    if _QUOTES in text or text.endswith('"') or "\r" in text:
        raise CheckFailed(
            Problem(f"the {what} cannot stand in a Modelfile, got {text[-60:]!r}", "use another template")
        )
    return f"{_QUOTES}{text}{_QUOTES}"


def _short(text: str) -> str:
    return _quoted(text, "stop word") if '"' in text or "\n" in text else f'"{text}"'

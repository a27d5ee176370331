"""The page of `preview --html`: one file, no request to anywhere, for phone and desktop, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}: rows as trained</title>
<style>
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --soft: #6a6f76; --line: #e3e5e8; --box: #f7f8f9;
  --trained: #d6f3dc; --trained-ink: #0b4a1c; --control: #e4e0fa; --control-ink: #3d2b8f; --bar: #4b9b62; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #e6e7e9; --soft: #9aa0a7; --line: #30343a;
  --box: #1e2125; --trained: #153f22; --trained-ink: #b9f0c7; --control: #2e2757; --control-ink: #cfc6ff;
  --bar: #57b273; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: .2rem 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.soft, caption, summary small { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem .9rem .15rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child { text-align: left; white-space: pre; } th { font-weight: 600; }
ul { padding-left: 1.2rem; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .2rem .7rem; align-items: center; }
.bars span { text-align: right; font-variant-numeric: tabular-nums; }
.bar { background: var(--bar); height: .9rem; border-radius: 2px; min-width: 2px; }
.tokens, pre { white-space: pre-wrap; font: 14px/1.6 ui-monospace, monospace; background: var(--box);
  margin: .3rem 0 1.4rem; border: 1px solid var(--line); border-radius: 6px; padding: .7rem; }
.trained { background: var(--trained); color: var(--trained-ink); border-radius: 3px; }
.masked { color: var(--soft); }
.control { background: var(--control); color: var(--control-ink); border-radius: 3px; }
.control.trained { outline: 2px solid var(--bar); outline-offset: -1px; }
details { margin: .6rem 0; } summary { cursor: pointer; }
</style>
</head>
<body>
<h1>{{ title }}: rows as trained</h1>
<ul class="soft">{% for fact in facts %}<li>{{ fact }}</li>{% endfor %}</ul>
{% if warnings %}<h2>Warnings</h2>
<ul>{% for warning in warnings %}<li>{{ warning }}</li>{% endfor %}</ul>{% endif %}
<h2>Ledger</h2>
<div class="scroll"><table>
{% for row in ledger %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<h2>Tokens a document</h2>
<div class="bars">{% for bin in histogram %}<span>{{ bin.label }}</span>
<div class="bar" style="width: {{ bin.percent }}%"></div><span>{{ bin.count }}</span>
{% endfor %}</div>
<h2>Rows</h2>
<p><span class="trained">trained</span> <span class="masked">not trained</span>
<span class="control">control token</span>
<span class="control trained">control token, trained</span></p>
{% for row in rows %}<details open><summary>{{ row.place }} <small>{{ row.about }}</small></summary>
<div class="tokens">{% for run in row.runs %}<span class="{{ run.style }}">{{ run.text }}</span>{% endfor %}</div>
</details>
{% endfor %}
<details><summary>Chat template</summary><pre>{{ template }}</pre></details>
</body>
</html>
"""


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one kind, decoded together; `style` is a subset of the words trained, masked, control."""

    text: str
    style: str


@dataclass(frozen=True)
class ShownRow:
    """One document: where it stands in the data, a few words about it, and its tokens as runs."""

    place: str
    about: str
    runs: tuple[Run, ...]


def page(
    title: str,
    *,
    facts: Sequence[str],
    warnings: Sequence[str],
    ledger: Sequence[Sequence[str]],
    histogram: Sequence[Mapping[str, Any]],
    rows: Sequence[ShownRow],
    template: str,
) -> str:
    """The page as HTML. `histogram`: {label, count, percent} a bar. All text is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_PAGE).render(
        title=title,
        facts=facts,
        warnings=warnings,
        ledger=ledger,
        histogram=histogram,
        rows=rows,
        template=template,
    )

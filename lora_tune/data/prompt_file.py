"""Prompt files: templates `input ||| target` in the YAML of promptsource, read without constructing anything from it.

    dataset: glue
    templates:
      <id>: !Template
        name: want to know
        jinja: "Is {{sentence1}} the same as {{sentence2}}? ||| {{answer_choices[label]}}"
        answer_choices: no ||| yes            # also a Jinja template; null where there are none
        metadata: !TemplateMetadata {choices_in_prompt: false, original_task: true}

The two tags are read as plain mappings and may be left out; every other tag, anchor and alias is refused.
Source of the format: Bach et al. 2022, PromptSource (arXiv 2202.01279).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_tune.data.rows import did_you_mean, kind_of
from lora_tune.data.sources import shown_path
from lora_tune.errors import Problem, RecipeError, UsageError
from lora_tune.yaml_tree import Node, parse

TAGS = frozenset({"!Template", "!TemplateMetadata"})
MAX_BYTES = 1 << 20  # the largest file of promptsource has about 60 kB
SEPARATOR = "|||"
_KEYS = ("name", "jinja", "answer_choices", "metadata", "id", "reference")
_METADATA = ("choices_in_prompt", "original_task", "metrics", "languages")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One template. `jinja` and `choices` are Jinja texts (`choices` None: a free answer); `line` is where it stands.

    `lists_choices`: the input names the answer choices already.
    """

    name: str
    jinja: str
    choices: str | None
    lists_choices: bool
    line: int


@dataclass(frozen=True, slots=True)
class PromptFile:
    """The chosen templates of one file; `file` as a user reads it, `sha256` of its bytes."""

    file: str
    name: str
    sha256: str
    prompts: tuple[Prompt, ...]


def read_prompts(path: Path, *, templates: Sequence[str] | Literal["all"] = "all", key: str = "") -> PromptFile:
    """The templates of a prompt file, all or those named.

    Raises:
        UsageError: the file cannot be read.
        RecipeError: with every problem of the file, by line; a name in `templates` that it does not have, under `key`.
    """
    file = shown_path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(Problem(f"cannot be read: {error.strerror}", "check the file", file=file)) from None
    if len(content) > MAX_BYTES:
        raise RecipeError(Problem(f"is larger than {MAX_BYTES >> 20} MiB", "name a file of prompt templates", file))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(Problem("is not UTF-8", "save the file as UTF-8", file, line)) from None
    root, problems = parse(text, origin=file, tags=TAGS)
    found = [] if root is None or problems else _templates(root, problems)
    if not problems and not found:
        fix = "write templates: {<id>: {name, jinja}}, as in promptsource"
        problems.append(Problem("holds no templates", fix, file, root.line if root else None))
    if problems:
        raise RecipeError(problems)
    chosen = found if templates == "all" else _chosen(found, templates, file, key)
    return PromptFile(file, path.name, hashlib.sha256(content).hexdigest(), tuple(chosen))


def _templates(root: Node, problems: list[Problem]) -> list[Prompt]:
    """The templates below `templates:`; what is wrong with them goes to `problems`."""
    listed = root.child("templates")
    if listed is None or not isinstance(listed.value, (dict, list)):
        return []
    nodes = list(listed.value.values()) if isinstance(listed.value, dict) else listed.value
    found: list[Prompt] = []
    for node in nodes:
        prompt = _template(node, problems)
        if prompt is None:
            continue
        if any(prompt.name == other.name for other in found):
            first = next(other.line for other in found if other.name == prompt.name)
            reason = f"template name {prompt.name!r} stands twice, first in line {first}"
            problems.append(Problem(reason, "rename one of them", node.origin, prompt.line))
        found.append(prompt)
    return found


def _template(node: Node, problems: list[Problem]) -> Prompt | None:
    def refuse(at: Node, reason: str, fix: str) -> None:
        problems.append(Problem(reason, fix, node.origin, at.line, at.column))

    if not isinstance(node.value, dict):
        refuse(node, f"a template must be a mapping, got {kind_of(node.plain())}", "write name: and jinja: below it")
        return None
    for name, child in node.value.items():
        if name not in _KEYS:
            refuse(child, f"unknown key `{name}` of a template", did_you_mean(name, _KEYS) or f"keys: {_list(_KEYS)}")
    name, jinja = node.child("name"), node.child("jinja")
    if name is None or name.value is None or isinstance(name.value, (dict, list)):
        refuse(node, "a template needs a name", "write name: and some words")
        return None
    if jinja is None or not isinstance(jinja.value, str):
        refuse(node, f"template {name.value!r} needs jinja", "write jinja: 'input ||| target'")
        return None
    if SEPARATOR not in jinja.value:
        refuse(jinja, f"template {name.value!r} has no {SEPARATOR}", "write jinja: 'input ||| target'")
    choices = node.child("answer_choices")
    given = choices.value if choices is not None else None
    if isinstance(given, (dict, list)):
        refuse(node, f"answer_choices of {name.value!r} must be text", "write them as 'no ||| yes'")
        given = None
    return Prompt(
        name=str(name.value).strip(),
        jinja=jinja.value,
        choices=str(given) if given not in (None, "") else None,
        lists_choices=_metadata(node.child("metadata"), refuse),
        line=jinja.line or node.line or 1,
    )


def _metadata(node: Node | None, refuse: Callable[[Node, str, str], None]) -> bool:
    """Whether the choices stand in the prompt, as the metadata says."""
    if node is None or node.value is None:
        return False
    if not isinstance(node.value, dict):
        refuse(node, f"metadata must be a mapping, got {kind_of(node.plain())}", f"keys: {_list(_METADATA)}")
        return False
    for name, child in node.value.items():
        if name not in _METADATA:
            refuse(child, f"unknown key `{name}` of metadata", did_you_mean(name, _METADATA) or _list(_METADATA))
    said = node.child("choices_in_prompt")
    if said is not None and said.value not in (True, False, None):
        refuse(said, f"choices_in_prompt must be true or false, got {said.value!r}", "write true or false")
    return said is not None and said.value is True


def _chosen(found: Sequence[Prompt], names: Sequence[str], file: str, key: str) -> list[Prompt]:
    known = {prompt.name: prompt for prompt in found}
    problems = []
    for name in names:
        if name not in known:
            fix = did_you_mean(name, list(known)) or f"{file} has {_list([*known][:8])}{' …' if len(known) > 8 else ''}"
            problems.append(Problem(f"no such template in {file}, got {name!r}", fix, key=key or None))
    if problems:
        raise RecipeError(problems)
    return [known[name] for name in names]


def _list(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)

"""A configuration of another tool as a recipe of ours, with a line for everything that could not be carried over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.errors import Problem, RecipeError, Severity
from lora_tune.foreign_keys import NOT_NEEDED
from lora_tune.foreign_sources import Draft
from lora_tune.foreign_values import RULES
from lora_tune.recipe_file import read_text, yaml_lines
from lora_tune.recipe_problems import shown
from lora_tune.yaml_tree import Node, parse, scalar

_UNSET: tuple[Any, ...] = (None, "", [], {})
_MARKS: dict[str, tuple[str, ...]] = {
    "LLaMA-Factory": ("finetuning_type", "top.finetuning_type"),
    "torchtune": ("model._component_",),
    "LitGPT": ("lora_query", "data.class_path"),
    "oumi": ("model.model_name", "peft.lora_r"),
    "ms-swift": ("tuner_type",),
    "axolotl": ("base_model",),
    "TRL": ("model_name_or_path",),
}
"""{tool: keys by which its files are known}, the first that fits."""
_SAID = (
    "lora.rank",
    "lora.alpha",
    "train.learning_rate",
    "train.epochs",
    "train.schedule",
    "train.warmup",
    "train.batch_size",
)
_ORDER = ("base", "data", "loss_on", "lora", "train", "eval", "output", "seed", "track")
_WHOLE: dict[str, str] = {
    "ENV": "a recipe sets no environment variables: set them in the shell",
    "tokenizer": "the base's own tokenizer is used",
    "tokens": "taken from the chat template and the tokenizer; add new ones in lora.new_tokens",
    "special_tokens": "taken from the chat template and the tokenizer; add new ones in lora.new_tokens",
    "fsdp_config": "write hardware: {strategy: fsdp2}, which needs nothing else",
    "profiler": "profile with torch's own profiler from Python",
    "metric_logger": "every step is written to metrics.jsonl",
    "loss": "the loss is the cross-entropy over the trained tokens",
    "gradient_checkpointing_kwargs": "set train.gradient_checkpointing alone",
    "checkpoint_files": "the base's folder is read as a whole",
}
"""{section: why it is left out as a whole}."""


@dataclass(frozen=True, slots=True)
class Imported:
    """A recipe as YAML text, the tool it came from, and what was left out (warnings) or settles itself (notes)."""

    text: str
    tool: str
    problems: tuple[Problem, ...]


def import_recipe(path: Path) -> Imported:
    """Translate a configuration of axolotl, LLaMA-Factory, TRL, torchtune, LitGPT, oumi or ms-swift.

    Nothing in it is run, imported or followed; its other files are not read.

    Raises:
        RecipeError: not YAML, or of no tool that is known.
        UsageError: the file cannot be read.
    """
    tree, problems = parse(read_text(path), origin=str(path))
    if tree is None or not isinstance(tree.value, dict) or problems:
        raise RecipeError(problems or [Problem("holds no settings", "name a configuration in YAML", str(path))])
    settings = [item for item in _leaves(tree, ()) if item[1].plain() not in _UNSET]
    keys = {".".join(parts) for parts, _ in settings}
    tool = next((tool for tool, marks in _MARKS.items() if keys & set(marks)), None)
    if tool is None:
        fix = f"known are {', '.join(_MARKS)}"
        raise RecipeError(Problem("is the configuration of no tool that is known here", fix, str(path)))
    draft = Draft(tool)
    found = [problem for parts, node in settings if (problem := _carry(draft, parts, node, str(path)))]
    found += _settle(draft, str(path))
    return Imported(_text(draft, path, found), tool, tuple(found))


def _leaves(node: Node, parts: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Node]]:
    """Every setting with its path; a list is one setting, a dotted key counts as a path."""
    if isinstance(node.value, dict) and (not parts or parts[-1] not in _WHOLE):
        for key, child in node.value.items():
            yield from _leaves(child, (*parts, *str(key).split(".")))
    elif parts:
        yield parts, node


def _carry(draft: Draft, parts: tuple[str, ...], node: Node, file: str) -> Problem | None:
    """Apply the rule of one setting; what is left out comes back as a problem."""
    value = node.plain()
    value = scalar(value) if isinstance(value, str) and draft.tool == "LLaMA-Factory" else value
    name = parts[-1].lower()
    if isinstance(value, str) and value.startswith("${"):
        return None  # refers to another setting of the file
    rule = RULES.get(".".join(parts[-2:]).lower()) or RULES.get(name)
    severity: Severity = "warning"
    if parts[-1] in _WHOLE:
        reason: str | None = _WHOLE[parts[-1]]
        severity = "note"
    elif rule is not None and not (rule is RULES.get("batch_size") and parts[0] == "eval"):
        try:
            reason = rule(draft, value)
        except (TypeError, ValueError, OverflowError):
            reason = "is no value for this key"
    elif value is False or value in (0, "none"):
        return None  # off there, and not there here
    elif name in NOT_NEEDED:
        reason, severity = NOT_NEEDED[name], "note"
    else:
        reason = "has no counterpart here"
    if not reason:
        return None
    text = f"{shown(value)} was not carried over: {reason}"
    return Problem(text, "", file, node.key_line or node.line, key=".".join(parts), severity=severity)


def _settle(draft: Draft, file: str) -> list[Problem]:
    """What follows from several settings together, and what was set nowhere."""
    values, found = draft.values, []
    values.setdefault("base.quantize", "none")
    if draft.modules and "lora.targets" not in values:
        values["lora.targets"] = list(dict.fromkeys(draft.modules))
    if draft.micro_batch is not None and "train.batch_size" not in values:
        values["train.batch_size"] = draft.micro_batch * (draft.accumulation or 1)
    if values.get("eval.hold_out") in (0, "0%"):
        for key in ("eval.every", "eval.keep_best", "eval.stop_after"):
            if values.pop(key, None) is not None:
                found.append(
                    Problem("needs held-out rows, and none are held out", "", file, key=key, severity="warning")
                )
    if "eval.every" not in values:
        values.pop("eval.keep_best", None)
        values.pop("eval.stop_after", None)
    if "train.max_steps" in values:
        values.setdefault("train.epochs", 1.0)
    for key in _SAID:
        if key not in values:
            found.append(Problem("is not set there: the default here holds", "", file, key=key, severity="note"))
    for key in ("base.name", "output"):
        if key not in values:
            values[key] = {"base.name": "FILL-IN", "output": "adapters/imported"}[key]
            found.append(Problem("was not found there", f"fill in {key}", file, key=key, severity="warning"))
    if str(values["base.name"]).startswith(("/", "~")):
        fix = "write its hub id, or your own folder"
        found.append(Problem("is a folder of another machine", fix, file, key="base.name", severity="warning"))
    if not draft.sources:
        draft.sources.append({"source": "FILL-IN.jsonl"})
        found.append(
            Problem("no data set was found there", "fill in data[].source", file, key="data", severity="warning")
        )
    if draft.tool == "LLaMA-Factory":
        reason = "data sets are names of its dataset_info.json"
        found.append(
            Problem(reason, "write the file or the hub id of each source", file, key="data", severity="warning")
        )
    return found


def _text(draft: Draft, path: Path, found: list[Problem]) -> str:
    """The recipe as YAML; above it, as comments, what was left out."""
    tree: dict[str, Any] = {"data": [source | draft.every_source for source in draft.sources]}
    for key, value in draft.values.items():
        section, _, name = key.partition(".")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    lines = ["# yaml-language-server: $schema=recipe.schema.json", f"# From {draft.tool}'s {path.name}."]
    lines += [f"#   {problem.key}: {problem.reason}" for problem in found if problem.severity == "warning"]
    body = "".join(yaml_lines({key: tree[key] for key in _ORDER if key in tree}))
    return "\n".join(lines) + "\n" + body

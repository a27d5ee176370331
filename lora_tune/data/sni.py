"""Task files of Super-NaturalInstructions: a definition, solved examples, and instances with one or more right answers.

A task file is one JSON object; each of its instances becomes a row

    task, category, definition, examples [{input, output}], input, output [text, …]

Source: Wang et al. 2022 (Super-NaturalInstructions, arXiv 2204.07705), section 3 and figure 1, for files and prompt.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Mapping
from json.decoder import JSONDecodeError
from pathlib import Path
from typing import Any

from lora_tune.data.conversation import Conversation, Message
from lora_tune.data.json_text import RowParser, explain
from lora_tune.data.messages import must_be_text
from lora_tune.data.rows import WHOLE_FILE, BadRow, Record, kind_of

MAX_BYTES = 64 << 20  # the largest task file has about 30 MB
_TASK = re.compile(r"task\d+.*")
_SPACE = re.compile(r"[ \t\r\n]*")


def records(path: Path, *, shots: int) -> Iterator[Record]:
    """The instances of one task file as rows with at most `shots` positive examples, each at its line."""
    with open(path, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise BadRow(WHOLE_FILE, f"a task file of more than {MAX_BYTES >> 20} MiB", fix="split it")
        task, instances = _parts(content.decode("utf-8-sig"))
        definition = _definition(task)
        examples = _examples(task)
        if len(examples) < shots:
            reason = f"the task has {len(examples)} positive examples, but shots is {shots}"
            raise BadRow(WHOLE_FILE, reason, fix="lower data[].shots")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        yield Record(line, None, BadRow(WHOLE_FILE, "not UTF-8", fix="save the file as UTF-8"))
        return
    except BadRow as bad:
        yield Record(1, None, bad)
        return
    about = {"task": _name(path), "category": _first(task.get("Categories")), "definition": definition}
    for line, instance in instances:
        if not isinstance(instance, dict):
            yield Record(line, None, BadRow("wrong shape", f"an instance must be an object, got {kind_of(instance)}"))
            continue
        shown = [one for one in examples if one["input"] != instance.get("input")][:shots]
        yield Record(line, {**about, "examples": shown, **instance})


def sni(row: Mapping[str, Any], fields: Mapping[str, str]) -> Conversation:
    """definition, examples, input and output of one instance; all right answers are kept. Raises: BadRow."""
    definition, text = (_text(row, fields, name) for name in ("definition", "input"))
    answers = row.get(fields["output"])
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise BadRow("wrong shape", f"`{fields['output']}` must be text or a list of texts, got {kind_of(answers)}")
    kept = list(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))
    if not kept:
        raise BadRow("empty answer", f"`{fields['output']}` is empty", fix="write the answer or drop the row")
    parts = [f"Definition: {definition.strip()}"]
    examples = row.get(fields["examples"]) or []
    for number, example in enumerate(examples, 1):
        parts.append(
            f"Positive Example {number}\nInput: {example['input'].strip()}\nOutput: {example['output'].strip()}"
        )
    parts.append(f"Now complete the following example.\nInput: {text.strip()}\nOutput:")
    return Conversation(
        (Message("user", "\n\n".join(parts)), Message("assistant", kept[0])),
        task=str(row.get(fields["category"]) or ""),
        template=str(row.get(fields["task"]) or ""),
        references=tuple(kept[1:]),
    )


def _text(row: Mapping[str, Any], fields: Mapping[str, str], name: str) -> str:
    value = row.get(fields[name])
    if not isinstance(value, str):
        raise BadRow("wrong shape", f"`{fields[name]}` {must_be_text(value)}")
    return value


def _parts(text: str) -> tuple[dict[str, Any], list[tuple[int, Any]]]:
    """The task without its instances, and each instance with its line. Raises: BadRow."""
    parser = RowParser()
    task: dict[str, Any] = {}
    instances: list[tuple[int, Any]] | None = None
    try:
        at = _expect(text, 0, "{")
        while text[at : at + 1] != "}":
            key, end = parser.parse_at(text, at)
            at = _expect(text, end, ":")
            if key == "Instances" and text[at : at + 1] == "[":
                instances, at = _array(parser, text, at)
            else:
                task[str(key)], at = parser.parse_at(text, at)
            at = _next(text, at, "}")
    except JSONDecodeError as error:
        line = text.count("\n", 0, error.pos) + 1
        raise BadRow(WHOLE_FILE, f"not JSON at line {line}: {explain(error)}", fix="repair the file") from None
    except RecursionError:
        raise BadRow(WHOLE_FILE, "nested too deep", fix="repair the file") from None
    parser.checked(task, "")
    if instances is None:
        known = ", ".join(f"`{name}`" for name in [*task][:5])
        raise BadRow(
            WHOLE_FILE, f"`Instances` is missing, got {known or 'nothing'}", fix="name a task file, or a format"
        )
    return task, instances


def _array(parser: RowParser, text: str, at: int) -> tuple[list[tuple[int, Any]], int]:
    """The elements of the array that begins at `at`, with their lines, and where it ends. Raises: JSONDecodeError."""
    found: list[tuple[int, Any]] = []
    line, counted = 1, 0
    at = _skip(text, at + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        value, end = parser.parse_at(text, at)
        found.append((line, value))
        at = _next(text, end, "]")
    return found, at + 1


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _expect(text: str, at: int, character: str) -> int:
    at = _skip(text, at)
    if text[at : at + 1] != character:
        raise JSONDecodeError(f"Expecting '{character}' delimiter", text, at)
    return _skip(text, at + 1)


def _next(text: str, at: int, closing: str) -> int:
    """Behind the comma that follows, or at the closing bracket. Raises: JSONDecodeError."""
    at = _skip(text, at)
    return at if text[at : at + 1] == closing else _expect(text, at, ",")


def _definition(task: Mapping[str, Any]) -> str:
    given = task.get("Definition")
    text = _first(given)
    if not text.strip():
        raise BadRow(WHOLE_FILE, f"`Definition` must be text or a list of texts, got {kind_of(given)}", fix="write it")
    return text


def _examples(task: Mapping[str, Any]) -> list[dict[str, str]]:
    given = task.get("Positive Examples")
    found = []
    for example in given if isinstance(given, list) else []:
        if isinstance(example, dict):
            one, answer = example.get("input"), _first(example.get("output"))
            if isinstance(one, str) and answer:
                found.append({"input": one, "output": answer})
    return found


def _first(value: Any) -> str:
    """A text, or the first of a list of texts; "" for anything else."""
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, str) else ""


def _name(path: Path) -> str:
    """The task's name: `task363_sst2_polarity_classification` of the file or of its folder, else the file's stem."""
    stem = path.name.removesuffix(".gz").removesuffix(".json")
    return next((name for name in (stem, path.parent.name) if _TASK.fullmatch(name)), stem)

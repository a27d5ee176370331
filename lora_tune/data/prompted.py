"""Rows to conversations by prompt templates: which template, how many solved examples, options, turned round or not.

Each row takes the template with the lowest hash of seed, row and template name, so that a template added or removed
changes no other row; where that one does not apply (it renders nothing), the next. A held-out task is asked with every
template, zero-shot. Solved examples are other training rows of the same source with the same template.

Sources: Sanh et al. 2022 (T0, arXiv 2110.08207), section 4; Wei et al. 2022 (FLAN, arXiv 2109.01652), sections 2.1 and
2.2 (options, inverted templates); Longpre et al. 2023 (arXiv 2301.13688), section 3 (zero- and few-shot, inversion).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path, PurePath
from typing import Any, Literal

from lora_tune.data.conversation import Conversation, Message
from lora_tune.data.ledger import SourceLedger, place_of
from lora_tune.data.prompt_file import PromptFile, read_prompts
from lora_tune.data.rendering import Job, Render, failed, render, variables
from lora_tune.data.rows import BadRow, did_you_mean
from lora_tune.data.store import ConversationStore
from lora_tune.errors import Problem, RecipeError
from lora_tune.recipe import DataSource

NO_CHOICE, FEWER_SHOTS = "the answer is none of the choices", "fewer solved examples than shots"
Side = Literal["train", "held_out"]
_INVERTED = " (inverted)"
_TURNED_ROUND = "{answer}\n\nWrite the input that this is the answer to."
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str).encode


@dataclass(frozen=True)
class Prompts:
    """The templates of one source, checked; template i reads `columns[i]`, and its name is shown with `prefix`."""

    file: PromptFile
    columns: tuple[frozenset[str], ...]
    prefix: str = ""

    @property
    def needed(self) -> frozenset[str]:
        """Every column that one of the templates reads."""
        return frozenset().union(*self.columns)

    def label(self, number: int) -> str:
        """The name of a template in scores and messages."""
        return self.prefix + self.file.prompts[number].name


def open_prompts(data: Sequence[DataSource]) -> dict[int, Prompts]:
    """The prompt files of all sources that name one, by number of the source.

    Raises:
        UsageError: a file that cannot be read.
        RecipeError: a file or template that cannot be used, an unknown template, options where none can be shown.
    """
    found: dict[int, Prompts] = {}
    problems: list[Problem] = []
    for number, source in enumerate(data):
        if source.prompts is None:
            continue
        try:
            file = read_prompts(Path(source.prompts), templates=source.templates, key=f"data.{number}.templates")
            columns = tuple(variables(file))
        except RecipeError as error:
            problems.extend(problem for problem in error.problems if problem not in problems)
            continue
        same_task = {other.prompts for other in data if other.prompts and other.task == source.task}
        prefix = f"{PurePath(file.name).stem}: " if source.task and len(same_task) > 1 else ""
        found[number] = Prompts(file, columns, prefix)
        if source.options and not any(prompt.choices and not prompt.lists_choices for prompt in file.prompts):
            reason = f"no template of {file.file} has answer_choices that it does not list itself"
            problems.append(
                Problem(reason, "write answer_choices: 'no ||| yes', or remove options", key=f"data.{number}.options")
            )
    if problems:
        raise RecipeError(problems)
    return found


def raw_row(row: Mapping[str, Any], prompts: Prompts, columns: Mapping[str, str] | None) -> Conversation:
    """A row as it is kept until it is rendered: its columns as JSON. Raises: BadRow where a column is missing."""
    values = {**row, **{name: row[column] for name, column in (columns or {}).items() if column in row}}
    for name in sorted(prompts.needed):
        if name not in values:
            got = ", ".join(f"`{key}`" for key in list(row)[:5]) + (" …" if len(row) > 5 else "")
            fix = did_you_mean(name, list(row)) or "add the column, or name it in data[].columns"
            raise BadRow("wrong shape", f"`{name}` is missing, got {got}", fix=fix)
    return Conversation(text=_ENCODE(dict(sorted(values.items()))))


@dataclass
class PromptedRows:
    """Renders the raw rows of one source in a store; the conversations are appended to the same store.

    `train`, `held_out` and `every` take and return indices of the store. `pools` are the solved examples by template,
    (index of the conversation, hash of the raw row). `problems` are templates that failed.
    """

    store: ConversationStore
    prompts: Prompts
    wanted: DataSource
    account: SourceLedger
    number: int
    seed: int
    pools: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def train(self, rows: Iterable[int]) -> list[int]:
        """One conversation a row, some of them turned round; then with solved examples before them."""
        made = [(raw, new, prompt) for raw, prompt, new in self._one_each(rows, side="train")]
        for raw, new, prompt in made:
            if not self.store[new].template.endswith(_INVERTED):
                self.pools.setdefault(prompt, []).append((new, self.store.digest(raw)))
        return [self._with_examples(raw, new, prompt, self.pools) for raw, new, prompt in made]

    def held_out(self, rows: Iterable[int], pools: Mapping[int, list[tuple[int, bytes]]]) -> list[int]:
        """One conversation a row, with solved examples from the training rows."""
        made = list(self._one_each(rows, side="held_out"))
        return [self._with_examples(raw, new, prompt, pools) for raw, prompt, new in made]

    def every(self, rows: Iterable[int]) -> list[int]:
        """One conversation for each row and template, without examples: a task that is evaluated zero-shot."""
        numbers = range(len(self.prompts.file.prompts))
        rows = list(rows)
        jobs = (self._job(raw, number) for raw in rows for number in numbers)
        pairs = ((raw, number) for raw in rows for number in numbers)
        found: dict[int, list[int]] = {raw: [] for raw in rows}
        errors: dict[int, list[tuple[Job, str]]] = {}
        for (raw, number), (job, made) in zip(pairs, render(self.prompts.file, jobs), strict=True):
            if made.error:
                errors.setdefault(number, []).append((job, made.error))
            elif made.applies:
                found[raw].append(self._append(raw, number, made, invert="no"))
        for number, failures in errors.items():
            self._failed(number, failures, rows=0)
        lone = [raw for raw, new in found.items() if not new]
        self._skip(lone, side="held_out")
        more = sum(len(new) - 1 for new in found.values() if new)
        self.account.more += more
        self.account.held_out += more
        return [index for new in found.values() for index in new]

    def _one_each(self, rows: Iterable[int], *, side: Side) -> Iterator[tuple[int, int, int]]:
        """(raw row, template, conversation) of each row that a template applies to, in the order of the rows."""
        rows = list(rows)
        pending = [(raw, self._order(raw)) for raw in rows]
        found: dict[int, tuple[int, int]] = {}
        errors: dict[int, list[tuple[Job, str]]] = {}
        for attempt in range(len(self.prompts.file.prompts)):
            left = []
            jobs = (self._job(raw, order[attempt]) for raw, order in pending)
            for (raw, order), (job, made) in zip(pending, render(self.prompts.file, jobs), strict=True):
                if made.error:
                    errors.setdefault(job.prompt, []).append((job, made.error))
                elif made.applies:
                    invert = "yes" if side == "train" and self._inverts(raw) else "no"
                    found[raw] = (job.prompt, self._append(raw, job.prompt, made, invert=invert))
                else:
                    left.append((raw, order))
            pending = left
            if not pending:
                break
        for number, failures in errors.items():
            self._failed(number, failures, rows=len(failures), side=side)
        self._skip([raw for raw, _ in pending], side=side)
        return ((raw, *found[raw]) for raw in rows if raw in found)

    def _append(self, raw: int, number: int, made: Render, *, invert: str) -> int:
        """Put the conversation of a render into the store."""
        question, answer = made.parts[:2]
        choices = tuple(dict.fromkeys(choice for choice in made.choices if choice))
        place = self.store.place(raw)
        if choices and answer not in choices:
            self.account.note(NO_CHOICE, place_of(*place))
            choices = ()
        if self.wanted.options and choices and not self.prompts.file.prompts[number].lists_choices:
            question = "\n".join([question, "", "OPTIONS:", *(f"- {choice}" for choice in choices)])
        template = self.prompts.label(number)
        references = tuple(part for part in made.parts[2:] if part)
        if invert == "yes":
            question, answer = _TURNED_ROUND.format(answer=answer), question
            choices, references, template = (), (), template + _INVERTED
        conversation = Conversation(
            (Message("user", question), Message("assistant", answer)),
            task=self.wanted.task or "",
            template=template,
            choices=choices,
            references=references,
        )
        return self.store.append(conversation, source=self.number, file=place[0], line=place[1])

    def _with_examples(self, raw: int, new: int, prompt: int, pools: Mapping[int, list[tuple[int, bytes]]]) -> int:
        """The conversation with `shots` solved examples in front, never its own row; itself where none are wanted."""
        wanted, conversation = self.wanted.shots, self.store[new]
        if not wanted or conversation.template.endswith(_INVERTED):
            return new
        pool, own = pools.get(prompt, []), self.store.digest(raw)
        draw = random.Random(self._number(raw, "examples"))
        tried = draw.sample(pool, min(len(pool), 4 * wanted + 8))
        examples = [self.store[index].messages for index, digest in tried if digest != own][:wanted]
        file, line = self.store.place(raw)
        if len(examples) < wanted:
            self.account.note(FEWER_SHOTS, place_of(file, line))
        if not examples:
            return new
        shown = [f"{question.content}\n{answer.content}" for question, answer in examples]
        question = Message("user", "\n\n".join([*shown, conversation.messages[0].content]))
        return self.store.append(
            Conversation(
                (question, conversation.messages[1]),
                task=conversation.task,
                template=conversation.template,
                choices=conversation.choices,
                references=conversation.references,
            ),
            source=self.number,
            file=file,
            line=line,
        )

    def _job(self, raw: int, number: int) -> Job:
        file, line = self.store.place(raw)
        name = self.prompts.file.prompts[number].name
        return Job(number, self._number(raw, f"draw {name}"), self.store[raw].text or "{}", f"{file}:{line}")

    def _order(self, raw: int) -> list[int]:
        """Numbers of the templates in the order in which they are tried for a row."""
        prompts = self.prompts.file.prompts
        return sorted(range(len(prompts)), key=lambda number: self._number(raw, f"template {prompts[number].name}"))

    def _inverts(self, raw: int) -> bool:
        return self._number(raw, "invert") < float(self.wanted.invert.rstrip(" %")) / 100 * 2**64

    def _number(self, raw: int, purpose: str) -> int:
        """A number below 2**64 from seed, row and purpose."""
        text = f"{self.seed}\0{purpose}\0".encode()
        return int.from_bytes(blake2b(text + self.store.digest(raw), digest_size=8).digest(), "big")

    def _failed(self, number: int, failures: Sequence[tuple[Job, str]], *, rows: int, side: Side = "held_out") -> None:
        """A template that raised: a problem, or rows dropped and counted where `on_bad_row` says so."""
        (job, error), times = failures[0], len(failures)
        if self.wanted.on_bad_row == "refuse":
            self.problems.append(failed(self.prompts.file, job, error, times))
            return
        file, _, line = job.place.rpartition(":")
        cause = f"template {self.prompts.file.prompts[number].name!r} fails"
        if not rows:
            self.account.note(cause, place_of(file, int(line)), times)
            return
        self.account.drop(cause, place_of(file, int(line)), rows)
        self._take_off(rows, side)

    def _skip(self, rows: Sequence[int], *, side: Side) -> None:
        """Count rows to which no template applies."""
        self.account.skipped += len(rows)
        self._take_off(len(rows), side)

    def _take_off(self, rows: int, side: Side) -> None:
        if side == "train":
            self.account.kept -= rows
        else:
            self.account.held_out -= rows

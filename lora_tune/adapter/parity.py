"""Does another engine feed the adapter the words that it was trained on? Token for token, by the engine's own renderer.

Held-out conversations are cut before each answer. The target renders the turns so far as it would for a request, and
that must be what stands before the answer in the training row; the token that ends the answer there must be one at
which the target stops.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tune.adapter.folder import MANIFEST, read_manifest
from lora_tune.data.conversation import Conversation, Message
from lora_tune.errors import CheckFailed, LoraTuneError, Problem

if TYPE_CHECKING:
    from lora_tune.data.chat_template import ChatTemplate, TokenRow

Render = Callable[[Conversation], Sequence[int]]
"""The ids that a target feeds the model for a request of these turns; the last one is no assistant's."""
ROWS = 16
_SHOWN = 6  # tokens before and after the place where two lists part
_RECIPE = "recipe.yaml"
FIXED: tuple[Conversation, ...] = tuple(
    Conversation(messages=tuple(Message(role, text) for role, text in turns), file="fixed conversation", line=number)  # type: ignore[arg-type]
    for number, turns in enumerate(
        (
            [("user", "What is the capital of France?"), ("assistant", "Paris.")],
            [
                ("user", "Name a colour."),
                ("assistant", "Blue."),
                ("user", "Another one,\nwith two lines: ä, 雪, 🙂"),
                ("assistant", "Green."),
            ],
            [("system", "You answer in one word."), ("user", "Who wrote Hamlet?"), ("assistant", "Shakespeare.")],
        ),
        1,
    )
)
"""Compared in addition to held-out rows, which often have one turn and no system message."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a target's ids part from those of training: the row, the place (from 0), and the ids around it of both."""

    where: str
    position: int
    trained: tuple[int, ...]
    given: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Parity:
    """What was compared. `rows` conversations with `prompts` answers and `tokens` tokens before them, all equal.

    `fixed` of the rows are the fixed conversations. `left_out`: rows that hold control tokens as words, which training
    encodes as plain text and no engine does, rows of plain text, and rows that the template refuses.
    """

    rows: int
    prompts: int
    tokens: int
    fixed: int
    left_out: int

    def __str__(self) -> str:
        text = f"{self.prompts} prompts of {self.rows} conversations ({self.tokens:,} tokens) equal those of training"
        return text + (f"; {self.left_out} rows could not be compared" if self.left_out else "")


def held_out_conversations(
    folder: Path, chat: ChatTemplate, *, rows: int = ROWS, data: Path | None = None
) -> list[Conversation]:
    """Conversations to compare words on: `rows` held-out ones, evenly spread, and the fixed ones.

    The rows are those of the file `data`; else those that the folder's run held out, where its data is at hand below
    the working folder with the recorded hashes; else none. Of the fixed ones, those are left out that the template
    refuses (some take no system message).

    Raises: DataError, UsageError where `data` cannot be read.
    """
    from lora_tune.data.held_out import rows_in
    from lora_tune.recipe import DataSource

    if data is not None:
        stored, _ = rows_in([DataSource(source=str(data.resolve()))], seed=0)
        found: list[Conversation] = _spread(stored, rows)
    else:
        found = _recorded_rows(folder, rows)
    usable = [isinstance(entry, list) for entry in chat.rows(FIXED, loss_on="last_assistant")]
    return [*found, *(one for one, fits in zip(FIXED, usable, strict=True) if fits)]


def check_parity(
    chat: ChatTemplate, render: Render, conversations: Sequence[Conversation], *, stop_ids: Collection[int], target: str
) -> Parity:
    """Compare what `target` feeds the model with the rows of training; `stop_ids` are where it ends an answer.

    Raises: CheckFailed where a prompt differs, saying at which token, where the target does not stop at the token that
    ends the trained answer, or where nothing can be compared.
    """
    prompts = tokens = left_out = 0
    kept: list[Conversation] = []
    for conversation in conversations:
        turns = list(_trained_turns(chat, conversation))
        if not turns:
            left_out += 1
            continue
        kept.append(conversation)
        for request, row in turns:
            trained, end = _prompt_and_end(row)
            given = _rendered(render, request, target)
            if trained != given:
                raise CheckFailed(_parting(chat, _place(request), trained, given, target=target))
            if end not in stop_ids:
                raise CheckFailed(_no_stop(chat, end, stop_ids, target=target))
            prompts, tokens = prompts + 1, tokens + len(trained)
    if not prompts:
        reason = f"the words that {target} would feed cannot be compared with training: no conversation fits"
        raise CheckFailed(Problem(reason, "give held-out rows with --data"))
    fixed = sum(one.file == FIXED[0].file for one in kept)
    return Parity(len(kept), prompts, tokens, fixed, left_out)


def first_difference(trained: Sequence[int], given: Sequence[int], *, where: str) -> Difference | None:
    """Where two lists of ids part, with some ids around that place; None where they are equal."""
    if list(trained) == list(given):
        return None
    pairs = zip(trained, given, strict=False)
    position = next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(trained), len(given)))
    around = slice(max(0, position - _SHOWN), position + _SHOWN)
    return Difference(where, position, tuple(map(int, trained[around])), tuple(map(int, given[around])))


def _trained_turns(chat: ChatTemplate, conversation: Conversation) -> Iterator[tuple[Conversation, TokenRow]]:
    """For each trained answer: the request that it answers, and the training row that ends with it."""
    places = [
        number
        for number, message in enumerate(conversation.messages)
        if message.role == "assistant" and message.weight and number
    ]
    parts = [replace(conversation, messages=conversation.messages[: number + 1]) for number in places]
    for part, entry in zip(parts, chat.rows(parts, loss_on="last_assistant"), strict=True):
        if isinstance(entry, list) and len(entry) == 1 and not entry[0].notes & {"control_tokens", "no_trained_token"}:
            yield replace(part, messages=part.messages[:-1]), entry[0]


def _prompt_and_end(row: TokenRow) -> tuple[list[int], int]:
    """The ids before the first trained token, and the last trained one."""
    trained = row.mask.nonzero()[0]
    return [int(token) for token in row.input_ids[: trained[0]]], int(row.input_ids[trained[-1]])


def _rendered(render: Render, request: Conversation, target: str) -> list[int]:
    try:
        return [int(token) for token in render(request)]
    except CheckFailed as error:
        reason = f"{_place(request)}: {target} cannot render it: {error.problems[0].reason}"
        raise CheckFailed(Problem(reason, error.problems[0].fix)) from None


def _parting(
    chat: ChatTemplate, place: str, trained: Sequence[int], given: Sequence[int], *, target: str
) -> list[Problem]:
    found = first_difference(trained, given, where=place)
    if found is None:
        return []
    read = chat.tokenizer.decode
    reason = (
        f"{found.where}: {target} would feed other words than training, from token {found.position} on: trained on "
        f"{list(found.trained)} ({str(read(list(found.trained)))!r}), got {list(found.given)} "
        f"({str(read(list(found.given)))!r})"
    )
    return [Problem(reason, "export it --to merged, which brings its own template, or to another target")]


def _no_stop(chat: ChatTemplate, end: int, stop_ids: Collection[int], *, target: str) -> Problem:
    name = chat.tokenizer.convert_ids_to_tokens
    stops = ", ".join(f"{name(int(token))!r} ({token})" for token in stop_ids) or "none"
    reason = f"training ends an answer with {name(end)!r} ({end}), where {target} does not stop; it stops at {stops}"
    return Problem(reason, "its answers would not end: export it --to merged, or to another target")


def _place(conversation: Conversation) -> str:
    return f"{conversation.file}:{conversation.line}" if conversation.file else f"row {conversation.line}"


def _recorded_rows(folder: Path, rows: int) -> list[Conversation]:
    """The held-out rows of the folder's own run, where its data is at hand; else none."""
    from lora_tune.data.held_out import rows_of
    from lora_tune.data.recorded import Finder, Recorded, with_found_data
    from lora_tune.recipe_file import read_stored_recipe

    if not (folder / MANIFEST).exists() or not (folder / _RECIPE).exists():
        return []
    recorded = [Recorded(one.name, one.format, one.sha256, one.revision) for one in read_manifest(folder).data]
    if any(one.revision for one in recorded):
        return []  # on the hub; an export makes no connections
    try:
        recipe = with_found_data(
            read_stored_recipe(folder / _RECIPE), recorded, Finder((), Path.cwd()), where=str(folder)
        )
        stored, _ = rows_of(recipe)
    except LoraTuneError:
        return []
    return _spread(stored, rows)


def _spread(stored: Sequence[Conversation], rows: int) -> list[Conversation]:
    """`rows` of the conversations, evenly over all of them."""
    count = len(stored)
    return [stored[number] for number in sorted({n * count // rows for n in range(rows)})] if count else []

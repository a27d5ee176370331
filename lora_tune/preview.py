"""`lora-tune preview RECIPE`: the very rows that will be trained, with their loss mask, and the ledger.

Needs the base's tokenizer and config, no weights. Refused data ends it with exit code 3 and every problem named.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lora_tune.errors import DataError, Problem, UsageError
from lora_tune.model.source import BaseSource, find_base, load_tokenizer
from lora_tune.recipe_file import RecipeFile, read_recipe
from lora_tune.terminal import activity, print_json, print_problems, print_table, printable, results, run_app

if TYPE_CHECKING:
    from lora_tune.data.chat_template import ChatTemplate, TokenRow
    from lora_tune.data.fit import Documents
    from lora_tune.data.kept_conversations import Conversations
    from lora_tune.data.near_duplicates import NearDuplicates
    from lora_tune.data.page import Run, ShownRow
    from lora_tune.data.pipeline import Prepared

app = typer.Typer(help="Show the rows as they will be trained: tokens, loss mask, ledger.", add_completion=False)
_BINS = 12
_SHOWN_CHARACTERS = 1500  # of a row in the terminal, unless one row is asked for
_PAGE_ROWS = 50
_STYLES = {"trained": "green", "masked": "dim", "control masked": "magenta", "control trained": "bold green reverse"}


@dataclass(frozen=True)
class Preview:
    """Everything that is shown: the base and template in use, what is trained, and the near duplicates if asked for."""

    source: BaseSource
    chat: ChatTemplate
    prepared: Prepared
    near: NearDuplicates | None


@app.command()
def command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, such as train.epochs=2")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file.")] = None,
    row: Annotated[int | None, typer.Option(min=1, help="Show this row of the data, in full.")] = None,
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show.")] = 3,
    near: Annotated[bool, typer.Option("--near-duplicates", help="Look for rows that are nearly equal.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the rows as they will be trained: tokens, loss mask, ledger."""
    file = read_recipe(recipe, overrides=overrides or ())
    found = look(file, search="near" if near else "exact", on_refusal=None if as_json else _print_ledger)
    shown = _chosen(found.prepared.documents, row=row, count=max(rows, _PAGE_ROWS if html else 0))
    if html:
        _write_page(html, file, found, shown)
    shown = shown if row else shown[:rows]
    if as_json:
        print_json(_facts(found, shown), found.prepared.ledger.warnings())
    else:
        _print(file, found, shown, cut=None if row else _SHOWN_CHARACTERS)
        if html:
            results().print(f"page: {html}")


def look(
    file: RecipeFile,
    *,
    search: Literal["exact", "near"] = "exact",
    on_refusal: Callable[[Sequence[Sequence[str]]], None] | None = None,
) -> Preview:
    """Read, check and encode the data of a recipe exactly as `run` does.

    `search`: "near" looks for near duplicates as well. `on_refusal` gets the ledger's table before a limit stops it.

    Raises:
        RecipeError, UsageError: the recipe or the base does not do.
        DataError: rows are wrong, or a limit of the ledger is exceeded.
    """
    recipe = file.recipe
    source = find_base(recipe.base)
    print_problems(file.warnings)
    with activity("checking the data"):
        from lora_tune.data.checking import read_conversations

        with file.locating():
            conversations = read_conversations(recipe.data, hold_out=recipe.eval, seed=recipe.seed)
    with activity("tokenizing"):
        try:
            chat, prepared = _encoded(file, source, conversations)
        except DataError:
            if on_refusal is not None:
                on_refusal(conversations.ledger.table())
            raise
        if conversations.held_out:
            from lora_tune.data.overlap import known_overlap

            prepared.ledger.overlap = known_overlap(conversations.train, conversations.held_out)
    nearly = None
    if search == "near":
        with activity("looking for near duplicates"):
            from lora_tune.data.near_duplicates import near_duplicates

            nearly = near_duplicates(conversations.train, conversations.held_out)
    return Preview(source, chat, prepared, nearly)


def _encoded(file: RecipeFile, source: BaseSource, conversations: Conversations) -> tuple[ChatTemplate, Prepared]:
    from lora_tune.data.chat_template import load_chat_template
    from lora_tune.data.pipeline import encode

    recipe = file.recipe
    tokenizer = load_tokenizer(source, new_tokens=recipe.lora.new_tokens)
    text = Path(recipe.base.chat_template).read_text(encoding="utf-8") if recipe.base.chat_template else None
    chat = load_chat_template(tokenizer, template=text, data="tools" if conversations.has_tools else "plain")
    prepared = encode(
        conversations,
        chat,
        loss_on=recipe.loss_on,
        train=recipe.train,
        limits=recipe.limits,
        seed=recipe.seed,
        mixing=recipe.mixing,
    )
    return chat, prepared


def _chosen(documents: Documents, *, row: int | None, count: int) -> list[TokenRow]:
    """The documents of one row of the data, or `count` of them spread over all. Raises: UsageError."""
    if row is not None:
        try:
            return list(documents.of_row(row))
        except IndexError as error:
            raise UsageError(
                f"--row {row}: the data has {error.args[0]:,} rows that are trained", "name a lower one"
            ) from None
    if not count:
        return []
    step = max(len(documents) / count, 1)
    return [documents[int(i * step)] for i in range(min(count, len(documents)))]


def runs_of(row: TokenRow, chat: ChatTemplate) -> tuple[Run, ...]:
    """Neighbouring tokens of one kind, decoded together, so that characters of several tokens survive."""
    from lora_tune.data.page import Run

    control = {number for number, token in chat.tokenizer.added_tokens_decoder.items() if token.special}
    ids = row.input_ids.tolist()
    kinds = [
        ("control " if i in control else "") + ("trained" if m else "masked")
        for i, m in zip(ids, row.mask, strict=True)
    ]
    runs: list[Run] = []
    start, before = 0, ""
    for end in range(1, len(ids) + 1):
        if end < len(ids) and kinds[end] == kinds[start]:
            continue
        so_far = _decoded(chat, ids[:end])
        text = so_far[len(before) :] if so_far.startswith(before) else _decoded(chat, ids[start:end])
        runs.append(Run(text, kinds[start]))
        start, before = end, so_far
    return tuple(runs)


def _decoded(chat: ChatTemplate, ids: list[int]) -> str:
    return str(chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _shown(row: TokenRow, chat: ChatTemplate) -> ShownRow:
    from lora_tune.data.ledger import place_of
    from lora_tune.data.page import ShownRow

    about = f"{len(row.input_ids):,} tokens, {int(row.mask.sum()):,} trained"
    notes = [note.replace("_", " ") for note in sorted(row.notes)]
    about = ", ".join([*(name for name in (row.task, row.template) if name), about, *notes])
    return ShownRow(place_of(row.file, row.line), about, runs_of(row, chat))


def _histogram(documents: Documents) -> list[dict[str, Any]]:
    """Bars over the lengths of the documents: {label, count, percent of the tallest}."""
    import numpy as np

    lengths = documents.lengths
    shortest = int(lengths.min())
    width = -(-(int(lengths.max()) - shortest + 1) // _BINS)
    counts = np.bincount((lengths - shortest) // width).tolist()
    tallest = max(counts)
    return [
        {"label": _span(shortest + i * width, width), "count": count, "percent": round(100 * count / tallest, 1)}
        for i, count in enumerate(counts)
    ]


def _span(first: int, width: int) -> str:
    return f"{first}–{first + width - 1}" if width > 1 else str(first)


def _about(file: RecipeFile, found: Preview) -> list[str]:
    """Base, template, data and packing, a few words each."""
    chat, packing = found.chat, found.prepared.ledger.packing
    end = chat.tokenizer.convert_ids_to_tokens(chat.eos_id)
    own = "lora_tune's default template" if chat.is_default else "template of the base"
    if file.recipe.base.chat_template:
        own = f"template {Path(file.recipe.base.chat_template).name}"
    facts = [
        f"base: {found.source.name}",
        f"{own} ({chat.sha256[:8]}), answers end with {end}",
        f"loss on: {file.recipe.loss_on}",
    ]
    for identity in found.prepared.identities:
        facts.append(f"{identity.name}: {identity.format} ({identity.why}), sha256 {identity.sha256[:8]}")
    if packing is not None:
        sequences = f"{packing.sequences:,} sequences of up to {packing.max_length:,} tokens"
        facts.append(f"an epoch: {sequences} with {packing.documents:,} documents, {packing.efficiency:.1%} full")
    if found.near is not None:
        facts.append(_near(found.near))
    return facts


def _near(near: NearDuplicates) -> str:
    first = f" (first {near.first_train[0]}, like {near.first_train[1]})" if near.first_train else ""
    second = f" (first {near.first_held_out[0]}, like {near.first_held_out[1]})" if near.first_held_out else ""
    trained, held_out = f"{near.train:,} trained rows{first}", f"{near.held_out:,} held-out rows{second}"
    return f"near another trained row: {trained}, {held_out}; found in {near.seconds:.1f} s"


def _print_ledger(table: Sequence[Sequence[str]]) -> None:
    print_table("", table[0], table[1:])


def _print(file: RecipeFile, found: Preview, rows: Sequence[TokenRow], *, cut: int | None) -> None:
    """The preview in the terminal; without colours trained words stand between ⟦ and ⟧."""
    from rich.text import Text

    console = results()
    coloured = console.color_system is not None and not console.no_color
    for fact in _about(file, found):
        console.print(printable(fact))
    console.print()
    _print_ledger(found.prepared.ledger.table())
    console.print("\ntokens a document")
    bars = _histogram(found.prepared.documents)
    widest = max(len(bar["label"]) for bar in bars)
    for bar in bars:
        console.print(f"{bar['label']:>{widest}}  {'█' * round(bar['percent'] * 0.4)} {bar['count']:,}")
    legend = Text("\nrows: ")
    legend.append("trained" if coloured else "⟦trained⟧", style=_STYLES["trained"])
    console.print(legend.append(" not trained", style=_STYLES["masked"]))
    for row in rows:
        shown = _shown(row, found.chat)
        console.print(f"\n{printable(shown.place)}  {shown.about}", style="bold")
        console.print(_as_text(shown.runs, cut=cut, coloured="yes" if coloured else "no"))
    print_problems(found.prepared.ledger.warnings())


def _as_text(runs: Sequence[Run], *, cut: int | None, coloured: str) -> Any:
    """The runs as styled text of at most `cut` characters; the middle of what is longer is left out."""
    from rich.text import Text

    text, left = Text(), cut
    open_mark = ""
    for run in runs:
        shown = printable(run.text)
        if left is not None:
            half = max(left // 4, 40)
            if len(shown) > 2 * half + 100:
                shown = f"{shown[:half]} […{len(shown) - 2 * half:,} characters…] {shown[len(shown) - half :]}"
            left -= len(shown)
        mark = "⟦" if coloured == "no" and run.style.endswith("trained") else ""
        if mark != open_mark:
            text.append(mark or "⟧")
            open_mark = mark
        text.append(shown, style=_STYLES[run.style])
    return text.append("⟧" if open_mark else "")


def _facts(found: Preview, rows: Sequence[TokenRow]) -> dict[str, Any]:
    """What `--json` prints."""
    chat, prepared = found.chat, found.prepared
    return {
        "exit_code": 0,
        "base": found.source.name,
        "template": {
            "sha256": chat.sha256,
            "default": chat.is_default,
            "eos_id": chat.eos_id,
            "stop_ids": list(chat.stop_ids),
        },
        "sources": [asdict(identity) for identity in prepared.identities],
        "ledger": prepared.ledger.as_json(),
        "histogram": _histogram(prepared.documents),
        "near_duplicates": None if found.near is None else asdict(found.near),
        "rows": [
            {
                "file": row.file,
                "line": row.line,
                "task": row.task,
                "template": row.template,
                "input_ids": row.input_ids.tolist(),
                "mask": row.mask.astype(int).tolist(),
                "notes": sorted(row.notes),
                "runs": [asdict(run) for run in runs_of(row, chat)],
            }
            for row in rows
        ],
    }


def _write_page(path: Path, file: RecipeFile, found: Preview, rows: Sequence[TokenRow]) -> None:
    """Raises: UsageError where the file cannot be written."""
    from lora_tune.data.page import page

    ledger = found.prepared.ledger
    text = page(
        file.path.name,
        facts=_about(file, found),
        warnings=[str(warning) for warning in ledger.warnings()],
        ledger=ledger.table(),
        histogram=_histogram(found.prepared.documents),
        rows=[_shown(row, found.chat) for row in rows],
        template=found.chat.text,
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        problem = Problem(f"cannot be written: {error.strerror}", "name another file", file=str(path), key="--html")
        raise UsageError(problem) from None


if __name__ == "__main__":
    sys.exit(run_app(app, name="python -m lora_tune.preview"))

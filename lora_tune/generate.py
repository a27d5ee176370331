"""`lora-tune generate ADAPTER --data in.jsonl --out out.jsonl`: answer a file of prompts, in batches.

1. the adapter, its base and its chat template, 2. every prompt as tokens, 3. answers batch by batch, each kept on the
disk at once, 4. the output, in the order of the prompts. The same command goes on where it was killed.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lora_tune.adapter.folder import WEIGHTS, read_manifest
from lora_tune.errors import CheckFailed, DataError, Problem, UsageError
from lora_tune.terminal import activity, print_json, progress_bar, results, run_app

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lora_tune.data.chat_template import ChatTemplate
    from lora_tune.data.questions_file import AskedRow
    from lora_tune.evaluation.answers_file import AnswersFile
    from lora_tune.model.decoding import Decoding

app = typer.Typer(help="Answer a file of prompts.", add_completion=False)
Side = Literal["adapter", "base"]


@dataclass(frozen=True)
class Done:
    """What was answered: rows in all, rows kept from before, tokens and seconds of this command."""

    rows: int
    kept: int
    tokens: int
    seconds: float
    stopped: int


def answer_file(
    folder: Path,
    *,
    data: Path,
    out: Path,
    side: Side,
    decoding: Decoding,
    start: str,
    base: tuple[str | None, str | None] = (None, None),
) -> Done:
    """Answer every prompt of `data` into `out`; `base` is where the base lies and whose code may run.

    Raises: UsageError, DataError (prompts), CheckFailed (the adapter), ResourceError (memory, disk).
    """
    from lora_tune.adapter.at_hand import base_at_hand, chat_of_folder
    from lora_tune.data.questions_file import read_questions
    from lora_tune.evaluation.answers_file import open_answers

    with activity(f"verifying {folder}"):
        source, held = base_at_hand(folder, name=base[0], trust_remote_code=base[1])
    with activity("reading the prompts"):
        rows, chat = read_questions(data), chat_of_folder(folder)
        prompts = _prompts(rows, chat, data)
    manifest = read_manifest(folder)
    checks = {number: _hash(prompt) for number, prompt in enumerate(prompts)}
    settings = {
        "side": side,
        "adapter": manifest.files[WEIGHTS].sha256 if side == "adapter" else "",
        "base": manifest.base.model_dump(mode="json"),
        "template": chat.sha256,
        "decoding": asdict(decoding),
        "prompts": _hash([int(check[:15], 16) for check in checks.values()]),
    }
    with open_answers(out, settings=settings, checks=checks, start=start) as answers:
        kept = len(answers.done)
        tokens, seconds = 0, 0.0
        if kept < len(rows):
            with activity(f"loading {source.name} ({held.quantize})"):
                from lora_tune.adapter.load import load_adapter
                from lora_tune.model.base import load_base

                loaded = load_base(source, held, trust_remote_code=base[1])
                model = load_adapter(loaded, folder) if side == "adapter" else loaded
            tokens, seconds = _answer(model, chat, prompts, rows=rows, decoding=decoding, answers=answers)
        stopped = sum(bool(row["stopped"]) for row in answers.done.values())
        answers.finish()
    return Done(len(rows), kept, tokens, seconds, stopped)


def _prompts(rows: Sequence[AskedRow], chat: ChatTemplate, data: Path) -> list[list[int]]:
    """The tokens of every prompt. Raises: DataError naming each that the template refuses."""
    prompts, problems = [], []
    for row in rows:
        try:
            prompts.append(chat.prompt_ids(row.messages, tools=row.tools))
        except CheckFailed as error:
            problems.append(Problem(error.problems[0].reason, "change the row", file=str(data), line=row.line))
    if problems:
        raise DataError(problems)
    return prompts


def _answer(
    model: PeftModel | PreTrainedModel,
    chat: ChatTemplate,
    prompts: Sequence[Sequence[int]],
    *,
    rows: Sequence[AskedRow],
    decoding: Decoding,
    answers: AnswersFile,
) -> tuple[int, float]:
    """Answer what is not there yet, and keep it batch by batch. Returns tokens and seconds."""
    from lora_tune.model.generation import answer_batches

    tokens, began = 0, time.perf_counter()
    with activity("answering"), progress_bar() as bar:
        task = bar.add_task("rows", total=len(prompts), completed=len(answers.done))
        for batch in answer_batches(model, chat, prompts, decoding=decoding, done=set(answers.done)):
            before = len(answers.done)
            answers.add(
                {
                    number: {**_said(rows[number]), "answer": one.text, "stopped": one.stopped, "tokens": len(one.ids)}
                    for number, one in batch.items()
                }
            )
            tokens += sum(len(one.ids) for one in batch.values())
            bar.advance(task, len(answers.done) - before)
    return tokens, time.perf_counter() - began


def _said(row: AskedRow) -> dict[str, Any]:
    """What of the question stands beside its answer."""
    turns = [message.as_template_input() for message in row.messages]
    alone = len(turns) == 1 and row.messages[0].role == "user"
    known = {"line": row.line, "id": row.id} if row.id is not None else {"line": row.line}
    return {**known, "prompt": row.messages[0].content} if alone else {**known, "messages": turns}


def _hash(ids: Sequence[int]) -> str:
    return hashlib.sha256(b"".join(int(token).to_bytes(8, "little") for token in ids)).hexdigest()


@app.command("generate")
def command(
    adapter: Annotated[Path, typer.Argument(help="The adapter folder.")],
    data: Annotated[Path, typer.Option("--data", help="Prompts: a row has messages, prompt, or instruction.")],
    out: Annotated[Path, typer.Option("--out", help="The file of answers (JSON lines), in the order of the prompts.")],
    base_only: Annotated[bool, typer.Option("--base-only", help="Ask the base without the adapter.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: the most likely token; above it tokens are drawn.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the most likely tokens of this share.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from this many most likely tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn; a row's draws depend on it alone.")] = 42,
    batch_size: Annotated[int, typer.Option(min=1, help="Most prompts at once; fewer where they are long.")] = 64,
    base: Annotated[str | None, typer.Option("--base", help="Where its base is, for a local folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again, also where answers are there.")] = False,
    trust_remote_code: Annotated[
        str | None, typer.Option(metavar="REPO", help="Run the code that comes with this base; name its repository.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer a file of prompts. The same command goes on where it was killed: rows that are done are kept."""
    from lora_tune.model.decoding import Decoding

    if not adapter.is_dir():
        raise UsageError(Problem("no such adapter folder", "name an adapter folder", str(adapter)))
    if temperature == 0 and (top_p < 1 or top_k):
        raise UsageError(
            "--top-p and --top-k say what is drawn, and temperature 0 draws nothing", "add --temperature 1"
        )
    decoding = Decoding(max_new_tokens, batch_size, temperature, top_k, top_p, seed)
    done = answer_file(
        adapter,
        data=data,
        out=out,
        side="base" if base_only else "adapter",
        decoding=decoding,
        start="again" if overwrite else "go on",
        base=(base, trust_remote_code),
    )
    if as_json:
        print_json({"exit_code": 0, "output": str(out), **asdict(done)})
        return
    kept = f", {done.kept:,} of them kept from before" if done.kept else ""
    speed = f", {done.tokens:,} tokens in {done.seconds:,.1f} s ({(done.rows - done.kept) / done.seconds:,.1f} rows/s)"
    ended = f"; {done.stopped:,} ended by themselves"
    results().print(f"{out}: {done.rows:,} answers{kept}{speed if done.seconds else ''}{ended}")


if __name__ == "__main__":
    sys.exit(run_app(app, name="python -m lora_tune.generate"))

"""`lora-tune chat ADAPTER…`: talk to adapters and their base, by the template that they were trained with.

1. the adapters, 2. their base with all of them on it, 3. line after line: a command, or words to answer; typed with
history and line editing, or read from a pipe, of which every line is one.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_tune.errors import LoraTuneError, Problem, UsageError
from lora_tune.serving.adapter_names import named_folders
from lora_tune.serving.backend import Sampling
from lora_tune.serving.chat_commands import COMMANDS, act
from lora_tune.serving.chat_screen import WIDE, Plain, Screen, SideBySide, Silent, tokens_text
from lora_tune.serving.chat_session import Session, Turn, changed
from lora_tune.serving.settings import Quantize
from lora_tune.terminal import activity, messages, print_json, print_problems, printable, results, run_app

if TYPE_CHECKING:
    from lora_tune.recipe import Base
    from lora_tune.serving.backend import Backend
    from lora_tune.serving.chat_answers import Answers, Prompt

app = typer.Typer(help="Talk to adapters and their base.", add_completion=False)
_INTERRUPTED = 130
_LINE_BYTES = 1 << 20  # of a piped line


@dataclass(frozen=True)
class Place:
    """Where lines come from: typed (`read` gets the next one), or a pipe, which ends at the first problem.

    `as_json`: nothing is printed until the one object at the end.
    """

    read: Callable[[str], str] | None = None
    as_json: bool = False

    @property
    def typed(self) -> bool:
        """Whether somebody sits in front of it."""
        return self.read is not None


def chat(backend: Backend, session: Session, *, place: Place, runner: asyncio.Runner) -> int:
    """Carry out line after line until the end; returns the exit code. Raises: what ends a piped chat."""
    from lora_tune.serving.chat_answers import Answers

    answers = Answers(backend, runner)
    for line in _piped() if place.read is None else _typed(session, place.read):
        if line is None:
            return _INTERRUPTED
        if not line.strip():
            continue
        try:
            outcome = act(session, line)
            _remark(outcome.note, place)
            if outcome.then == "leave":
                return 0
            if outcome.then == "answer":
                _answer(answers, session, place)
            elif outcome.then == "tokens" and not place.as_json:
                _show_tokens(backend, session, outcome.text)
        except LoraTuneError as error:
            if not place.typed:
                raise
            print_problems(error.problems)
    return 0


def _remark(text: str, place: Place) -> None:
    """A line about the chat itself: beside the answers where it is typed, on stderr where answers go into a pipe."""
    if text and not place.as_json:
        (results() if place.typed else messages()).print(printable(text), style="dim", soft_wrap=not place.typed)


def _answer(answers: Answers, session: Session, place: Place) -> None:
    """Ask the last question; one that could not be asked, or got no word, is not kept."""
    turn = session.turns[-1]
    screen, at_once = _screen(session, place)
    try:
        prompts = answers.ask(session, turn, screen, at_once=at_once)
    except LoraTuneError:
        session.take_back()
        raise
    for prompt in prompts:
        _remark(_note(turn, prompt, session), place)
    if not any(said.text.strip() for said in turn.answers.values()) and place.typed:
        session.take_back()


def _screen(session: Session, place: Place) -> tuple[Screen, str]:
    """Where the answers go, and whether they come together."""
    names = session.speakers
    if place.as_json:
        return Silent(), "together"
    width = results().size.width
    if len(names) == 2 and place.typed and width >= WIDE:
        return SideBySide(sys.stdout, names, width=width), "together"
    return Plain(sys.stdout, names), "in turn"


def _note(turn: Turn, prompt: Prompt, session: Session) -> str:
    """What is worth saying of how an answer ended."""
    model = prompt.request.model
    said = turn.answers.get(model)
    name = f"{model}: " if len(session.speakers) > 1 else ""
    if said is None or said.end == "cancelled":
        return f"{name}stopped" if said is not None else ""
    if said.end == "length" and prompt.is_cut_by_context:
        return f"{name}cut off: the context of {prompt.context:,} tokens is full; /new starts another conversation"
    if said.end == "length":
        most = prompt.request.sampling.max_new_tokens
        return f"{name}cut off after {most:,} tokens; /set max_new_tokens={2 * most}, then /retry"
    return "" if said.text else f"{name}ended without a word"


def _show_tokens(backend: Backend, session: Session, text: str | None) -> None:
    """The prompt of the last question, or of another one, for every speaker."""
    for model in session.speakers:
        template = backend.chat(model)
        ids = template.prompt_ids(session.messages(model, last=text))
        context = next(one.context for one in backend.models() if one.name == model)
        results().print(f"{model}: {len(ids):,} tokens of {context:,}", style="bold")
        results().print(tokens_text(template, ids), soft_wrap=False)


def _piped() -> Iterator[str]:
    """The lines of standard input. Raises: UsageError for one that is no UTF-8 text, or endless."""
    for number in range(1, sys.maxsize):
        line = sys.stdin.buffer.readline(_LINE_BYTES + 1)
        if not line:
            return
        if len(line) > _LINE_BYTES:
            raise UsageError(Problem(f"a line is longer than {_LINE_BYTES:,} bytes", "", "standard input", number))
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise UsageError(Problem("is no UTF-8 text", "convert it", "standard input", number)) from None


def _typed(session: Session, read: Callable[[str], str]) -> Iterator[str | None]:
    """Lines that are typed; None where Ctrl-C came twice in a row, the end at Ctrl-D."""
    interrupted = False
    while True:
        try:
            line = read(f"{printable(' | '.join(session.speakers))}> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted:
                yield None
            interrupted = True
            results().print("Ctrl-C once more, Ctrl-D or /quit leaves", style="dim")
            continue
        interrupted = False
        yield line


def _welcome(backend: Backend, session: Session, base: Base) -> None:
    lines = [f"{session.base} ({base.quantize}, {base.compute_dtype})"]
    for one in backend.models()[1:]:
        scores = {name: score for name, score in one.facts.get("scores", {}).items() if isinstance(score, dict)}
        told = ", ".join(f"{name} {score['base']:.4g} → {score['adapter']:.4g}" for name, score in scores.items())
        lines.append(f"  {one.name}" + (f": {told}" if told else ""))
    lines.append("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
    results().print(printable("\n".join(lines)), style="dim")


@app.command("chat")
def command(
    adapters: Annotated[
        list[str] | None, typer.Argument(help="Adapter folders, folders of them, or NAME=FOLDER; all over one base.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Where the base is, for a local folder.")] = None,
    quantize: Annotated[Quantize | None, typer.Option(help="Hold the base so, instead of as in training.")] = None,
    system: Annotated[str, typer.Option(help="The system message.")] = "",
    both: Annotated[bool, typer.Option("--both", help="Begin with base and adapter side by side.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Cut an answer off after so many tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above it tokens are drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens up to this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many likeliest tokens; 0: all.")] = 0,
    seed: Annotated[str, typer.Option(help="Draw every first answer with this seed.")] = "none",
    stop: Annotated[list[str] | None, typer.Option(help="End an answer before this text.")] = None,
    trust_remote_code: Annotated[
        str | None, typer.Option(metavar="REPO", help="Run the code that comes with this base; name its repository.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Of piped lines, print one JSON object.")] = False,
) -> None:
    """Talk to adapters and their base, by the template that they were trained with.

    In a terminal with history and line editing; or from a pipe, of which every line is a turn.
    """
    folders = named_folders(adapters or [])
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = tuple(f"{name}={value}" for name, value in {**settings, "seed": seed}.items())
    sampling = replace(changed(Sampling(max_new_tokens), given, where="the command line"), stop=tuple(stop or ()))
    place = _place(as_json)
    held = quantize.value if quantize else None
    with activity("verifying the adapters"):
        from lora_tune.serving.served_base import served_base

        section, notes = served_base(folders, name=base, quantize=held, trust_remote_code=trust_remote_code)
    print_problems([] if as_json else notes)
    with activity(f"loading {Path(section.name).name} ({section.quantize})"):
        from lora_tune.serving.local import LocalBackend

        backend = LocalBackend.start(section, adapters=folders, trust_remote_code=trust_remote_code)
    session = Session(backend.models()[0].name, tuple(folders), sampling=sampling, system=system)
    with asyncio.Runner() as runner:
        try:
            if both:
                act(session, "/both")
            if place.typed:
                _welcome(backend, session, section)
            code = chat(backend, session, place=place, runner=runner)
        finally:
            runner.run(backend.close(grace_s=0))
    if as_json:
        print_json({"exit_code": code, "turns": [_turn_json(turn) for turn in session.turns]})
    raise typer.Exit(code)


def _place(as_json: bool) -> Place:
    """Typed in a terminal, else from a pipe. Raises: UsageError where typing is not possible."""
    if as_json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return Place(as_json=as_json)
    from lora_tune.serving.chat_prompt import line_reader

    return Place(line_reader([f"/{name}" for name in COMMANDS]))


def _turn_json(turn: Turn) -> dict[str, Any]:
    answers = {model: {"text": said.text, "end": said.end} for model, said in turn.answers.items()}
    return {"prompt": turn.asked, "seed": turn.seed, "answers": answers}


if __name__ == "__main__":
    sys.exit(run_app(app, name="python -m lora_tune.chat"))

"""What a line of the chat means: words for the model, or one of the commands of the table below."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from lora_tune.disk import disk_text
from lora_tune.errors import Problem, UsageError
from lora_tune.serving.chat_session import Session, changed, settings_line

Then = Literal["nothing", "answer", "tokens", "leave"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a line led to: a line for the person, and what is to be done. `text` is what `/tokens` is asked about."""

    note: str = ""
    then: Then = "nothing"
    text: str | None = None


def act(session: Session, line: str) -> Outcome:
    """Carry a line out. `/NAME …` is a command, `//…` words that begin with a slash, all else words.

    Raises: UsageError for a command that there is not, or that does not take these words.
    """
    if not line.startswith("/") or line.startswith("//"):
        session.ask(line[1:] if line.startswith("/") else line)
        return Outcome(then="answer")
    name, _, rest = line[1:].partition(" ")
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        fix = f"did you mean /{near[0]}?" if near else "/help lists them; words that begin with a slash take two"
        raise UsageError(f"no such command, got /{name}", fix)
    return COMMANDS[name].act(session, rest.strip())


@dataclass(frozen=True, slots=True)
class Command:
    """One row of the table: what it does, the words that it takes, its help."""

    act: Callable[[Session, str], Outcome]
    words: str
    help: str


def _base(session: Session, rest: str) -> Outcome:
    _none(rest, "/base")
    session.choose(session.base)
    return _speaking(session)


def _adapter(session: Session, rest: str) -> Outcome:
    if not session.adapters:
        raise UsageError("no adapter was loaded", "name its folder: lora-tune chat FOLDER")
    if not rest and len(session.adapters) > 1:
        raise UsageError(f"which one of {', '.join(session.adapters)}?", f"/adapter {session.adapters[0]}")
    if rest == session.base:
        raise UsageError(f"{rest} is the base", "/base")
    session.choose(rest or session.adapters[0])
    return _speaking(session)


def _both(session: Session, rest: str) -> Outcome:
    if not session.adapters:
        raise UsageError("no adapter was loaded", "name its folder: lora-tune chat FOLDER")
    spoke = session.speakers[-1] if session.speakers[-1] in session.adapters else session.adapters[0]
    names = rest.split() or [spoke]
    if len(names) > 2:
        raise UsageError(f"/both shows two columns, got {len(names)} names", "/both NAME, or /both NAME NAME")
    session.choose(*([session.base, *names] if len(names) == 1 else names))
    return _speaking(session)


def _speaking(session: Session) -> Outcome:
    if len(session.speakers) == 2:
        return Outcome(f"{session.speakers[0]} and {session.speakers[1]} answer, with the same prompt and seed")
    return Outcome(f"{session.speakers[0]} answers")


def _system(session: Session, rest: str) -> Outcome:
    if not rest:
        return Outcome(f"system: {session.system}" if session.system else "no system message")
    session.system = "" if rest == "-" else rest
    said = "no system message" if rest == "-" else "the system message is set"
    return Outcome(f"{said}, from the next answer on" if session.turns else said)


def _retry(session: Session, rest: str) -> Outcome:
    _none(rest, "/retry")
    session.ask_again()
    same = "temperature is 0: the same answer comes again; /set temperature=0.7"
    return Outcome("" if session.sampling.temperature else same, then="answer")


def _new(session: Session, rest: str) -> Outcome:
    _none(rest, "/new")
    session.restart()
    return Outcome("a new conversation")


def _save(session: Session, rest: str) -> Outcome:
    """Append a row, whole or not at all: the file ends with a line's end before and after."""
    if not rest:
        raise UsageError("where to?", "/save rows.jsonl")
    model = session.speakers[-1]
    row = session.row(model)
    if row is None:
        raise UsageError(
            "there is no whole answer to save yet", "ask something; answers that were cut off do not count"
        )
    path = Path(rest).expanduser()
    line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        with path.open("a+b") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                line = line if stream.read(1) == b"\n" else "\n" + line
            stream.write(line.encode())
    except OSError as error:
        reason = f"cannot be written: {disk_text(error, path)}"
        raise UsageError(Problem(reason, "name another file", str(path))) from None
    answers = [message for message in row["messages"] if message["role"] == "assistant"]
    cut = sum(message.get("weight") == 0 for message in answers)
    unlearned = f", {cut} of them cut off and not learned" if cut else ""
    whose = f" of {model}" if len(session.speakers) == 2 else ""
    return Outcome(f"{rest}: a row with {len(answers)} answers{whose}{unlearned}; data: [{{source: {rest}}}]")


def _set(session: Session, rest: str) -> Outcome:
    if rest:
        session.sampling = changed(session.sampling, tuple(rest.split()))
    return Outcome(settings_line(session.sampling))


def _tokens(session: Session, rest: str) -> Outcome:
    if not rest and not session.turns and not session.system:
        raise UsageError("nothing has been asked yet", "/tokens TEXT shows what asking TEXT would feed")
    return Outcome(then="tokens", text=rest or None)


def _help(session: Session, rest: str) -> Outcome:
    _none(rest, "/help")
    width = max(len(f"/{name} {one.words}") for name, one in COMMANDS.items())
    lines = [f"{f'/{name} {one.words}':<{width}}  {one.help}" for name, one in COMMANDS.items()]
    return Outcome("\n".join([*lines, _KEYS]))


def _quit(session: Session, rest: str) -> Outcome:
    _none(rest, "/quit")
    return Outcome(then="leave")


def _none(rest: str, name: str) -> None:
    if rest:
        raise UsageError(f"{name} takes no words, got {rest!r}", name)


_KEYS = "Esc Enter starts a new line, ↑ ↓ and Ctrl-R find earlier lines, Ctrl-C stops an answer, Ctrl-D leaves"
COMMANDS: dict[str, Command] = {
    "base": Command(_base, "", "the base alone answers"),
    "adapter": Command(_adapter, "[NAME]", "an adapter answers"),
    "both": Command(_both, "[NAME [NAME]]", "two models answer the same prompt with the same seed, side by side"),
    "system": Command(_system, "[TEXT|-]", "show, set or remove the system message"),
    "retry": Command(_retry, "", "ask the last question again, with the next seed"),
    "new": Command(_new, "", "start a new conversation"),
    "save": Command(_save, "FILE", "append the conversation to FILE, as a row that lora-tune run trains on"),
    "set": Command(_set, "[NAME=VALUE …]", "show or change temperature, top_p, top_k, max_new_tokens, seed, stop"),
    "tokens": Command(_tokens, "[TEXT]", "show the last prompt, or one that asks TEXT, as the tokens that are fed"),
    "help": Command(_help, "", "this list"),
    "quit": Command(_quit, "", "leave"),
}

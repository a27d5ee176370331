"""A conversation with one or two models: its turns, who speaks, how answers are drawn, what becomes a training row.

Pure state: nothing here prints, waits or imports torch. With two speakers each goes on from its own answers. A turn
that one of them was never asked is told to it with the answer that was given.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

from lora_tune.data.conversation import Message
from lora_tune.errors import Problem, UsageError
from lora_tune.serving.backend import Reason, Sampling

Place = Literal["before", "with it"]


@dataclass(frozen=True, slots=True)
class Said:
    """One answer and how it ended."""

    text: str
    end: Reason

    @property
    def whole(self) -> bool:
        """Whether the model itself ended it."""
        return self.end == "stop"


@dataclass(slots=True)
class Turn:
    """A question, its answers by model, and the seed that all of them were drawn with."""

    asked: str
    seed: int
    answers: dict[str, Said] = field(default_factory=dict)

    def answer_for(self, model: str) -> Said | None:
        """What this model said, else what another one did; None where nobody said a word."""
        own = self.answers.get(model)
        others = (said for said in self.answers.values() if said.text.strip())
        return own if own is not None and own.text.strip() else next(others, None)


class Session:
    """The state of one chat over a base and its adapters; `speakers` are one name, or two that answer side by side.

    `sampling` holds for the answers to come; its seed, where one is set, is that of every first try.
    """

    def __init__(self, base: str, adapters: tuple[str, ...], *, sampling: Sampling, system: str = "") -> None:
        self.base, self.adapters = base, adapters
        self.speakers: tuple[str, ...] = (adapters[0] if adapters else base,)
        self.sampling, self.system = sampling, system
        self.turns: list[Turn] = []
        self._draw = random.Random(sampling.seed) if sampling.seed is not None else random.Random()

    def ask(self, text: str) -> Turn:
        """Add a question. With a seed in `sampling` it is asked with that one, else with one that is drawn."""
        seed = self.sampling.seed
        turn = Turn(text, self._draw.getrandbits(31) if seed is None else seed)
        self.turns.append(turn)
        return turn

    def ask_again(self) -> Turn:
        """Take back the answers to the last question, for others with the next seed. Raises: UsageError."""
        if not self.turns:
            raise UsageError("nothing has been asked yet", "ask something first")
        turn = self.turns[-1]
        turn.answers, turn.seed = {}, (turn.seed + 1) % 2**31
        return turn

    def take_back(self) -> None:
        """Forget the last question: it could not be asked, or nobody said a word."""
        self.turns.pop()

    def restart(self) -> None:
        """A new conversation; system message, speakers and sampling stay."""
        self.turns = []

    def sampling_of(self, turn: Turn) -> Sampling:
        """How the answers to this question are drawn: every speaker with the same seed."""
        return replace(self.sampling, seed=turn.seed)

    def messages(self, model: str, *, last: str | None = None) -> list[Message]:
        """The conversation as this model knows it, up to the last question, or up to `last` asked now.

        Turns without a word of an answer are left out.
        """
        found = [Message("system", self.system)] if self.system else []
        answered = self.turns[:-1] if last is None else self.turns
        for turn in answered:
            said = turn.answer_for(model)
            if said is not None:
                found += [Message("user", turn.asked), Message("assistant", said.text)]
        if last is None and not self.turns:
            return found
        return [*found, Message("user", self.turns[-1].asked if last is None else last)]

    def row(self, model: str) -> dict[str, Any] | None:
        """The conversation as a row to train on, in `messages` format; None where no answer of it is whole.

        An answer that was cut off carries weight 0: it is read but not learned, or the model would learn not to stop.
        What stands behind the last whole answer is left out.
        """
        turns = [(turn.asked, turn.answer_for(model)) for turn in self.turns]
        while turns and (turns[-1][1] is None or not turns[-1][1].whole):
            turns.pop()
        row: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for asked, said in turns:
            if said is not None:
                answer: dict[str, Any] = {"role": "assistant", "content": said.text}
                row += [{"role": "user", "content": asked}, answer if said.whole else {**answer, "weight": 0}]
        return {"messages": row} if turns else None

    def choose(self, *names: str) -> None:
        """Who answers from now on. Raises: UsageError for a name that is not served, or the same one twice."""
        for name in names:
            if name not in (self.base, *self.adapters):
                near = get_close_matches(name, [self.base, *self.adapters], n=1, cutoff=0.5)
                fix = f"did you mean {near[0]}?" if near else f"there are {', '.join([self.base, *self.adapters])}"
                raise UsageError(f"no such model, got {name!r}", fix)
        if len(set(names)) < len(names):
            raise UsageError(f"two columns need two models, got {names[0]} twice", "name another one")
        self.speakers = names


def _number(low: float, high: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return read


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return read


def _seed(text: str) -> int | None:
    return None if text in ("none", "random") else _whole(0, 2**31 - 1)(text)


def _stop(text: str) -> tuple[str, ...]:
    """Stop strings with commas between them; \\n stands for a line's end."""
    return tuple(part.replace("\\n", "\n") for part in text.split(",") if part)


SETTINGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "temperature": (_number(0.0, 10.0), "0 to 10; 0 takes the likeliest token"),
    "top_p": (_number(1e-6, 1.0), "above 0, to 1"),
    "top_k": (_whole(0, 1_000_000), "0 (all) to 1000000"),
    "max_new_tokens": (_whole(1, 1_000_000), "1 to 1000000"),
    "seed": (_seed, "0 to 2147483647, or none"),
    "stop": (_stop, "texts with commas between them; nothing for none"),
}
"""What `/set` and the command line take: how a value is read, and which ones there are."""


def changed(sampling: Sampling, texts: tuple[str, ...], *, where: str = "/set") -> Sampling:
    """The sampling with `name=value` of each text. Raises: UsageError naming every one that is wrong."""
    values: dict[str, Any] = {}
    problems = []
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in SETTINGS or not equals:
            near = get_close_matches(name, SETTINGS, n=1, cutoff=0.4)
            fix = f"did you mean {near[0]}=…?" if near else f"there are {', '.join(SETTINGS)}"
            problems.append(Problem(f"must be NAME=VALUE, got {text!r}", fix, key=where))
            continue
        read, allowed = SETTINGS[name]
        try:
            values[name] = read(value)
        except ValueError:
            problems.append(Problem(f"{name} must be {allowed}, got {value!r}", "", key=where))
    if problems:
        raise UsageError(problems)
    return replace(sampling, **values)


def settings_line(sampling: Sampling) -> str:
    """All settings in the form that `/set` takes."""
    shown = {name: getattr(sampling, name) for name in SETTINGS}
    shown["stop"] = ",".join(sampling.stop).replace("\n", "\\n")
    return " ".join(f"{name}={'none' if value is None else value}" for name, value in shown.items())

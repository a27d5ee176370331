"""What a sweep varies: keys of the recipe and their values, each checked against the schema before anything starts.

`train.learning_rate=1e-4,2e-4` lists values, as the recipe would have them; `train.learning_rate=1e-5..1e-3` is a range
that a sampler draws from, evenly in its logarithm where both ends are above zero and a factor of ten or more apart.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_tune.errors import Problem, RecipeError, UsageError
from lora_tune.recipe_file import RecipeFile, read_recipe

MOST_RUNS = 10_000  # combinations of a grid: more are a slip of the keyboard
_ALL_CHECKED = 256  # combinations that are all read as recipes; of more, every value beside the first of the others
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_OWN_KEYS = {
    "output": "every run has its own folder below the sweep's",
    "seed": "the loss on the held-out rows of another seed is no comparison",
    "eval.hold_out": "the loss on other held-out rows is no comparison",
    "eval.hold_out_tasks": "the loss on other held-out rows is no comparison",
}


@dataclass(frozen=True, slots=True)
class Axis:
    """One key and what it may be: `values` as they are written in a recipe, or the ends of a range.

    Ends that are both whole numbers give whole numbers.
    """

    key: str
    values: tuple[str, ...] = ()
    ends: tuple[str, str] | None = None

    @property
    def whole(self) -> bool:
        """Whether a range holds whole numbers alone."""
        return self.ends is not None and all(re.fullmatch(r"[-+]?\d+", end) for end in self.ends)

    @property
    def logarithmic(self) -> bool:
        """Whether a range is drawn from evenly in its logarithm."""
        low, high = map(float, self.ends or (0, 0))
        return low > 0 and high / low >= 10

    @property
    def samples(self) -> tuple[str, ...]:
        """Values to check: all of a list, both ends of a range."""
        return self.ends or self.values


def parse_axes(settings: Sequence[str]) -> tuple[Axis, ...]:
    """What `--set KEY=VALUES` says, in its order.

    Raises: UsageError where one is not of that form, names a key twice, or one that a sweep cannot vary.
    """
    axes: list[Axis] = []
    for text in settings:
        key, equals, written = text.partition("=")
        if not equals or not re.fullmatch(r"[^.\s=]+(\.[^.\s=]+)*", key) or not written.strip():
            raise UsageError(f"--set must be section.key=values, got {text!r}", "such as lora.rank=8,16")
        if key in _OWN_KEYS:
            raise UsageError(Problem(f"cannot be swept: {_OWN_KEYS[key]}", "remove it", f"--set {text}", key=key))
        if any(axis.key == key for axis in axes):
            raise UsageError(Problem("is set twice", "list all values behind one --set", f"--set {text}", key=key))
        axes.append(_axis(key, written, text))
    if not axes:
        raise UsageError("a sweep varies at least one key, got none", "such as --set train.learning_rate=1e-4,2e-4")
    return tuple(axes)


def _axis(key: str, written: str, text: str) -> Axis:
    if ends := _RANGE.fullmatch(written.strip()):
        low, high = float(ends[1]), float(ends[2])
        if not low < high:
            reason = f"a range goes from the lower to the higher number, got {written}"
            raise UsageError(Problem(reason, f"such as {ends[2]}..{ends[1]}", f"--set {text}", key=key))
        return Axis(key, ends=(ends[1], ends[2]))
    values = tuple(_split(written))
    if "" in values or len(set(values)) < len(values):
        wrong = "an empty value" if "" in values else "a value twice"
        raise UsageError(Problem(f"has {wrong}, got {written!r}", "write each once", f"--set {text}", key=key))
    return Axis(key, values)


def _split(written: str) -> Iterator[str]:
    """The values between commas that stand in no brackets and no quotes."""
    depth, quote, start = 0, "", 0
    for place, letter in enumerate(written):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            yield written[start:place].strip()
            start = place + 1
    yield written[start:].strip()


def grid(axes: Sequence[Axis]) -> list[dict[str, str]]:
    """Every combination of the values, the last key changing fastest.

    Raises: UsageError for a range, or more than MOST_RUNS combinations.
    """
    for axis in axes:
        if axis.ends:
            reason = f"a range has no grid, got {axis.ends[0]}..{axis.ends[1]}"
            raise UsageError(Problem(reason, "list values, or add --sampler tpe --trials N", key=axis.key))
    count = 1
    for axis in axes:
        count *= len(axis.values)
    if count > MOST_RUNS:
        raise UsageError(f"the grid has {count:,} runs", f"at most {MOST_RUNS:,}; or --sampler tpe --trials N")
    keys = [axis.key for axis in axes]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(axis.values for axis in axes))]


def as_overrides(values: Mapping[str, str]) -> list[str]:
    """The values as the command line of `run` takes them."""
    return [f"{key}={value}" for key, value in values.items()]


def check_values(path: Path, overrides: Sequence[str], axes: Sequence[Axis]) -> RecipeFile:
    """Read the recipe with every value that the sweep may give it; returns it with the first of each.

    Of up to 256 combinations all are read, of more every value beside the first of the other keys.

    Raises: RecipeError with every problem once, UsageError as `read_recipe`.
    """
    first = {axis.key: axis.samples[0] for axis in axes}
    count = 1
    for axis in axes:
        count *= len(axis.samples)
    if count <= _ALL_CHECKED:
        keys = [axis.key for axis in axes]
        products = itertools.product(*(axis.samples for axis in axes))
        combinations = [dict(zip(keys, values, strict=True)) for values in products]
    else:
        combinations = [{**first, axis.key: value} for axis in axes for value in axis.samples]
    found: dict[Problem, None] = {}
    read: RecipeFile | None = None
    for values in combinations:
        try:
            file = read_recipe(path, overrides=[*overrides, *as_overrides(values)])
            read = read or file
        except RecipeError as error:
            found.update(dict.fromkeys(error.problems))
    if found or read is None:
        raise RecipeError(list(found))
    return read

"""`lora-tune rehearse RECIPE`: the whole journey in small, on the CPU, before hours are spent on it.

Real are the recipe (method, targets, quantization, packing, metrics), the tokenizer, the chat template and the rows:
all of them are checked and encoded as `run` does, and a few, the longest among them, are trained. Small is the base:
the same architecture with random weights, made from config.json alone. STEPS below is the journey; the other verbs run
as processes of their own, and one of them is killed in the middle of its training.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_tune.adapter.folder import WEIGHTS, read_manifest
from lora_tune.cli import COMMANDS
from lora_tune.errors import CheckFailed, Problem, RecipeError, UsageError
from lora_tune.model.base_config import stored_bits
from lora_tune.model.base_fit import combination_problems, layer_count_problems, length_problems
from lora_tune.model.source import check_against_base, find_base, load_tokenizer
from lora_tune.recipe import Recipe
from lora_tune.recipe_file import RecipeFile, read_recipe, recipe_as_yaml
from lora_tune.terminal import activity, print_json, print_problems, printable, results, run_app
from lora_tune.training.journey import MOST_SECONDS, Outcome, Processes, Step, travel
from lora_tune.training.small_recipe import TRAINED_STEPS, small_recipe, small_source

if TYPE_CHECKING:
    from lora_tune.data.kept_conversations import Conversations
    from lora_tune.data.pipeline import Prepared

app = typer.Typer(help="Rehearse the whole journey of a recipe on a small model.", add_completion=False)
LONGEST = 1024  # tokens of a sequence, at most: what a CPU trains in seconds with a vocabulary of 150,000
MORE_TOKENS = 768  # of the rows beside the longest one
HELD_OUT = 4
FAILED = "FAILED"  # an empty file that keeps the folder
_MARKS = {"ok": "✓", "failed": "✗", "warning": "!", "absent": "–", "skipped": "–"}
_STYLES = {"ok": "green", "failed": "red", "warning": "yellow", "absent": "dim", "skipped": "dim"}


class Rehearsal:
    """One rehearsal in `folder`: what is known so far, and a method for each step that returns what it found."""

    def __init__(self, file: RecipeFile, folder: Path) -> None:
        self.file, self.recipe, self.folder = file, file.recipe, folder
        half = max(1, (os.cpu_count() or 2) // 2)  # two processes at a time
        environment = {
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "LORA_TUNE_CACHE": str(folder / "cache"),  # nothing measured on a small model is remembered
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(half)),
            "PYTHONIOENCODING": "utf-8",
        }
        self.processes = Processes(folder, environment)
        self.outside = Processes(
            folder, {"PYTHONIOENCODING": "utf-8"}, where=Path.cwd()
        )  # as the user would start them
        self.source = find_base(self.recipe.base)
        self.base = folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', self.source.name.rpartition(':')[2])}-small"
        self.conversations: Conversations | None = None
        self.prepared: Prepared | None = None

    def check_recipe(self) -> None:
        """What of the recipe does not fit its base, as far as config.json tells. Raises: RecipeError."""
        stored = f"{stored_bits(self.source.config)} bit" if self.source.quantization is not None else None
        problems = combination_problems(self.recipe.lora, quantize=self.source.quantize, stored=stored)
        problems += length_problems(self.source.config, self.recipe.train)
        problems += layer_count_problems(self.source.config, self.recipe.train)
        self._refuse([*self.file.warnings, *problems])

    def data(self) -> str:
        """Every row of the recipe is read and checked. Raises: DataError."""
        from lora_tune.data.checking import read_conversations

        recipe = self.recipe
        self.conversations = found = read_conversations(recipe.data, hold_out=recipe.eval, seed=recipe.seed)
        return f"{found.ledger.total('read'):,} rows read, {found.ledger.total('held_out'):,} held out"

    def tokens(self) -> str:
        """Every row goes through the chat template, with loss mask, packing and limits. Raises: DataError."""
        from lora_tune.data.chat_template import load_chat_template
        from lora_tune.data.pipeline import encode

        recipe, rows = self.recipe, self.conversations
        if rows is None:
            raise CheckFailed("the data was not read")
        tokenizer = load_tokenizer(self.source, new_tokens=recipe.lora.new_tokens)
        text = Path(recipe.base.chat_template).read_text(encoding="utf-8") if recipe.base.chat_template else None
        chat = load_chat_template(tokenizer, template=text, data="tools" if rows.has_tools else "plain")
        self.prepared = encode(
            rows,
            chat,
            loss_on=recipe.loss_on,
            train=recipe.train,
            limits=recipe.limits,
            seed=recipe.seed,
            mixing=recipe.mixing,
        )
        ledger = self.prepared.ledger
        trained, longest = ledger.total("tokens_trained"), max(source.longest for source in ledger.sources)
        warned = len(ledger.warnings())
        said = f"{ledger.total('tokens_kept'):,} tokens, {trained:,} trained, longest row {longest:,}"
        return f"{said}; {warned} warnings (lora-tune preview)" if warned else said

    def small(self) -> str:
        """The small base, a sample of the rows and the recipe that joins them. Raises: UsageError, RecipeError."""
        from lora_tune.model.shrink import write_shrunk

        parameters = write_shrunk(self.source, self.base, seed=self.recipe.seed)
        rows, small = self._sample()
        (self.folder / "recipe.yaml").write_text(recipe_as_yaml(small), encoding="utf-8")
        found = check_against_base(find_base(small.base), lora=small.lora, train=small.train)
        self._refuse([problem for problem in found if problem.severity == "error"])
        lora, left = self.recipe.lora, []
        if lora.start_from:
            left.append("without lora.start_from")
        if lora.rank > small.lora.rank:
            left.append(f"rank {lora.rank} as {small.lora.rank}")
        said = f"{self.source.config['model_type']} with {parameters:,} random parameters, {rows} rows of the data"
        return ", ".join([said, *left])

    def _sample(self) -> tuple[int, Recipe]:
        """Writes the rows that are trained and held out; returns how many, and the small recipe.

        Which rows are held out goes by content, so that the same ones are held out of the sample.
        """
        from lora_tune.data.sample import held_out_places, training_places, write_rows

        recipe, prepared = self.recipe, self.prepared
        if prepared is None:
            raise CheckFailed("the data was not encoded")
        longest = min(recipe.train.max_length, max(LONGEST, int(prepared.documents.lengths.min())))
        budget = longest + MORE_TOKENS
        count = len(recipe.data)
        trained = training_places(prepared.documents, sources=count, most_tokens=budget, row_tokens=longest)
        held_out = held_out_places(prepared.held_out, rows=HELD_OUT)
        data = []
        for number, source in enumerate(recipe.data):
            mine = [place for place in (*trained, *held_out) if place.source == number]
            if mine:
                data.append(small_source(source, write_rows(source, mine, self.folder / f"rows-{number}.jsonl")))
        apart = [place for place in held_out if place.source == count]
        tasks = recipe.eval.hold_out_tasks
        hold_out: str | int = sum(
            place.source < count and recipe.data[place.source].task not in tasks for place in held_out
        )
        if apart:
            like = recipe.data[0].model_copy(update={"source": str(recipe.eval.hold_out)})
            hold_out = str(write_rows(like, apart, self.folder / "held_out.jsonl"))
        small = small_recipe(recipe, base=self.base, data=data, hold_out=hold_out, longest=longest)
        return len(trained) + len(held_out), small

    def plan(self) -> str:
        """The real recipe on this machine; what does not fit here may fit where it will run."""
        real = [str(self.file.path), *self.file.overrides]
        answer = self.outside.run("plan", ["plan", *real], tolerated=(4,))
        return f"peak of about {answer['peak_gib']:.1f} GiB at micro-batch {answer['micro_batch_size']} on this machine"

    def train(self) -> str:
        """Training, evaluation, the adapter's folder, and its proof in a fresh process."""
        answer = self.processes.run("train", ["run", "recipe.yaml", "output=calm"])
        scores = ", ".join(
            f"{name} {score['base']:.3g} → {score['adapter']:.3g}" for name, score in answer["scores"].items()
        )
        how = "unquantized" if self.recipe.base.quantize == "none" else self.recipe.base.quantize
        return f"{answer['training']['steps']} steps of {self.recipe.lora.method} in {how}, verified; {scores}"

    def kill(self) -> str:
        """The same run, killed (signal 9) as soon as it has a checkpoint. Raises: CheckFailed."""
        from lora_tune.training.checkpoint import steps

        log = str(self.processes.log("kill"))
        process = self.processes.start("kill", ["run", "recipe.yaml", "output=killed", "--json"])
        end = time.monotonic() + MOST_SECONDS
        while not steps(self.folder / "killed") and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        if process.poll() is not None:
            reason = self.processes.reason("kill", process.returncode)
            raise CheckFailed(Problem(f"it ended before it could be killed: {reason}", file=log))
        process.kill()
        process.wait()
        left = steps(self.folder / "killed")
        if process.returncode == 0:
            raise CheckFailed(Problem("it ended before it could be killed", file=log))
        if not left:
            raise CheckFailed(Problem("no checkpoint was written", file=log))
        return f"killed with a checkpoint of step {left[0]} of {TRAINED_STEPS}"

    def resume(self) -> str:
        """`run --resume` finishes what was killed."""
        answer = self.processes.run("resume", ["run", "recipe.yaml", "output=killed", "--resume"])
        return f"went on to step {answer['training']['steps']}, verified"

    def same(self) -> str:
        """The adapter of the killed and resumed run is that of the undisturbed one. Raises: CheckFailed."""
        from lora_tune.training.metrics_file import METRICS, read_metrics

        calm, killed = self.folder / "calm", self.folder / "killed"
        losses = [[row["loss"] for row in read_metrics(run / METRICS) if "loss" in row] for run in (calm, killed)]
        weights = [(run / WEIGHTS).read_bytes() for run in (calm, killed)]
        if losses[0] != losses[1]:
            pairs = zip_longest(*losses)
            step = next(number for number, (a, b) in enumerate(pairs, 1) if a != b)
            raise CheckFailed(Problem(f"another loss at step {step}", file=str(self.processes.log("resume"))))
        if weights[0] != weights[1]:
            reason = "the same losses, and another adapter"
            raise CheckFailed(Problem(reason, file=str(self.processes.log("resume"))))
        return f"{len(losses[0])} losses and {len(weights[0]):,} bytes of the adapter, bit for bit"

    def merge(self) -> str:
        """The adapter folded into the small base."""
        answer = self.processes.run("merge", ["merge", "calm", "--base", str(self.base), "--output", "merged"])
        candidates = answer.get("candidates", answer.get("against", {}))
        measured = candidates.get(answer.get("chosen", "adapter_as_trained"), {})
        kl = f", KL {measured['kl']:.2g} nats from the adapter as trained" if "kl" in measured else ""
        return f"{answer['dtype']}{kl}"

    def evaluate(self) -> str:
        """The adapter from its folder scores what it scored after its training. Raises: CheckFailed."""
        if not self.recipe.holds_out:
            return "nothing to do: the recipe holds no row out"
        answer = self.processes.run("eval", ["eval", "recipe.yaml", "output=calm"])
        before = read_manifest(self.folder / "calm").scores
        for name, score in answer["metrics"].items():
            if name in before and abs(score["adapter"] - before[name].adapter) > 0.01 * max(1.0, abs(score["adapter"])):
                reason = f"{name} is {score['adapter']:.4g}, and was {before[name].adapter:.4g} after the training"
                raise CheckFailed(Problem(reason, file=str(self.processes.log("eval"))))
        return f"the scores of the training again: {', '.join(answer['metrics'])}"

    def export(self) -> str:
        """The adapter in the layout of other engines; what has none is no failure."""
        exported = ["export", "calm", "--to", "canonical", "--output", "exported"]
        answer = self.processes.run("export", exported, tolerated=(1,))
        return f"canonical, rank {answer['rank']}, largest relative change {answer['largest_relative_error']:.1e}"

    def close(self) -> None:
        """End the processes that still run."""
        self.processes.close()
        self.outside.close()

    def _refuse(self, problems: Sequence[Problem]) -> None:
        """Print warnings with their place in the recipe. Raises: RecipeError where one is an error."""
        located = [self.file.locate(problem) for problem in problems]
        if any(problem.severity == "error" for problem in located):
            raise RecipeError([problem for problem in located if problem.severity == "error"])
        print_problems(located)


# name, the verb that it starts (absent where this version does not have it), the steps that it needs, what it does
STEPS: tuple[tuple[str, str | None, tuple[str, ...], Callable[[Rehearsal], str] | None], ...] = (
    ("data", None, (), Rehearsal.data),
    ("tokens", None, ("data",), Rehearsal.tokens),
    ("plan", "plan", (), Rehearsal.plan),
    ("base", None, ("tokens",), Rehearsal.small),
    ("kill", "run", ("base",), Rehearsal.kill),
    ("train", "run", ("base",), Rehearsal.train),
    ("resume", "run", ("kill",), Rehearsal.resume),
    ("same", None, ("train", "resume"), Rehearsal.same),
    ("merge", "merge", ("train",), Rehearsal.merge),
    ("eval", "eval", ("train",), Rehearsal.evaluate),
    ("export", "export", ("train",), Rehearsal.export),
    ("serve", "serve", ("train",), None),
)


def _steps(rehearsal: Rehearsal) -> list[Step]:
    """The table for one rehearsal."""
    steps = []
    for name, verb, needs, work in STEPS:
        there = verb is None or verb in COMMANDS
        absent = "this version has it, and it is not rehearsed" if there else "not in this version"
        steps.append(Step(name, needs, partial(work, rehearsal) if work and there else None, absent=absent))
    return steps


@contextmanager
def _working_folder(keep: Path | None) -> Iterator[Path]:
    """The folder of the rehearsal: a new one that goes when all is well, or the one that is kept."""
    if keep is not None:
        if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
            raise UsageError(
                Problem("is there already, and not an empty folder", "name a new folder", str(keep), key="--keep")
            )
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="lora-tune-rehearsal-")).resolve()
    try:
        yield folder
    finally:
        if not (folder / FAILED).exists():
            shutil.rmtree(folder, ignore_errors=True)


def rehearse(file: RecipeFile, *, folder: Path, report: Callable[[Outcome], None]) -> list[Outcome]:
    """Take the steps of the table in `folder`, two at a time; `report` gets each as it ends.

    Raises:
        UsageError, RecipeError, DataError: the recipe, its base or its data do not do.
    """
    rehearsal = Rehearsal(file, folder)
    rehearsal.check_recipe()
    with activity("rehearsing"):
        return travel(_steps(rehearsal), at_once=2, report=report, leave=rehearsal.close)


@app.command()
def command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, such as train.epochs=2")] = None,
    keep: Annotated[Path | None, typer.Option(help="Work in this new folder, and leave everything there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Rehearse the whole journey of a recipe on a small random model of the same architecture, on the CPU."""
    file = read_recipe(recipe, overrides=overrides or ())
    start = time.monotonic()
    with _working_folder(keep) as folder:
        outcomes = rehearse(file, folder=folder, report=_silent if as_json else _print)
        failed = [outcome for outcome in outcomes if outcome.state == "failed"]
        if failed:
            (folder / FAILED).touch()
    problems = [Problem(f"{one.name}: {one.said}", "see the log", file=one.log or str(folder)) for one in failed]
    code, seconds = (1 if failed else 0), time.monotonic() - start
    if as_json:
        kept = str(folder) if keep or failed else None
        steps = [asdict(outcome) for outcome in outcomes]
        print_json({"exit_code": code, "seconds": round(seconds, 1), "folder": kept, "steps": steps}, problems)
    else:
        went = sum(outcome.state in ("ok", "warning") for outcome in outcomes)
        where = f"; everything lies in {folder}" if keep or failed else ""
        results().print(f"{went} steps went well, {len(failed)} failed, in {seconds:.0f} s{where}")
    raise typer.Exit(code)


def _silent(outcome: Outcome) -> None:
    """Nothing: --json prints all outcomes at the end."""


def _print(outcome: Outcome) -> None:
    """One line a step."""
    log = f" (log: {outcome.log})" if outcome.log else ""
    seconds = f"{outcome.seconds:5.1f} s" if outcome.state not in ("absent", "skipped") else "       "
    text = f"{_MARKS[outcome.state]} {outcome.name:<7} {seconds}  {outcome.said}{log}"
    results().print(printable(text), style=_STYLES[outcome.state] if outcome.state != "ok" else None)


if __name__ == "__main__":
    sys.exit(run_app(app, name="python -m lora_tune.rehearse"))

"""`lora-tune sweep RECIPE --set KEY=VALUES …`: many runs of one recipe, the bad ones stopped early, the best one named.

1. every value is checked against the schema, 2. the sweep's folder and its journal, 3. runs as processes, each an
ordinary adapter folder, 4. table, picture and the best run. The same command goes on where it was stopped or killed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lora_tune.errors import CheckFailed, DataError, Interrupted, LoraTuneError, Problem, RecipeError, UsageError
from lora_tune.interrupts import Stop, signal_name
from lora_tune.recipe_file import RecipeFile
from lora_tune.terminal import activity, messages, print_json, print_problems, print_table, printable, results, run_app
from lora_tune.training.metrics_file import write_whole
from lora_tune.training.sweep_runs import Ending, SweepRuns
from lora_tune.training.sweep_space import Axis, check_values, grid, parse_axes
from lora_tune.training.sweep_study import Known, Sampler, StudyRun, SweepStudy, best_of, by_loss

app = typer.Typer(help="Many runs of one recipe, and the best of them.", add_completion=False)
SETTINGS, RESULTS, PICTURE, LOCK = "sweep.json", "results.json", "sweep.svg", ".lock"
_HOPELESS = {2: RecipeError, 3: DataError}  # exit codes that the next run would have as well


@dataclass(frozen=True)
class Sweep:
    """What is asked for: the recipe and what varies in it, where it goes, how many runs, how they are chosen."""

    file: RecipeFile
    overrides: tuple[str, ...]
    axes: tuple[Axis, ...]
    folder: Path
    sampler: Sampler
    trials: int
    cards: tuple[str | None, ...]
    prune: Literal["median", "none"]
    trust_remote_code: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same when the sweep goes on."""
        return {
            "recipe": self.file.text,
            "overrides": list(self.overrides),
            "set": {axis.key: list(axis.values) or "..".join(axis.ends or ()) for axis in self.axes},
            "sampler": self.sampler,
        }


def sweep(asked: Sweep) -> list[Known]:
    """Make the runs that are missing, and return all of them with what is known of each.

    Raises:
        UsageError: the folder is in use or holds something else.
        LoraTuneError: the recipe or its data do not do: no run could.
        Interrupted: a signal; runs under way were stopped with a checkpoint, and the same command goes on.
    """
    from filelock import FileLock, Timeout

    _claim(asked)
    try:
        with FileLock(asked.folder / LOCK, timeout=0):
            study = SweepStudy(
                asked.folder, asked.axes, sampler=asked.sampler, seed=asked.file.recipe.seed, prune=asked.prune
            )
            if asked.sampler == "grid":
                study.plan(grid(asked.axes))
            runs = SweepRuns(asked.folder, _command(asked), asked.cards)
            try:
                with activity(f"sweeping into {asked.folder}"):
                    _work(asked, study, runs)
            except Stop as stopped:
                messages().print("stopping the runs, each with a checkpoint")
                reason = f"stopped by {signal_name(stopped.number)}; the same command goes on from there"
                raise Interrupted(stopped.number, reason) from None
            finally:
                runs.stop()
            return study.known()
    except Timeout:
        raise UsageError(Problem("another sweep is working here", "wait for it", str(asked.folder))) from None


def _work(asked: Sweep, study: SweepStudy, runs: SweepRuns) -> None:
    """Interrupted runs first, then new ones, until all are made."""
    left = study.interrupted()
    hopeless: list[LoraTuneError] = []

    def ended(ending: Ending) -> None:
        words = "; ".join(problem.reason for problem in ending.problems)
        ending.run.end(ending.state, loss=ending.loss, reason=words)
        _say(ending, asked.folder)
        if ending.state == "failed" and ending.code in _HOPELESS:
            hopeless.append(_HOPELESS[ending.code](list(ending.problems)))

    while not hopeless:
        while runs.free and (run := _next(asked, study, left)) is not None:
            runs.start(run)
        if runs.free == len(runs.cards):
            return
        runs.wait(ended)
    raise hopeless[0]


def _next(asked: Sweep, study: SweepStudy, left: list[StudyRun]) -> StudyRun | None:
    """The next run to start: one that was interrupted, one of the grid, or one that the sampler draws; None at the end.

    One whose values an earlier run had already is ended at once, with that run's loss.
    """
    if left:
        return left.pop(0)
    while study.waiting() if asked.sampler == "grid" else len(study.known()) < asked.trials:
        run = study.next()
        twin = next((one for one in study.known() if one.number < run.number and one.values == run.values), None)
        if twin is None or twin.state != "complete" or twin.loss is None:
            return run
        run.same_as(twin.number, twin.loss)
    return None


def _claim(asked: Sweep) -> None:
    """Make the folder, or see that it is this sweep's. Raises: UsageError."""
    path = asked.folder / SETTINGS
    text = json.dumps(asked.settings, indent=1) + "\n"
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        changed = [key for key, value in asked.settings.items() if before.get(key) != value]
        if changed:
            fix = "go on with the same command, or name another --output"
            raise UsageError(Problem(f"is another sweep: {', '.join(changed)} changed", fix, str(asked.folder)))
        return
    if asked.folder.exists() and (not asked.folder.is_dir() or any(asked.folder.iterdir())):
        raise UsageError(Problem("is in use, and no sweep", "name another --output", str(asked.folder)))
    asked.folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def _command(asked: Sweep) -> list[str]:
    trust = ["--trust-remote-code", asked.trust_remote_code] if asked.trust_remote_code else []
    return [sys.executable, "-m", "lora_tune", "run", str(asked.file.path), *trust, *asked.overrides]


@app.command()
def command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, the same for all runs")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUES", help="What varies: lora.rank=8,16 or 1e-5..1e-3.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at a time; of several cards each gets one.")] = 1,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Runs in all, for random and tpe.")] = None,
    sampler: Annotated[Sampler, typer.Option(help="All combinations, or values drawn by chance or by TPE.")] = "grid",
    prune: Annotated[
        Literal["median", "none"], typer.Option(help="Stop a run whose held-out loss is worse than most at that step.")
    ] = "median",
    output: Annotated[
        Path | None, typer.Option(help="The sweep's folder; else that of the output with -sweep.")
    ] = None,
    trust_remote_code: Annotated[
        str | None, typer.Option(metavar="REPO", help="Run the code that comes with this base; name its repository.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a recipe with many values of some keys; every run is an ordinary adapter folder below the sweep's."""
    axes = parse_axes(settings or ())
    if sampler == "grid":
        if trials is not None:
            raise UsageError("a grid has as many runs as combinations", "leave --trials out, or add --sampler random")
        trials = len(grid(axes))
    elif trials is None:
        raise UsageError(f"--sampler {sampler} draws for ever", "say how many runs: --trials 20")
    file = check_values(recipe, overrides or (), axes)
    problems = _measurable(file, axes=axes, prune=prune)
    folder = output or Path(f"{file.recipe.output.rstrip('/')}-sweep")
    cards = _cards(jobs)
    same = tuple(
        one for one in overrides or () if one.partition("=")[0] != "output"
    )  # each run has a folder of its own
    asked = Sweep(file, same, axes, folder, sampler, trials, cards, prune, trust_remote_code)
    if not as_json:
        print_problems([*file.warnings, *problems])
    _conclude(asked, sweep(asked), problems, form="json" if as_json else "table")


def _conclude(asked: Sweep, runs: Sequence[Known], problems: list[Problem], *, form: Literal["json", "table"]) -> None:
    """Write and print what came of it. Raises: CheckFailed where no run finished."""
    best = best_of(runs)
    logs = asked.folder / "logs"
    for run in runs:
        if run.state == "failed":
            log = str(logs / f"{run.number:03d}.log")
            problems.append(Problem(f"run {run.number:03d} failed: {run.reason}", "", log, severity="warning"))
    facts = _facts(asked, runs, best)
    write_whole(asked.folder / RESULTS, json.dumps(facts, indent=1) + "\n")
    drawn = _draw(asked, runs, best)
    if best is None:
        raise CheckFailed([Problem("no run of the sweep finished", "see the logs", str(logs)), *problems])
    if form == "json":
        print_json({"exit_code": 0, **facts}, problems)
    else:
        _print(asked, runs, best, drawn=drawn)
        print_problems([problem for problem in problems if problem.severity == "warning"])


def _measurable(file: RecipeFile, *, axes: Sequence[Axis], prune: str) -> list[Problem]:
    """What should be said of comparing the runs. Raises: RecipeError where they cannot be compared."""
    recipe = file.recipe
    if not recipe.holds_out:
        problem = Problem("holds no row out, and runs are compared by their loss on such rows", "write 2%",
                          key="eval.hold_out")  # fmt: skip
        raise RecipeError(file.locate(problem))
    if recipe.eval.metrics is not None and "loss" not in recipe.eval.metrics:
        problem = Problem("has no loss, by which runs are compared", "add loss", key="eval.metrics")
        raise RecipeError(file.locate(problem))
    if prune == "median" and recipe.eval.every is None and all(axis.key != "eval.every" for axis in axes):
        reason = "is not set, so that no run is stopped early"
        return [Problem(reason, "add eval.every=50 or the like, or --prune none", key="eval.every", severity="note")]
    return []


def _cards(jobs: int) -> tuple[str | None, ...]:
    """Which card each of `jobs` runs at a time gets; None: what is visible, all of it."""
    from lora_tune.model.device import visible_cards

    cards = visible_cards()
    if jobs == 1 or len(cards) < 2:
        return (None,) * jobs
    if jobs > len(cards):
        raise UsageError(f"--jobs: each run gets a card, got {jobs} for {len(cards)} cards", f"at most {len(cards)}")
    return tuple(cards[:jobs])


def _say(ending: Ending, folder: Path) -> None:
    values = " ".join(f"{key}={value}" for key, value in ending.run.values.items())
    loss = "" if ending.loss is None else f" at held-out loss {ending.loss:.4f}"
    said = {"complete": f"finished{loss}", "pruned": f"stopped early{loss}", "failed": "failed"}[ending.state]
    why = f": {ending.problems[0].reason}" if ending.problems else ""
    messages().print(printable(f"{folder}/{ending.run.number:03d} {values}: {said}, {ending.seconds:.0f} s{why}"))


def _facts(asked: Sweep, runs: Sequence[Known], best: Known | None) -> dict[str, Any]:
    """What `--json` prints and `results.json` holds: every run, best first, and the best one."""
    rows = [
        {
            "run": run.number,
            "folder": str(asked.folder / f"{run.number if run.same_as is None else run.same_as:03d}"),
            "values": dict(run.values),
            "state": run.state,
            "loss": run.loss,
            "losses": [list(point) for point in run.losses],
            "same_as": run.same_as,
            "reason": run.reason,
        }
        for run in by_loss(runs)
    ]
    found = None
    if best is not None:
        folder = str(asked.folder / f"{best.number:03d}")
        found = {"run": best.number, "folder": folder, "loss": best.loss, "values": dict(best.values)}
    return {"folder": str(asked.folder), "sampler": asked.sampler, "best": found, "runs": rows}


def _draw(asked: Sweep, runs: Sequence[Known], best: Known | None) -> bool:
    """Write the picture; whether there was something to draw."""
    from lora_tune.evaluation.sweep_picture import DrawnRun, sweep_picture

    drawn = []
    for run in by_loss(runs):
        if run.loss is not None and run.state in ("complete", "pruned") and run.same_as is None:
            label = f"{run.number:03d} " + " ".join(f"{key.split('.')[-1]}={v}" for key, v in run.values.items())
            kind: Literal["best", "complete", "pruned"] = "pruned" if run.state == "pruned" else "complete"
            drawn.append(DrawnRun(label, "best" if run == best else kind, run.loss, run.losses))
    picture = sweep_picture(drawn)
    if picture is not None:
        write_whole(asked.folder / PICTURE, picture)
    return picture is not None


def _print(asked: Sweep, runs: Sequence[Known], best: Known | None, *, drawn: bool) -> None:
    """The runs as a table, best first, and what to do with the best."""
    keys = [axis.key for axis in asked.axes]
    rows = []
    for run in by_loss(runs):
        state = run.state if run.same_as is None else f"same as {run.same_as:03d}"
        step = run.losses[-1][0] if run.state == "pruned" and run.losses else None
        rows.append(
            [
                f"{run.number:03d}",
                *(run.values.get(key) for key in keys),
                None if run.loss is None else f"{run.loss:.4f}",
                state if step is None else f"{state} at {step}",
            ]
        )
    print_table("", ["run", *keys, "held-out loss", "ended"], rows, left=(0, len(keys) + 2))
    console = results()
    if drawn:
        console.print(f"{asked.folder}/{PICTURE}: the losses as a picture")
    if best is not None:
        values = " ".join(f"{key}={value}" for key, value in best.values.items())
        folder = asked.folder / f"{best.number:03d}"
        console.print(
            printable(f"best: {folder} ({values}), held-out loss {best.loss:.4f}\n"
                      f"  lora-tune chat {folder}\n"
                      f"  lora-tune run {asked.file.path} {' '.join([*asked.overrides, values])}")
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_app(app, name="python -m lora_tune.sweep"))

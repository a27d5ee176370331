"""`lora-tune eval ADAPTER|RECIPE`: base against adapter on the same rows, with intervals and a paired test.

1. the adapter and its recipe, 2. the rows: those that were held out, or others, 3. do the metrics fit them, are the
tasks at hand, 4. one loaded base, adapter on and off, 5. the scores, and whether they reach the bounds.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from lora_tune.adapter.folder import Manifest, read_manifest
from lora_tune.errors import DataError, Problem, UsageError
from lora_tune.recipe import DataSource, MetricName, Recipe
from lora_tune.recipe_file import read_recipe, read_stored_recipe
from lora_tune.terminal import activity, print_json, print_problems, results, run_app

if TYPE_CHECKING:
    from lora_tune.data.chat_template import ChatTemplate
    from lora_tune.data.sources import SourceIdentity
    from lora_tune.evaluation.bounds import Bound
    from lora_tune.evaluation.fit import HeldOut
    from lora_tune.evaluation.harness import Benchmarks
    from lora_tune.evaluation.scores import Comparison, Score

app = typer.Typer(help="Base against adapter on the same rows, with intervals.", add_completion=False)


@dataclass(frozen=True)
class Request:
    """What is asked for on the command line."""

    target: Path
    overrides: tuple[str, ...] = ()
    data: tuple[Path, ...] = ()
    format: str | None = None
    metrics: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    prompting: Literal["chat", "plain"] = "chat"
    bounds: tuple[Bound, ...] = ()
    base: str | None = None
    trust_remote_code: str | None = None


@dataclass(frozen=True)
class Measured:
    """What was measured on rows and on benchmarks ({task: {metric: score}}), and what is worth knowing."""

    comparison: Comparison
    benchmarks: dict[str, dict[str, Score]]
    notes: list[Problem] = field(default_factory=list)

    @property
    def tasks(self) -> dict[str, dict[str, Score]]:
        """The scores by task, of the rows' own tasks and of benchmarks."""
        return self.comparison.tasks | self.benchmarks


def evaluate(request: Request) -> Measured:
    """Base against adapter on held-out or other rows, and on benchmarks.

    Raises:
        UsageError, RecipeError: target, base, data, metrics or tasks cannot be found (exit 2).
        DataError: rows are wrong, were trained on, or fit none of the metrics (exit 3).
        CheckFailed: the folder fails its checks, or belongs to another base (exit 1).
    """
    from lora_tune.evaluation.scores import Comparison

    # 1. The adapter folder, its recipe and its base.
    folder, recipe = _target(request)
    manifest = read_manifest(folder)
    with activity(f"verifying {folder}"):
        from lora_tune.adapter.at_hand import base_at_hand, chat_of_folder

        name = _base_name(request, recipe)
        source, base = base_at_hand(folder, name=name, trust_remote_code=request.trust_remote_code)
    # 2. and 3. The rows with their tokens, and the tasks: everything that can be wrong without the model.
    with activity("reading the rows"):
        chat = chat_of_folder(folder)
        rows, notes = _rows(request, recipe, manifest, chat) if _asks_rows(request) else (None, [])
    metrics = request.metrics or recipe.metrics
    if rows is not None:
        from lora_tune.evaluation.fit import check_fit

        metrics = metrics or ("loss",)
        _check_bounds(request, metrics)
        check_fit(rows, metrics=metrics, evaluation=recipe.eval, seed=recipe.seed)
    tasks = _find_tasks(request)
    # 4. One loaded base, adapter on and off.
    with activity(f"loading {source.name} ({base.quantize})"):
        from lora_tune.adapter.load import load_adapter
        from lora_tune.evaluation.evaluate import compare
        from lora_tune.model.base import load_base

        model = load_adapter(load_base(source, base, trust_remote_code=request.trust_remote_code), folder)
    comparison = Comparison(scores={}, samples=())
    if rows is not None:
        comparison = compare(model, chat, rows, metrics=metrics, evaluation=recipe.eval, seed=recipe.seed)
    found: dict[str, dict[str, Score]] = {}
    if tasks is not None:
        from lora_tune.evaluation.harness import Asked, compare_on_tasks

        asked = Asked(recipe.seed, recipe.eval.max_rows, request.prompting)
        with activity("asking the tasks"):
            found, said = compare_on_tasks(model, chat, tasks, asked)
        notes = [*notes, *said]
    return Measured(comparison, found, notes)


def _check_bounds(request: Request, metrics: Sequence[str]) -> None:
    """Raise UsageError for a bound of a metric that is not measured: now, not when all is done."""
    for bound in request.bounds:
        if not bound.task and bound.metric not in metrics:
            near = get_close_matches(bound.metric, metrics, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]}?" if near else f"add --metrics {bound.metric}, or bound {', '.join(metrics)}"
            raise UsageError(Problem(f"{bound.metric} is not measured", fix, key="--at-least"))


def _asks_rows(request: Request) -> bool:
    """Tasks alone need no rows."""
    return not request.tasks or bool(request.data or request.metrics)


def _target(request: Request) -> tuple[Path, Recipe]:
    """The adapter folder and its recipe: the stored one, or the file that was named. Raises: UsageError."""
    target = request.target
    if target.is_dir():
        return target, read_stored_recipe(target / "recipe.yaml", overrides=request.overrides)
    if not target.exists():
        fix = "name an adapter folder, or the recipe of a finished run"
        raise UsageError(Problem("no such folder or recipe", fix, str(target)))
    file = read_recipe(target, overrides=request.overrides)
    folder = Path(file.recipe.output)
    if not folder.is_dir():
        fix = f"train it: lora-tune run {target}"
        raise UsageError(Problem("the recipe has not been run: its output folder is missing", fix, str(folder)))
    return folder, file.recipe


def _base_name(request: Request, recipe: Recipe) -> str | None:
    """Where the base lies, for a local one: as `--base` says, else as the recipe does."""
    return request.base or (recipe.base.name if Path(recipe.base.name).is_dir() else None)


def _rows(request: Request, recipe: Recipe, manifest: Manifest, chat: ChatTemplate) -> tuple[HeldOut, list[Problem]]:
    """The rows to evaluate on with their tokens, and warnings.

    The rows that the run held out, made again from data with the recorded hashes; or all rows of the files of `--data`
    where none of them is recorded. Raises: UsageError, DataError.
    """
    from lora_tune.data.held_out import encoded, rows_in, rows_of, shared_with_training
    from lora_tune.data.recorded import Finder, Recorded, content_hash, with_found_data

    for path in request.data:
        if not path.exists():
            raise UsageError(Problem("no such file or folder", "check the path", str(path), key="--data"))
    recorded = [Recorded(one.name, one.format, one.sha256, one.revision) for one in manifest.data]
    hashes = {one.sha256 for one in recorded}
    finder = Finder(request.data, Path.cwd())
    others = [path for path in request.data if content_hash(path) not in hashes]
    if request.data and others:
        if len(others) < len(request.data):
            known = next(path for path in request.data if path not in others)
            reason = f"{known} was read by the training and {others[0]} was not"
            raise UsageError(Problem(reason, "give data of one kind", key="--data"))
        kind = request.format or "auto"
        sources = [DataSource.model_validate({"source": str(path), "format": kind}) for path in request.data]
        found, identities = rows_in(sources, seed=recipe.seed)
        trained = {one.sha256: one.name for one in recorded}
        notes = [*_seen(identities, trained), *shared_with_training(found, recipe, recorded, finder=finder)]
        return encoded(found, chat, recipe.model_copy(update={"data": tuple(sources)})), notes
    if request.target.is_dir():
        recipe = with_found_data(recipe, recorded, finder, where=str(request.target))
    _refuse_trained(request, recipe)
    found, identities = rows_of(recipe)
    _refuse_changed(identities, hashes, where=str(request.target))
    return encoded(found, chat, recipe), []


def _seen(identities: Sequence[SourceIdentity], trained: dict[str, str]) -> list[Problem]:
    """Raise DataError where a source was trained on."""
    from lora_tune.data.overlap import trained_sources

    problems = trained_sources(identities, trained)
    if problems:
        raise DataError(problems)
    return []


def _refuse_trained(request: Request, recipe: Recipe) -> None:
    """Rows of a training file are evaluated only where some of them were held out. Raises: DataError."""
    from lora_tune.data.recorded import content_hash

    if not recipe.holds_out and request.data:
        reason = f"{request.data[0]} was trained on, and no row of it was held out"
        raise DataError(Problem(reason, "evaluate on rows that were held out", key="--data"))
    hold_out = Path(str(recipe.eval.hold_out))
    if request.data and hold_out.is_file() and not recipe.eval.hold_out_tasks:
        right = content_hash(hold_out)
        for path in request.data:
            if content_hash(path) != right:
                fix = f"the held-out rows are those of {hold_out.name}"
                raise DataError(Problem(f"{path} was trained on", fix, key="--data"))


def _refuse_changed(identities: Sequence[SourceIdentity], hashes: set[str], *, where: str) -> None:
    """A source that changed since the training is split otherwise: rows held out now were trained then."""
    problems = [
        Problem(
            f"{one.name} is not what the adapter was trained with (sha256 {one.sha256[:16]}…)",
            "bring its old content back, or give other rows with --data",
            where,
        )
        for one in identities
        if one.sha256 not in hashes
    ]
    if problems:
        raise DataError(problems)


def _find_tasks(request: Request) -> Benchmarks | None:
    if not request.tasks:
        return None
    with activity("finding the tasks"):
        from lora_tune.evaluation.harness import find_tasks

        return find_tasks(request.tasks)


@app.command("eval")
def command(
    target: Annotated[Path, typer.Argument(help="The adapter folder, or the recipe of a finished run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Such as eval.max_rows=100 or seed=1.")] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", help="Rows to evaluate on; or where the data lies that rows were held out of."),
    ] = None,
    data_format: Annotated[
        str | None, typer.Option("--format", help="What a row of --data looks like, as data[].format says it.")
    ] = None,
    metrics: Annotated[
        list[str] | None, typer.Option("--metrics", help="Metrics instead of the recipe's: loss,rouge_l …")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", help="Tasks of lm-evaluation-harness: gsm8k,ifeval … or FILE.yaml")
    ] = None,
    plain_prompts: Annotated[
        bool, typer.Option("--plain-prompts", help="Ask the tasks without the chat template.")
    ] = False,
    at_least: Annotated[
        list[str] | None,
        typer.Option("--at-least", help="metric=value bounds the adapter's score, metric=base+value its lead: exit 1."),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Where its base is, for a local folder.")] = None,
    trust_remote_code: Annotated[
        str | None, typer.Option(metavar="REPO", help="Run the code that comes with this base; name its repository.")
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write a page with scores and answers here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Base against adapter on the same held-out rows: scores, intervals and a paired test, from one loaded model."""
    from lora_tune.evaluation.bounds import read_bounds

    if report is not None and (report.is_dir() or not report.absolute().parent.is_dir()):
        raise UsageError(
            Problem("is no place for a file", "name a file, such as report.html", str(report), key="--report")
        )
    request = Request(
        target=target,
        overrides=tuple(overrides or ()),
        data=tuple(data or ()),
        format=_format(data_format),
        metrics=_metric_names(_names(metrics)),
        tasks=tuple(_names(tasks)),
        prompting="plain" if plain_prompts else "chat",
        bounds=tuple(read_bounds(_names(at_least))),
        base=base,
        trust_remote_code=trust_remote_code,
    )
    measured = evaluate(request)
    if report is not None:
        _write_report(report, request, measured)
    problems = [*measured.notes, *_broken(request.bounds, measured)]
    code = 1 if any(problem.severity == "error" for problem in problems) else 0
    if as_json:
        print_json({"exit_code": code, **_as_json(measured)}, problems)
    else:
        _show(measured)
        print_problems(problems)
    raise typer.Exit(code)


def _names(texts: Sequence[str] | None) -> list[str]:
    """Names that were given one by one or with commas between them."""
    return [part.strip() for text in texts or () for part in text.split(",") if part.strip()]


def _metric_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names of metrics. Raises: UsageError for one that is not in the table."""
    known = get_args(MetricName)
    problems = []
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]}?" if near else f"the metrics are {', '.join(known)}"
            problems.append(Problem(f"no such metric, got {name!r}", fix, key="--metrics"))
    if problems:
        raise UsageError(problems)
    return tuple(dict.fromkeys(names))


def _format(name: str | None) -> str | None:
    """Raise UsageError for a format that is none."""
    known = get_args(DataSource.model_fields["format"].annotation)
    if name is not None and name not in known:
        raise UsageError(Problem(f"no such format, got {name!r}", f"one of {', '.join(known)}", key="--format"))
    return name


def _broken(bounds: Sequence[Bound], measured: Measured) -> list[Problem]:
    found = [bound.broken_by(measured.comparison.scores, measured.tasks) for bound in bounds]
    return [problem for problem in found if problem]


def _write_report(path: Path, request: Request, measured: Measured) -> None:
    """The page of this evaluation, with what the folder tells of the training. Raises: UsageError."""
    from lora_tune.evaluation.report_facts import facts_of_folder
    from lora_tune.evaluation.report_page import report_page
    from lora_tune.training.metrics_file import read_metrics

    folder, _ = _target(request)
    comparison = replace(measured.comparison, tasks=measured.tasks)
    steps = read_metrics(folder / "metrics.jsonl")
    facts = facts_of_folder(folder, read_manifest(folder), comparison, steps=steps, command=_repeated(request))
    try:
        path.write_text(report_page(facts), encoding="utf-8")
    except OSError as error:
        reason = f"cannot be written: {error.strerror}"
        raise UsageError(Problem(reason, "name another file", str(path), key="--report")) from None


def _repeated(request: Request) -> str:
    """The command that measures this again, without a path of this machine."""
    words = ["lora-tune", "eval", "path/to/this/folder"]
    words += [override for override in request.overrides if os.sep not in override]
    words += [word for path in request.data for word in ("--data", path.name)]
    words += ["--format", request.format] if request.format else []
    words += ["--metrics", ",".join(request.metrics)] if request.metrics else []
    words += ["--tasks", ",".join(Path(task).name for task in request.tasks)] if request.tasks else []
    words += ["--plain-prompts"] if request.prompting == "plain" else []
    words += ["--base", "path/to/the/base"] if request.base else []
    return shlex.join(words)


def _as_json(measured: Measured) -> dict[str, Any]:
    """What `--json` prints: rows, metrics and tasks."""
    from lora_tune.evaluation.spread import tasks_as_json

    benchmarks = {
        task: {name: score.as_json() for name, score in scores.items()} for task, scores in measured.benchmarks.items()
    }
    return {
        "rows": len(measured.comparison.rows),
        "metrics": {name: score.as_json() for name, score in measured.comparison.scores.items()},
        "tasks": tasks_as_json(measured.comparison) | benchmarks,
    }


def _show(measured: Measured) -> None:
    """The answers and the tables, as a person reads them."""
    from lora_tune.evaluation.report import samples_table, scores_table
    from lora_tune.evaluation.spread import templates_table

    console, comparison = results(), measured.comparison
    if comparison.samples:
        console.print(samples_table(comparison.samples), soft_wrap=False)
    if comparison.scores:
        console.print(scores_table(comparison.scores), soft_wrap=False)
    for task, scores in measured.tasks.items():
        if scores:
            console.print(scores_table(scores, title=task), soft_wrap=False)
    if comparison.templates:
        console.print(templates_table(comparison), soft_wrap=False)


if __name__ == "__main__":
    sys.exit(run_app(app, name="python -m lora_tune.eval"))

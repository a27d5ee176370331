"""`lora-tune launch RECIPE --on ENGINE`: the file that a cluster engine takes to run a recipe; nothing is started here.

1. the recipe is read and checked, 2. what the engine's machines will not have is refused, 3. the file, looked through
for secrets and local paths. `--serve ADAPTER …` writes the files of a vLLM deployment instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lora_tune.adapter.secrets import kinds_in
from lora_tune.errors import CheckFailed, Problem, RecipeError, UsageError
from lora_tune.recipe import Recipe
from lora_tune.recipe_file import RecipeFile, read_recipe
from lora_tune.recipe_values import seconds_of
from lora_tune.terminal import print_json, print_problems, printable, results, run_app
from lora_tune.training.job_files import STORAGE, Engine, Job, file_name, how_to_submit, job_name, render
from lora_tune.training.metrics_file import write_whole

if TYPE_CHECKING:
    from lora_tune.adapter.engine_arguments import Served
    from lora_tune.adapter.folder import Manifest

app = typer.Typer(help="Files that cluster engines take: trainings, and replicas of vLLM.", add_completion=False)
Target = Literal["slurm", "kubeflow", "skypilot", "dstack", "ray", "compose", "kubernetes"]
_MOUNTED = ("kubeflow", "skypilot", "dstack")  # engines whose storage is mounted at STORAGE
_SERVING = ("compose", "kubernetes")
_SAID = ("output", "hardware.processes", "hardware.nodes")  # keys that the job says itself


@app.command()
def command(
    names: Annotated[
        list[str], typer.Argument(metavar="RECIPE [KEY=VALUE]...", help="The recipe; with --serve adapter folders.")
    ],
    on: Annotated[Target | None, typer.Option("--on", help="The engine; of --serve both files without it.")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Serve adapters by vLLM instead of training.")] = False,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Machines, else what hardware: says; with --serve replicas.")
    ] = None,
    cards: Annotated[int | None, typer.Option(min=1, help="Cards of each, else what hardware: says.")] = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="The cards' name, as the engine calls it.")] = None,
    image: Annotated[str | None, typer.Option(metavar="NAME", help="A container image with lora_tune in it.")] = None,
    setup: Annotated[
        str, typer.Option(metavar="COMMAND", help="Installs it, without an image.")
    ] = "pip install lora_tune",
    storage: Annotated[
        str | None, typer.Option(metavar="NAME", help="What outlives the machines: a claim, bucket, volume or folder.")
    ] = None,
    time: Annotated[str | None, typer.Option(metavar="DURATION", help="The longest it may take: 90m, 24h.")] = None,
    spot: Annotated[bool, typer.Option("--spot", help="On machines that may be taken away.")] = False,
    secret: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="An environment variable to hand on, by its name.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The file; by default named after the run, here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the file with which an engine runs the recipe, or serves the adapters, and print how to hand it over."""
    if serve:
        if on is not None and on not in _SERVING:
            raise UsageError(f"--serve is rendered for {' or '.join(_SERVING)}, got {on!r}", "leave --on out for both")
        folders = [Path(name) for name in names]
        written = _write_serving(folders, on=on, replicas=nodes or 2, cards=cards or 1, storage=storage, output=output)
        _conclude(written, as_json="yes" if as_json else "no")
        return
    if on is None or on in _SERVING:
        raise UsageError("a training needs its engine, got none", "--on slurm, kubeflow, skypilot, dstack or ray")
    path, *overrides = names
    file = read_recipe(Path(path), overrides=overrides)
    engine: Engine = on  # type: ignore[assignment]
    hardware = file.recipe.hardware
    each = cards or (hardware.processes if hardware.processes != "auto" else 1)
    job = Job(
        name=job_name(file.recipe.output), recipe=_sent_path(file), recipe_text=file.text,
        output=_output(file.recipe, engine, storage),
        overrides=tuple(one for one in overrides if one.partition("=")[0] not in _SAID),
        nodes=nodes or hardware.nodes, cards=each, gpu=gpu, image=image, setup=setup, storage=storage,
        seconds=_seconds(time), machines="spot" if spot else "lasting", secrets=tuple(secret or ()),
    )  # fmt: skip
    _conclude(_write_job(file, job, engine, output), as_json="yes" if as_json else "no", problems=file.warnings)


def _write_job(file: RecipeFile, job: Job, engine: Engine, output: Path | None) -> dict[str, str]:
    """Check and write the file of a training; returns {file: how to start it}."""
    _check(file, job, engine)
    target = output or Path(file_name(job, engine))
    submit = how_to_submit(job, engine, str(target))
    text = render(job, engine).replace(how_to_submit(job, engine, "FILE"), submit)
    _refuse_secrets(text)
    _write(target, text)
    return {str(target): submit}


def _sent_path(file: RecipeFile) -> str:
    """The recipe's path from this folder, which is what engines send along. Raises: UsageError."""
    path = os.path.relpath(file.path.resolve())
    if path.startswith(".."):
        fix = "start this in the folder that holds recipe and data"
        raise UsageError(Problem("lies outside of this folder, which is what is sent", fix, str(file.path)))
    return path


def _output(recipe: Recipe, engine: Engine, storage: str | None) -> str:
    """The adapter's folder where the run takes place: on what outlives the machines."""
    if engine in _MOUNTED:
        return f"{STORAGE}/{Path(recipe.output).name}"
    return f"{storage.rstrip('/')}/{Path(recipe.output).name}" if storage else recipe.output


def _seconds(time: str | None) -> int | None:
    if time is None:
        return None
    try:
        return int(seconds_of(time))
    except ValueError:
        raise UsageError(f"--time must be a duration, got {time!r}", "such as 90m, 24h or 1h30m") from None


def _check(file: RecipeFile, job: Job, engine: Engine) -> None:
    """What the machines of the engine will not have, or cannot share. Raises: RecipeError."""
    from lora_tune.model.strategy import conflicts, uneven

    recipe, world = file.recipe, job.nodes * job.cards
    found = [problem] if (problem := uneven(recipe.train.batch_size, world)) else []
    asked = recipe.hardware.strategy
    if asked == "single" and world > 1:
        found.append(Problem(f"means one process, got {world}", "write auto", key="hardware.strategy"))
    elif asked != "auto" and asked != "single":
        known = conflicts(asked, base=recipe.base, lora=recipe.lora, train=recipe.train)
        found += [one for one in known if one.key != "hardware.strategy"]  # what is installed here does not count
    if Path(recipe.output).is_absolute() and engine in ("slurm", "ray") and not job.storage:
        found.append(Problem("is a path of this machine", "write a relative one, or --storage FOLDER", key="output"))
    here = Path.cwd().resolve()
    for key, name in _local_paths(recipe):
        if engine == "kubeflow":
            fix = "name a hub id: the recipe is sent as a ConfigMap, and nothing else"
            found.append(Problem(f"is a local path, got {Path(name).name!r}", fix, key=key))
        elif not Path(name).resolve().is_relative_to(here):
            fix = "move it below this folder, or put it on the hub"
            found.append(Problem("lies outside of this folder, which is what is sent", fix, key=key))
    for override in job.overrides:
        key, _, value = override.partition("=")
        if value.startswith("/") and key != "output":
            found.append(Problem("is a path of this machine", "write it relative to this folder", key=key))
    if found:
        raise RecipeError([file.locate(problem) for problem in found])


def _local_paths(recipe: Recipe) -> list[tuple[str, str]]:
    """Keys and values that are files or folders of this machine; reading the recipe has made them absolute."""
    named = {"base.name": recipe.base.name, "base.chat_template": recipe.base.chat_template,
             "eval.hold_out": str(recipe.eval.hold_out), "lora.start_from": recipe.lora.start_from}  # fmt: skip
    for number, source in enumerate(recipe.data):
        named |= {f"data.{number}.source": source.source, f"data.{number}.prompts": source.prompts}
    return [(key, value) for key, value in named.items() if value and Path(value).is_absolute()]


def _refuse_secrets(text: str) -> None:
    """Raises: CheckFailed where the file would give something away."""
    for number, line in enumerate(text.splitlines(), start=1):
        for kind in kinds_in(line):
            raise CheckFailed(Problem(f"the file would hold {kind}", "remove it there", line=number))


def _write_serving(
    folders: Sequence[Path], *, on: Target | None, replicas: int, cards: int, storage: str | None, output: Path | None
) -> dict[str, str]:
    """The files of a vLLM deployment of adapters that share a base; returns {file: how to start it}."""
    from lora_tune.serving.deploy import VllmDeployment, render_vllm_deployment

    served = _served(folders)
    if output is not None and on is None:
        raise UsageError("--output names one file, and two are written", "add --on compose or --on kubernetes")
    written = {}
    for form in (on,) if on is not None else _SERVING:
        folder = storage or ("./adapters" if form == "compose" else "adapters")
        deployment = VllmDeployment(served, replicas=replicas, gpus=cards, folder=folder)
        text = render_vllm_deployment(deployment, to="compose" if form == "compose" else "kubernetes")
        _refuse_secrets(text)
        path = output or Path(f"serve.{form}.yaml")
        _write(path, text)
        run = f"docker compose -f {path} up" if form == "compose" else f"kubectl apply -f {path}"
        written[str(path)] = run
    return written


def _served(folders: Sequence[Path]) -> Served:
    """What vLLM serves: the base of the adapters, which all share it, and each by the name of its folder.

    Raises: UsageError, CheckFailed where folders do not fit each other, or vLLM cannot run one of them.
    """
    from lora_tune.adapter.compat import judge
    from lora_tune.adapter.engine_arguments import Served
    from lora_tune.adapter.verify import engine_traits, verify_folder
    from lora_tune.serving.deploy import ADAPTERS

    bases: dict[tuple[str, str | None], Manifest] = {}
    adapters: dict[str, str] = {}
    templates: dict[str, str | None] = {}
    rank = 1
    for folder in folders:
        report = verify_folder(folder, depth="quick")
        manifest = report.subject.manifest
        if report.errors or manifest is None:
            fix = "launch finished adapter folders"
            raise CheckFailed(report.errors or [Problem("has no manifest, which names its base", fix, str(folder))])
        traits = engine_traits(report.subject)
        verdict = judge(traits, "vllm")
        if verdict.mark in ("refused", "wrong"):
            answer = verdict.answers[0]
            raise CheckFailed(Problem(f"vLLM: {answer.reason}", answer.fix, str(folder)))
        name = folder.resolve().name
        if name in adapters:
            raise UsageError(Problem("two adapters have the same name", "rename one of the folders", str(folder)))
        bases[(manifest.base.name, manifest.base.revision)] = manifest
        adapters[name] = f"{ADAPTERS}/{name}"
        rank = max(rank, *traits.ranks)
        own = manifest.chat.origin != "base"
        templates[manifest.chat.template_sha256] = f"{ADAPTERS}/{name}/chat_template.jinja" if own else None
    if len(bases) > 1:
        reason = f"the adapters belong to several bases: {', '.join(name for name, _ in bases)}"
        raise UsageError(reason, "write a deployment for each")
    ((base, revision), manifest), *_ = bases.items()
    if len(templates) > 1:
        raise UsageError("the adapters have several chat templates, vLLM one", "write a deployment for each")
    (template,) = templates.values()
    dtype = manifest.base.compute_dtype
    return Served(base, base, adapters, rank=rank, revision=revision, template=template, dtype=dtype)


def _write(path: Path, text: str) -> None:
    """Raises: UsageError where something else is there."""
    if path.exists() and path.read_bytes() != text.encode():
        first = path.read_bytes()[:400]
        if b"written by lora" not in first and b"lora-tune launch" not in first:
            raise UsageError(
                Problem("is there already, and was not written by launch", "name another --output", str(path))
            )
    write_whole(path, text)


def _conclude(written: dict[str, str], *, as_json: Literal["yes", "no"], problems: Sequence[Problem] = ()) -> None:
    """Print what was written, and how it is handed over."""
    if as_json == "yes":
        print_json(
            {"exit_code": 0, "files": [{"path": path, "start": start} for path, start in written.items()]}, problems
        )
        return
    print_problems(problems)
    for path, start in written.items():
        results().print(printable(f"{path} written; nothing was started. Start it:  {start}"))


if __name__ == "__main__":
    sys.exit(run_app(app, name="python -m lora_tune.launch"))

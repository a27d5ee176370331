"""`lora-tune adapters …`: what adapter folders there are, what one is, whether it is sound; handing them on."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_tune.adapter import words
from lora_tune.adapter.compat import ENGINES, SIGNS, Verdict, engines_named, judge
from lora_tune.adapter.describe import by_layer, is_inert, updates
from lora_tune.adapter.folder import CONFIG, MANIFEST, WEIGHTS, Manifest, read_manifest
from lora_tune.errors import CheckFailed, Problem, UsageError
from lora_tune.recipe import Base
from lora_tune.terminal import activity, number_text, print_json, print_problems, print_table, results, run_app

app = typer.Typer(help="Look at adapter folders and verify them.", no_args_is_help=True, add_completion=False)


@app.command("list")
def list_folders(
    directory: Annotated[Path, typer.Argument(help="The folder that holds adapter folders.")] = Path("adapters"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the adapter folders below a folder: base, method, rows trained on, scores."""
    if not directory.is_dir():
        raise UsageError(Problem("no such folder", "name the folder that holds adapter folders", str(directory)))
    found: list[dict[str, Any]] = []
    problems: list[Problem] = []
    for folder in sorted(path.parent for path in directory.glob(f"*/{CONFIG}")):
        try:
            found.append(_line(folder))
        except CheckFailed as error:
            problems += error.problems
    if as_json:
        print_json({"exit_code": 0, "adapters": found}, problems)
        return
    columns = ("name", "base", "method", "steps", "rows", "scores (base → adapter)")
    print_table(
        "", columns, [[line[key] for key in ("name", "base", "method", "steps", "rows", "scores")] for line in found]
    )
    print_problems(problems)


def _line(folder: Path) -> dict[str, Any]:
    """One row of the list. Raises: CheckFailed where the manifest is damaged."""
    if not (folder / MANIFEST).exists():
        return {"name": folder.name, "base": None, "method": None, "steps": None, "rows": None, "scores": "no manifest"}
    manifest = read_manifest(folder)
    scores = [f"{name} {score.base:.3g} → {score.adapter:.3g}" for name, score in manifest.scores.items()]
    rows = manifest.training.rows or sum(item.rows for item in manifest.data)
    base, training = manifest.base.name, manifest.training
    return {
        "name": folder.name,
        "base": base,
        "method": training.method,
        "steps": training.steps,
        "rows": rows,
        "scores": ", ".join(scores),
    }


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="The adapter folder.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Where its base is: a folder, hub id or builtin: name.")
    ] = None,
    engines: Annotated[
        str | None,
        typer.Option("--for", help="Would it run right in vllm, sglang, llama.cpp, ollama, mlx, lorax? Or all."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Files, hashes and tensors only; nothing is loaded.")] = False,
    trust_remote_code: Annotated[
        str | None, typer.Option(metavar="REPO", help="Run the code that comes with this base; name its repository.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check files, hashes and tensors of an adapter folder, then load it on its base and replay its test vectors."""
    from lora_tune.adapter.verify import Depth, engine_traits, verify_folder

    asked = engines_named(engines) if engines else ()
    with activity(f"verifying {folder}"):
        depth: Depth = "quick" if quick else "full"
        held = _held_base(folder, base)
        report = verify_folder(folder, base=held, depth=depth, trust_remote_code=trust_remote_code)
    verdicts = [] if report.errors else [judge(engine_traits(report.subject), engine) for engine in asked]
    code = 1 if report.errors or any(verdict.mark in ("refused", "wrong") for verdict in verdicts) else 0
    if as_json:
        found = {"engines": {verdict.engine: asdict(verdict) for verdict in verdicts}} if asked else {}
        print_json({"exit_code": code, **report.facts, **found}, report.problems)
    else:
        print_problems(report.problems)
        if not report.errors:
            results().print(_verdict(folder, report.facts))
        _print_engines(verdicts)
    raise typer.Exit(code)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="The adapter folder.")],
    base: Annotated[str | None, typer.Option("--base", help="Where its base is, to compare with it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what an adapter folder is: base, method, rank, targets, size, provenance, how much each layer changes."""
    from lora_tune.adapter.verify import verify_folder

    with activity(f"reading {folder}"):
        report = verify_folder(folder, base=_held_base(folder, base), depth="quick")
        if report.errors:
            raise CheckFailed(list(report.errors))
        subject = report.subject
        found = updates(folder / WEIGHTS, subject.header, subject.known_settings())
    facts: dict[str, Any] = dict(report.facts) | {
        "own_template": words.template_text(folder) is not None,
        "provenance": _provenance(subject.manifest),
        "inert": is_inert(found),
        "layers": [dict(zip(_LAYER_COLUMNS, line, strict=True)) for line in by_layer(found)],
    }
    if as_json:
        modules = [{**asdict(update), "rms": update.rms} for update in found]
        print_json({"exit_code": 0, **facts, "modules": modules}, report.problems)
        return
    print_problems(report.problems)
    print_table("", ("", ""), _description(folder, facts), left=(0, 1))
    lines = [[name, modules, f"{norm:.4g}", f"{rms:.2e}"] for name, modules, norm, rms in by_layer(found)]
    print_table("what it adds to the base", ("", "modules", "norm of the update", "per weight (RMS)"), lines)
    if facts["inert"]:
        results().print("inert: no update is large enough to change an answer")


_LAYER_COLUMNS = ("name", "modules", "norm", "rms")


def _provenance(manifest: Manifest | None) -> dict[str, Any] | None:
    if manifest is None:
        return None
    fields = {"tool", "created", "libraries", "seed", "data", "training"}
    return manifest.model_dump(mode="json", include=fields)


def _description(folder: Path, facts: Mapping[str, Any]) -> list[list[str]]:
    """What is known of a folder, as lines of a name and a text."""
    base, made = facts["base"], facts["provenance"]
    named = base if isinstance(base, str) or base is None else f"{base['name']} ({base['quantize']}, {base['kind']})"
    lines = [
        ["adapter", folder.name],
        ["base", named or "not named"],
        ["method", f"{facts['method']}, rank {facts['rank']}, alpha {facts['alpha']:g}"],
        ["targets", facts["targets"] if isinstance(facts["targets"], str) else ", ".join(sorted(facts["targets"]))],
        ["parameters", f"{number_text(facts['parameters'])} ({', '.join(facts['dtype'])})"],
        ["size", f"{facts['bytes'] / 2**20:,.1f} MiB"],
        ["chat template", "its own file" if facts["own_template"] else "none: the base's"],
    ]
    if made is None:
        return [*lines, ["made by", "unknown: no manifest"]]
    training, data = made["training"], ", ".join(f"{item['name']} ({item['rows']:,} rows)" for item in made["data"])
    scores = ", ".join(
        f"{name} {score['base']:.3g} → {score['adapter']:.3g}" for name, score in facts["scores"].items()
    )
    return [
        *lines,
        ["made by", f"{made['tool']}, {made['created']}"],
        ["data", data],
        ["training", f"{training['steps']:,} steps, learning rate {training['learning_rate']:g}, seed {made['seed']}"],
        ["scores", scores or "none"],
    ]


def _print_engines(verdicts: Sequence[Verdict]) -> None:
    """One line for each engine, and below it every reason that is not ✓."""
    for verdict in verdicts:
        results().print(f"{SIGNS[verdict.mark]} {ENGINES[verdict.engine]}  {verdict.flags}".rstrip())
        for answer in verdict.answers:
            results().print(f"    {SIGNS[answer.mark]} {answer.reason}; {answer.fix}")


@app.command("pack")
def pack_folder(
    folder: Annotated[Path, typer.Argument(help="The adapter folder.")],
    archive: Annotated[Path | None, typer.Argument(help="The archive to write; NAME.zip beside it by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Put a finished adapter folder into one archive to hand on, after its checks and a search for secrets."""
    from lora_tune.adapter.archive import pack

    target = archive or folder.resolve().with_name(f"{folder.resolve().name}.zip")
    with activity(f"packing {folder}"):
        size = pack(folder, target)
    if as_json:
        print_json({"exit_code": 0, "archive": target.name, "bytes": size})
    else:
        results().print(f"{target}: {size / 2**20:,.1f} MiB")


@app.command("unpack")
def unpack_archive(
    archive: Annotated[Path, typer.Argument(help="An archive that `pack` wrote.")],
    folder: Annotated[Path | None, typer.Argument(help="The new folder; adapters/NAME by default.")] = None,
    max_gib: Annotated[float, typer.Option("--max-size", help="Most GiB to unpack.", min=0.001)] = 8.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Take an adapter folder out of an archive from anywhere; it appears checked and whole, or not at all."""
    from lora_tune.adapter.archive import unpack

    target = folder or Path("adapters") / archive.stem
    with activity(f"unpacking {archive}"):
        problems = unpack(archive, target, max_bytes=int(max_gib * 2**30))
    if as_json:
        print_json({"exit_code": 0, "folder": target.name}, problems)
        return
    print_problems(problems)
    results().print(f"{target}: unpacked and checked; its proof: lora-tune adapters verify {target}")


@app.command("push")
def push_folder(
    folder: Annotated[Path, typer.Argument(help="The adapter folder.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it; private without this.")] = False,
    license_name: Annotated[
        str | None,
        typer.Option("--license", help="Licence of the adapter, such as apache-2.0, where its card has none."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Upload a finished folder to the hub, private by default, after its checks and a search for secrets."""
    from lora_tune.adapter.share import push

    with activity(f"pushing {folder} to {repository}"):
        done = push(folder, repository, visibility="public" if public else "private", license_name=license_name)
    if as_json:
        print_json({"exit_code": 0, **asdict(done)})
    else:
        results().print(f"{done.url}: pushed as {'public' if public else 'private'}, licence {done.license}")


@app.command("pull")
def pull_repository(
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub.")],
    folder: Annotated[Path | None, typer.Argument(help="The new folder; adapters/NAME by default.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    max_gib: Annotated[float, typer.Option("--max-size", help="Most GiB to download.", min=0.001)] = 8.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Download an adapter from the hub into a new folder, which appears checked and whole, or not at all."""
    from lora_tune.adapter.share import pull

    target = folder or Path("adapters") / repository.rpartition("/")[2]
    with activity(f"pulling {repository}"):
        problems = pull(repository, target, revision=revision, max_bytes=int(max_gib * 2**30))
    if as_json:
        print_json({"exit_code": 0, "folder": target.name}, problems)
        return
    print_problems(problems)
    results().print(f"{target}: downloaded and checked; its proof: lora-tune adapters verify {target}")


@app.command("diff")
def diff_folders(
    first: Annotated[Path, typer.Argument(help="An adapter folder.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show how two adapters differ: recipe, data, template, scores, and how far apart their updates are."""
    from lora_tune.adapter.difference import changed, distance
    from lora_tune.adapter.verify import verify_folder

    with activity(f"comparing {first} with {second}"):
        reports = [verify_folder(folder, depth="quick") for folder in (first, second)]
        errors = [problem for report in reports for problem in report.errors]
        if errors:
            raise CheckFailed(errors)
        a, b = reports[0].subject, reports[1].subject
        fields, apart = changed(a, b), distance(a, b)
    problems = []
    if apart.other_shapes:
        reason = f"{apart.other_shapes} modules have other shapes: they are not of one base, and have no distance"
        problems.append(Problem(reason, "compare adapters of one base", str(second), severity="warning"))
    if as_json:
        lines = [{"field": field, "first": left, "second": right} for field, left, right in fields]
        print_json({"exit_code": 0, "fields": lines, "weights": asdict(apart)}, problems)
        return
    print_problems(problems)
    if fields:
        print_table("", ("field", str(first), str(second)), fields, left=(0, 1, 2))
    else:
        results().print("recipe, data, template, scores and configuration are the same")
    results().print(
        f"updates: norm {apart.norm_a:.4g} and {apart.norm_b:.4g}, distance {apart.distance:.4g}, cosine "
        f"{apart.cosine:.4f}; {apart.shared} modules in both, {apart.only_a} and {apart.only_b} in one only"
    )


def _held_base(folder: Path, name: str | None) -> Base | None:
    """The base named on the command line, held as the manifest says, or as stored where there is no manifest."""
    from lora_tune.adapter.verify import base_of

    if name is None:
        return None
    try:
        return base_of(read_manifest(folder), name=name)
    except CheckFailed:
        return Base(name=name, quantize="none")  # the checks name what is wrong with the manifest


def _verdict(folder: Path, facts: Mapping[str, Any]) -> str:
    parts = [f"{folder}: ok: {facts['method']}, rank {facts['rank']}, {number_text(facts['parameters'])} parameters"]
    replay = facts.get("replay")
    if replay:
        parts.append(
            f"replayed as {replay['precision']}: base {replay['base']:.2g}, adapter {replay['adapter']:.2g} nats from "
            f"training (at most {replay['tolerance']:g}), effect of the adapter {replay['effect']:.3g} nats"
        )
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(run_app(app, name="python -m lora_tune.adapters"))

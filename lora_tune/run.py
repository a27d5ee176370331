"""`python -m lora_tune.run RECIPE`: train one adapter from one recipe. `run` below is the whole job; read it first."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lora_tune.adapter.claim import Mode, claim_folder
from lora_tune.adapter.folder import Manifest, read_manifest
from lora_tune.disk import disk_text
from lora_tune.errors import Problem, RecipeError, UsageError
from lora_tune.imports import quick_imports
from lora_tune.model.missing import missing_problems
from lora_tune.model.rate import learning_rate
from lora_tune.model.source import BaseSource, check_against_base, find_base, load_tokenizer
from lora_tune.recipe import Recipe, Train
from lora_tune.recipe_file import RecipeFile, read_recipe
from lora_tune.terminal import activity, messages, print_json, print_problems, results, resumable, run_app
from lora_tune.training.agent import run_processes
from lora_tune.training.finish import prove, write_folder
from lora_tune.training.identity import check_allowed
from lora_tune.training.layout import fitting_micro_batch, layout_here, plan_of_process
from lora_tune.training.place import place_here
from lora_tune.training.planned import Planned
from lora_tune.training.room import take_room
from lora_tune.training.start import Start, find_start
from lora_tune.training.team import here
from lora_tune.training.worker import as_worker

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_tune.data.chat_template import ChatTemplate
    from lora_tune.data.pipeline import Prepared
    from lora_tune.evaluation.scores import Comparison
    from lora_tune.training.evaluations import Evaluation

_RESOLVED = {"micro_batch_size", "gradient_checkpointing", "optimizer", "learning_rate", "offload"}  # once for a run
app = typer.Typer(help="Train one adapter from one recipe.", add_completion=False)


def run(
    file: RecipeFile,
    *,
    mode: Mode = "new",
    allowed: Sequence[str] = (),
    preflight: Literal["on", "off"] = "on",
    trust_remote_code: str | None = None,
) -> tuple[Manifest | None, Comparison | None]:
    """From a recipe to a proven adapter folder; returns its manifest, and base against adapter on held-out rows.

    `allowed` names the keys that a resumed run may have changed. A run that was finished already is proven once more,
    and its comparison is None. Of several processes only the first returns something.

    Raises:
        RecipeError, UsageError: the recipe, the base or the output folder does not do (exit 2).
        DataError: rows are wrong, or a limit of the ledger is exceeded (exit 3); nothing was loaded or written.
        ResourceError: it does not fit into memory (exit 4).
        CheckFailed: a loss was not finite, or the folder did not pass its own verification (exit 1).
        Interrupted: a signal came; `--resume` goes on from the checkpoint (exit 128 + its number).
    """
    recipe, folder, team = file.recipe, Path(file.recipe.output), here()
    with claim_folder(folder, mode) if team.first else nullcontext():
        # 1. The base's config and tokenizer: does the recipe fit to them, and to this machine? No weight is read yet.
        source = find_base(recipe.base, trust_remote_code=trust_remote_code)
        misfits = check_against_base(source, lora=recipe.lora, train=recipe.train)
        _report(file, [*file.warnings, *misfits, *missing_problems(recipe.base, recipe.train)])
        # 2. Every row is read, checked and split; then tokens, loss mask and packing, with an account of all of it.
        with file.locating():
            with team.in_turn("data"):
                chat, prepared = _prepare(recipe, source, trust_remote_code=trust_remote_code)
            # 3. Where it starts; what is at `auto` is decided once, to fit into memory; room on the disk is set aside.
            start = _find_start(recipe, source, prepared, chat=chat, mode=mode, allowed=allowed)
        if start.finished:
            return _finished(folder, recipe, trust_remote_code=trust_remote_code), None
        recipe, reason = _resolve(recipe, source, start=start)
        if team.first:
            take_room(folder, recipe, source, start=start)
        # 4. The frozen base, with a trainable adapter on it.
        model = _load(recipe, source, prepared, trust_remote_code=trust_remote_code)
        chat.align(model)
        # 5. The largest of everything is tried once; then training, with checkpoints, a live display and metrics.jsonl.
        with activity("training", display="own"):
            planned = Planned(source.config, recipe.base, recipe.lora, recipe.train, preflight, reason)
            _train(model, recipe, prepared, chat=chat, start=start, planned=planned)
        if not (team.first or team.divided):  # the others have done their part
            return None, None
        # 6. Base against adapter on the same held-out rows.
        with activity("comparing base and adapter", display="own"):
            comparison = _compare(model, recipe, prepared, chat=chat)
        # 7. The adapter folder: weights, tokenizer, template, recipe, ledger, test vectors, report, card, manifest.
        manifest = write_folder(recipe, source, prepared, chat=chat, model=model, comparison=comparison, reason=reason)
    # 8. Proof: another process loads the folder on the base and replays the test vectors.
    if manifest is not None:
        prove(folder, recipe, trust_remote_code=trust_remote_code)
    return manifest, comparison


def _finished(folder: Path, recipe: Recipe, *, trust_remote_code: str | None) -> Manifest | None:
    """A run that was finished before is proven once more."""
    if not here().first:
        return None
    prove(folder, recipe, trust_remote_code=trust_remote_code)
    return read_manifest(folder)


def _report(file: RecipeFile, problems: Iterable[Problem]) -> None:
    """Print warnings with their place in the recipe. Raises RecipeError where one of the problems is an error."""
    located = [file.locate(problem) for problem in problems]
    if any(problem.severity == "error" for problem in located):
        raise RecipeError(located)
    print_problems(located)


def _prepare(
    recipe: Recipe, source: BaseSource, *, trust_remote_code: str | None = None
) -> tuple[ChatTemplate, Prepared]:
    """Chat template and rows of the recipe; the ledger's warnings are printed."""
    with activity("checking the data"):
        with quick_imports():
            from lora_tune.data.checking import read_conversations

        conversations = read_conversations(recipe.data, hold_out=recipe.eval, seed=recipe.seed)
    with activity("tokenizing"):
        with quick_imports():
            from lora_tune.data.chat_template import load_chat_template
            from lora_tune.data.overlap import known_overlap
            from lora_tune.data.pipeline import encode

        tokenizer = load_tokenizer(source, new_tokens=recipe.lora.new_tokens, trust_remote_code=trust_remote_code)
        text = Path(recipe.base.chat_template).read_text(encoding="utf-8") if recipe.base.chat_template else None
        chat = load_chat_template(tokenizer, template=text, data="tools" if conversations.has_tools else "plain")
        prepared = encode(
            conversations,
            chat,
            loss_on=recipe.loss_on,
            train=recipe.train,
            limits=recipe.limits,
            seed=recipe.seed,
            mixing=recipe.mixing,
        )
        _check_metrics(recipe, prepared)
        if prepared.held_out:
            prepared.ledger.overlap = known_overlap(conversations.train, conversations.held_out)
    print_problems([*prepared.ledger.warnings(), *(Problem(notice, severity="note") for notice in chat.notices)])
    return chat, prepared


def _check_metrics(recipe: Recipe, prepared: Prepared) -> None:
    """Raise DataError where a metric fits none of the held-out rows: now, not after the training."""
    with quick_imports():
        from lora_tune.evaluation.fit import check_fit

    if prepared.held_out:
        held_out = (prepared.held_out, prepared.held_out_rows)
        check_fit(held_out, metrics=recipe.metrics, evaluation=recipe.eval, seed=recipe.seed)


def _find_start(
    recipe: Recipe, source: BaseSource, prepared: Prepared, *, chat: ChatTemplate, mode: Mode, allowed: Sequence[str]
) -> Start:
    """Where the run starts, and whether what is there is the same run. Raises UsageError where it is another."""
    from lora_tune.training.identity import run_identity

    identity, team = run_identity(recipe, source, prepared, chat), here()
    team.require_equal(identity, "base, data or version", "let all machines read the same files")
    start = Start()
    if team.first:
        start = find_start(Path(recipe.output), identity, mode=mode, allowed=allowed, report=messages().print)
    return team.share(start)


def _resolve(recipe: Recipe, source: BaseSource, *, start: Start) -> tuple[Recipe, str]:
    """The recipe with its `auto` values decided, and why: planned for a new run, of a resumed one in the checkpoint."""
    if start.found is not None:
        resolved = start.found.run["resolved"]
        reason = str(resolved.get("reason", ""))
        changes = {name: value for name, value in resolved.items() if name in Train.model_fields}
        each = recipe.train.batch_size // here().world
        changes["micro_batch_size"] = fitting_micro_batch(changes["micro_batch_size"], each)
        for name in ("micro_batch_size", "gradient_checkpointing", "offload"):
            if f"train.{name}" in start.allowed and getattr(recipe.train, name) != "auto":
                changes[name] = getattr(recipe.train, name)
    else:
        plan = plan_of_process(recipe, source, here().layout)
        plans = here().gather((plan.resolved, plan.reason))
        changes, reason = min(plans, key=lambda found: found[0]["micro_batch_size"])
        messages().print(reason)
        if recipe.train.learning_rate == "auto":
            messages().print(f"learning rate {learning_rate(recipe.train, source.config):g}, by the width of the base")
    changes.setdefault("learning_rate", learning_rate(recipe.train, source.config))
    train = Train.model_validate(recipe.train.model_dump() | changes)
    return recipe.model_copy(update={"train": train}), reason


def _load(recipe: Recipe, source: BaseSource, prepared: Prepared, *, trust_remote_code: str | None) -> PeftModel:
    """The base on its device with a trainable adapter, its layers checkpointed as the recipe says."""
    with activity(f"loading {source.name} ({recipe.base.quantize})"):
        with quick_imports("bitsandbytes"):
            from lora_tune.adapter.load import read_adapter
            from lora_tune.model.attention import use_varlen
            from lora_tune.model.base import checkpoint_layers, load_base
            from lora_tune.model.methods import attach, check_start
            from lora_tune.model.offload import offload_checkpoints
            from lora_tune.training.batches import first_batches

        start = read_adapter(Path(recipe.lora.start_from)) if recipe.lora.start_from else None
        if start:
            check_start(start, recipe.base)
        place: Literal["device", "memory, to be divided"] = "memory, to be divided" if here().divided else "device"
        base = load_base(source, recipe.base, trust_remote_code=trust_remote_code, place=place)
        batches = first_batches(prepared.train, device=base.device) if recipe.lora.method == "eva" else None
        model = attach(
            base, recipe.lora, source=source, base=recipe.base, seed=recipe.seed, batches=batches, start=start
        )
        layers = recipe.train.gradient_checkpointing
        checkpoint_layers(model, "none" if layers == "auto" else layers)
        if recipe.train.offload == "checkpoints":
            offload_checkpoints(model)
        if why := use_varlen(model, recipe.base):
            messages().print(f"base.attention: the model keeps its own, as {why}")
    return model


def _train(
    model: PeftModel, recipe: Recipe, prepared: Prepared, *, chat: ChatTemplate, start: Start, planned: Planned
) -> None:
    """Train, or go on from the newest checkpoint; writes `metrics.jsonl` and `loss.png`."""
    with quick_imports("bitsandbytes"):
        from lora_tune.model.methods import parameter_groups
        from lora_tune.training.preflight import check_before_training
        from lora_tune.training.progress import TrainingDisplay, draw_loss, tracker_callbacks
        from lora_tune.training.resume import RunFacts
        from lora_tune.training.trainer import build

    folder, train, lora, team = Path(recipe.output), recipe.train, recipe.lora, here()
    attention = str(model.config.get_text_config()._attn_implementation)
    before = start.found.run["resolved"].get("attention", attention) if start.found else attention
    if before != attention:
        messages().print(f"attention: {attention} instead of {before}: from here on numbers differ by rounding")
    facts = RunFacts(
        identity=start.identity,
        allowed=start.allowed,
        resolved=train.model_dump(include=_RESOLVED)
        | {"reason": planned.reason, "strategy": team.strategy, "processes": team.world, "attention": attention},
        groups=partial(parameter_groups, model, lora=lora, train=train) if lora.plus_ratio else None,
        sources=[entry.name for entry in prepared.identities],
        display=TrainingDisplay(folder) if team.first else None,
        trackers=tracker_callbacks(recipe.track, folder=folder) if team.first else [],
        report=messages().print,
        short=planned.short,
    )
    evaluation = _evaluation(recipe, prepared, chat) if recipe.eval.every else None
    trainer = build(
        model, prepared.train, train=train, evaluation=evaluation, seed=recipe.seed, folder=folder, chat=chat
    ).for_run(facts)
    if team.several:
        prepared.ledger.rows_of_processes = trainer.rows_of_processes()
    if planned.preflight == "on" and start.found is None:
        check_before_training(trainer, planned, chat=chat, held_out=prepared.held_out_rows)
    trainer.train(resume_from_checkpoint=str(start.found.folder) if start.found else None)
    if not team.first:
        return
    try:
        draw_loss(folder / "metrics.jsonl", folder / "loss.png")
    except OSError as error:
        messages().print(f"loss.png was not drawn: {disk_text(error, folder)}")


def _evaluation(recipe: Recipe, prepared: Prepared, chat: ChatTemplate) -> Evaluation:
    """What is measured every `eval.every` steps: the held-out loss, and a few answers."""
    from lora_tune.evaluation.evaluate import adapter_scores, sample_answers
    from lora_tune.evaluation.fit import fitting
    from lora_tune.training.evaluations import Evaluation

    watched = prepared.watched(recipe.eval.hold_out_tasks)
    return Evaluation(
        every=recipe.eval.every or 1,
        measure=partial(
            adapter_scores,
            chat=chat,
            held_out=watched,
            metrics=fitting(watched, ("loss", *recipe.metrics), evaluation=recipe.eval, seed=recipe.seed),
            evaluation=recipe.eval,
            seed=recipe.seed,
        ),
        keep="best" if recipe.eval.keep_best else "last",
        stop_after=recipe.eval.stop_after,
        answer=partial(sample_answers, chat=chat, conversations=watched[0], evaluation=recipe.eval, seed=recipe.seed),
    )


def _compare(model: PeftModel, recipe: Recipe, prepared: Prepared, *, chat: ChatTemplate) -> Comparison:
    """Scores and samples of base and adapter on the held-out rows; none where no row is held out."""
    from lora_tune.evaluation.evaluate import compare
    from lora_tune.evaluation.scores import Comparison
    from lora_tune.model.divided import gathered

    if not prepared.held_out:
        return Comparison(scores={}, samples=())
    held_out = (prepared.held_out, prepared.held_out_rows)
    with gathered(model):
        return compare(model, chat, held_out, metrics=recipe.metrics, evaluation=recipe.eval, seed=recipe.seed)


@app.command()
def command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, such as train.epochs=2")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older run in the output folder.")] = False,
    trust_remote_code: Annotated[
        str | None, typer.Option(metavar="REPO", help="Run the code that comes with this base; name its repository.")
    ] = None,
    no_preflight: Annotated[
        bool, typer.Option("--no-preflight", help="Start training without trying its largest parts first.")
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="With --resume: this key may have changed, such as train.max_steps."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train one adapter from one recipe: the output folder is the adapter, with scores and proof."""
    if resume and overwrite:
        raise UsageError("--resume continues a run and --overwrite replaces it", "give one of them")
    if allow_change and not resume:
        raise UsageError("--allow-change goes with --resume", "add --resume")
    check_allowed(allow_change or ())
    mode: Mode = "resume" if resume else "overwrite" if overwrite else "new"
    file, place = read_recipe(recipe, overrides=overrides or ()), place_here()
    preflight: Literal["on", "off"] = "off" if no_preflight else "on"
    with file.locating():
        layout = layout_here(file.recipe, place, trust_remote_code=trust_remote_code)
    if place is None and layout.world > 1:
        messages().print(layout.reason)
        options = {"--resume": resume, "--overwrite": overwrite, "--no-preflight": no_preflight, "--json": as_json}
        arguments = [str(recipe), *(overrides or ()), *(name for name, given in options.items() if given)]
        arguments += [word for key in allow_change or () for word in ("--allow-change", key)]
        arguments += ["--trust-remote-code", trust_remote_code] if trust_remote_code else []
        return run_processes(layout, arguments)
    with as_worker(place, layout), resumable(Path(file.recipe.output)):
        manifest, comparison = run(
            file, mode=mode, allowed=allow_change or (), preflight=preflight, trust_remote_code=trust_remote_code
        )
    if manifest is None:
        return
    if as_json:
        from lora_tune.evaluation.spread import tasks_as_json

        facts = manifest.model_dump(mode="json", include={"base", "training", "scores"})
        facts["tasks"] = tasks_as_json(comparison) if comparison else {}
        print_json({"exit_code": 0, "output": file.recipe.output, **facts})
    else:
        _show(file.recipe.output, manifest, comparison)


def _show(output: str, manifest: Manifest, comparison: Comparison | None) -> None:
    """The result as a person reads it: answers before and after, scores, where the adapter is."""
    from lora_tune.evaluation.report import samples_table, scores_table
    from lora_tune.evaluation.spread import templates_table

    console = results()
    if comparison is None:
        console.print(f"{output}: this run was finished before; verified once more, nothing was trained")
        return
    if comparison.samples:
        console.print(samples_table(comparison.samples), soft_wrap=False)
    if comparison.scores:
        console.print(scores_table(comparison.scores), soft_wrap=False)
    if comparison.templates:
        console.print(templates_table(comparison), soft_wrap=False)
    training = manifest.training
    speed = (training.tokens or 0) / max(training.seconds or 0.0, 1e-9)
    console.print(
        f"{training.steps} steps, {training.tokens:,} tokens in {training.seconds:,.0f} s ({speed:,.0f} tokens/s), "
        f"peak {training.peak_gib:.1f} GiB\n{output}: written and verified in a fresh process\n"
        f"{output}/report.html: all of it as a page"
    )


if __name__ == "__main__":
    sys.exit(run_app(app, name="python -m lora_tune.run"))

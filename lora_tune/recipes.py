"""`lora-tune recipe check | schema`: judge a recipe without loading anything, and print what a recipe may contain."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_tune.errors import Problem, RecipeError, UsageError
from lora_tune.recipe import Recipe
from lora_tune.recipe_file import RecipeFile, read_recipe
from lora_tune.terminal import print_json, print_problems, results, run_app

app = typer.Typer(help="Check a recipe; print the JSON Schema of recipes.", no_args_is_help=True, add_completion=False)


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, such as train.epochs=2")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check keys, values, paths, and a local base's modules; nothing is loaded, downloaded or written."""
    file = read_recipe(recipe, overrides=overrides or ())
    warnings = [*file.warnings, *base_problems(file)]
    if as_json:
        print_json({"exit_code": 0, "recipe": str(recipe)}, warnings)
    else:
        print_problems(warnings)
        results().print(f"{recipe}: ok")


def base_problems(file: RecipeFile) -> list[Problem]:
    """Warnings of what does not fit a base that lies on this machine; one on the hub gets a note, and no network call.

    Raises:
        RecipeError: what cannot work, such as targets that no module of the base is named after.
    """
    base = file.recipe.base
    if not (base.name.startswith("builtin:") or Path(base.name).is_absolute()):
        reason = f"{base.name} is on the hub and was not looked at"
        return [file.locate(Problem(reason, "run and preview check it", key="base.name", severity="note"))]
    from lora_tune.model.source import check_against_base, find_base

    try:
        source = find_base(base)
    except UsageError as error:
        raise RecipeError([file.locate(replace(one, key=one.key or "base.name")) for one in error.problems]) from None
    found = check_against_base(source, lora=file.recipe.lora, train=file.recipe.train)
    problems = [file.locate(problem) for problem in found]
    if any(problem.severity == "error" for problem in problems):
        raise RecipeError([*problems, *file.warnings])
    return problems


@app.command("import")
def import_foreign(
    source: Annotated[
        Path, typer.Argument(help="A configuration of axolotl, LLaMA-Factory, TRL, torchtune, LitGPT, …")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", help="The recipe to write; without it, it is printed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Translate another tool's configuration, and name everything that could not be carried over."""
    from lora_tune.recipe_import import import_recipe

    if output is not None and output.exists():
        raise UsageError(Problem("is there already", "name a new file", str(output), key="--output"))
    imported = import_recipe(source)
    if output is not None:
        try:
            output.write_text(imported.text, encoding="utf-8")
        except OSError as error:
            raise UsageError(Problem(f"cannot be written: {error.strerror}", "name another", str(output))) from None
    if as_json:
        print_json({"exit_code": 0, "tool": imported.tool, "recipe": imported.text}, imported.problems)
        return
    print_problems(imported.problems)
    if output is None:
        sys.stdout.write(imported.text)
    else:
        results().print(f"{output}: written from {imported.tool}'s {source.name}; lora-tune recipe check {output}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, from which editors complete."""
    sys.stdout.write(schema_text())


def schema_text() -> str:
    """The JSON Schema of a recipe as it is committed in recipes/recipe.schema.json."""
    schema: dict[str, Any] = Recipe.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(run_app(app, name="python -m lora_tune.recipes"))

"""The `doctor` command."""

import shutil
import sys
from typing import Annotated

import typer

from zipar_train.cli.options import JsonOption, SetOption, expanded, write_json


def doctor(
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            parser=expanded,
            metavar="RECIPE",
            help="Whether this one could run here too: a name, or a .yaml file.",
        ),
    ] = None,
    overrides: SetOption = [],  # noqa: B006
    only: Annotated[
        str | None,
        typer.Option(
            "--checks", help="Of packages,devices,attention,disk,wandb,recipes,recipe, for example disk,wandb."
        ),
    ] = None,
    patience: Annotated[
        float | None, typer.Option("--timeout", min=1, help="Seconds for each, all at once; 30, or 90 beside a GPU.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Check that this machine can train, with a remedy for every problem. Exit status 1: problems found."""
    from zipar_train.doctor.examine import examine
    from zipar_train.recipe.load import load_recipe

    loaded, broken = None, ""
    if recipe is None and overrides:
        raise ValueError(f"--set {overrides[0]}: it goes with --recipe")
    if recipe is not None:
        try:
            loaded = load_recipe(recipe, overrides)
        except ValueError as error:
            broken = str(error)
    if sys.stderr.isatty():
        print("Trying things out takes some twenty seconds ...", file=sys.stderr, flush=True)
    report = examine(loaded, only=only.split(",") if only else (), patience=patience, broken=broken)
    print("\n".join(report.lines(min(max(shutil.get_terminal_size((110, 0)).columns, 60), 120))))
    if json_file:
        write_json(json_file, report.model_dump())
    if report.of("problem"):
        raise typer.Exit(1)

"""The `sweep` command."""

from pathlib import Path
from typing import Annotated

import typer

from zipar_train.cli.options import JsonOption, RecipeOption, SetOption, output_folder, user_path, write_json


def sweep(
    recipe: RecipeOption,
    grid: Annotated[
        Path,
        typer.Option(
            "--file", parser=user_path, metavar="FILE", help="In W&B's sweep syntax; recipes/sweeps has some."
        ),
    ],
    overrides: SetOption = [],  # noqa: B006
    out: Annotated[
        Path | None,
        typer.Option(
            parser=user_path,
            callback=output_folder,
            metavar="PATH",
            help="The sweep's folder; beside the recipe's run.",
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Trials at most; a random sweep needs it or run_cap.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of a random sweep.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Trials at once.")] = 1,
    gpus: Annotated[str | None, typer.Option(help="0,1,3: a trial on each at once, instead of --jobs.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Train a recipe once for each trial of a sweep, without a server. A second run resumes."""
    from zipar_train.sweep.results import lines, plot
    from zipar_train.sweep.runner import run

    outcome, folder = run(
        recipe,
        grid,
        out=out,
        overrides=overrides,
        count=count,
        seed=seed,
        jobs=jobs,
        gpus=gpus.split(",") if gpus else (),
    )
    if outcome.trials:
        plot(outcome, folder / "sweep.png")
    print("\n".join(lines(outcome, folder)))
    if json_file:
        write_json(json_file, outcome.model_dump())
    if outcome.failed:
        raise typer.Exit(1)

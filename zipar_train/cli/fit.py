"""The command `fit`: training."""

import os
from shlex import quote
from typing import Annotated

import typer

from zipar_train.cli.options import (
    RecipeOption,
    SetOption,
)
from zipar_train.run.signals import Stopped


def fit(
    recipe: RecipeOption,
    overrides: SetOption = [],  # noqa: B006
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run folder's checkpoint, if it has one.")
    ] = False,
    allow: Annotated[
        list[str],
        typer.Option("--allow-change", metavar="KEY", help="May differ from the recipe that made the run folder."),
    ] = [],  # noqa: B006
    more: Annotated[list[str], typer.Argument(metavar="[KEY=VALUE]...", help="As --set: for W&B's agents.")] = [],  # noqa: B006
) -> None:
    """Train a recipe into its run folder. Ctrl-C finishes the step, writes a checkpoint and stops."""
    from zipar_train.recipe.load import load_recipe, override
    from zipar_train.sweep.overrides import overrides_of_agent

    overrides = [*overrides, *overrides_of_agent(more)]
    loaded = load_recipe(recipe, overrides)
    if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ:  # a W&B agent: a folder for each of its runs
        own = f"{loaded.run_dir}-{os.environ['WANDB_SWEEP_ID']}/{os.environ['WANDB_RUN_ID']}"
        overrides.append(override("run_dir", own))
        if loaded.log.wandb == "offline" and not os.environ.get("WANDB_MODE"):
            overrides.append("log.wandb=online")  # the sweep's server needs the metrics
        loaded, resume = load_recipe(recipe, overrides), True  # the agent may run it again
    try:
        from zipar_train.run.ranks import rank_zero_print
        from zipar_train.training.fit import fit as work

        made = work(loaded, resume=resume, allow=allow)
        rank_zero_print(str(made) if made else "trainer.fast_dev_run: tried out, nothing is kept")
    except Stopped as stop:
        again = ["zipar-train fit --recipe", quote(recipe), *(f"--set {quote(o)}" for o in overrides)]
        stop.advice = f"continue with: {' '.join([*again, '--resume'])}"
        raise

"""The command `export`: weights for others."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from zipar_train.cli.options import (
    EitherCheckpointOption,
    OrRecipeOption,
    SetOption,
    one_of,
    output_place,
    user_path,
)


def export(
    out: Annotated[
        Path,
        typer.Option(
            parser=user_path,
            callback=output_place,
            metavar="PATH",
            help="A new folder; for --to llamagen a new .pt file.",
        ),
    ],
    checkpoint: EitherCheckpointOption = None,
    recipe: OrRecipeOption = None,
    overrides: SetOption = [],  # noqa: B006
    to: Annotated[
        str,
        typer.Option(
            help="hf: for from_pretrained | original: a folder in the layout of deepseek-ai/Janus | llamagen: a .pt "
            "for the original scripts | adapter: the LoRA alone. The first three have adapters merged."
        ),
    ] = "hf",
) -> None:
    """Export weights for other software, with a model card."""
    if to not in ("hf", "original", "llamagen", "adapter"):
        raise ValueError(f"--to {to!r} is unknown: use hf, original, llamagen or adapter")
    source = one_of(checkpoint, recipe, overrides)
    from zipar_train.export.weights import export as work
    from zipar_train.recipe.load import load_recipe

    print(work(load_recipe(recipe, overrides) if recipe else source, out, to=cast(Any, to)))

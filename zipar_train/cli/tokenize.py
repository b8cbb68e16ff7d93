"""The command `tokenize`: images to shards of codes."""

import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from zipar_train.cli.options import (
    RecipeOption,
    SetOption,
    expanded,
    output_folder,
    user_path,
)


def tokenize(
    recipe: RecipeOption,
    images: Annotated[
        str,
        typer.Option(
            parser=expanded,
            metavar="SOURCE",
            help="A folder with one folder per class, tar shards, a `datasets` folder or id, or `digits`.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            parser=user_path,
            callback=output_folder,
            metavar="PATH",
            help="The folder to write SPLIT.json and its tar files into.",
        ),
    ],
    split: Annotated[
        str | None, typer.Option(help="One split alone; otherwise train and val of what has both.")
    ] = None,
    views: Annotated[
        str,
        typer.Option(help="Of each image: one (centre crop), flip (and its mirror image), ten (crops at 1.1, 1.05)."),
    ] = "one",
    features: Annotated[bool, typer.Option("--features", help="Store T5 features of the captions too.")] = False,
    per_shard: Annotated[
        int, typer.Option(min=1, help="Images a shard; a killed run loses its unfinished one.")
    ] = 2000,
    batch_size: Annotated[int, typer.Option(min=1, help="Views encoded at once.")] = 32,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Encode images into shards of codes. A second run resumes; under torchrun, processes share the work."""
    from zipar_train.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    if views not in ("one", "flip", "ten"):
        raise ValueError(f"--views {views!r} is unknown: use one, flip or ten")
    from zipar_train.data.image_sources import open_source, splits
    from zipar_train.data.splits import class_numbers
    from zipar_train.data.tokenize import left_out
    from zipar_train.data.tokenize import tokenize as work

    parts = [split] if split else splits(images)
    sources = {part: open_source(images, part, captions=loaded.model.captions) for part in parts}
    classes = class_numbers(loaded.model, sources, out)
    for part in parts:
        for note in (*sources[part].notes, *(classes[part].notes if classes else ())):
            print(f"{part}: {note}")
    for part in parts:
        done = work(
            loaded,
            images=images,
            out=out,
            split=part,
            sources=sources,
            kind=cast(Any, views),
            features=features,
            per_shard=per_shard,
            batch_size=batch_size,
        )
        if done.images:
            print(
                f"{part}: {done.images / done.seconds:,.0f} images/s, {done.waited / done.seconds:.0%} of the time "
                "waiting for images"
            )
        if done.manifest is None:
            print(f"{part}: this process has done its share; others are still at work")
            continue
        print(f"{out / part}.json: {done.manifest.samples:,} images in {len(done.manifest.shards)} shards")
        if done.manifest.skipped:
            print(left_out(done, (out / f"{part}.json").with_suffix(".skipped.txt")), file=sys.stderr)

"""The `shards` commands: check shard sets, and import codes made by other software."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from zipar_train.cli.options import JsonOption, RecipeOption, SetOption, expanded, output_folder, user_path, write_json

MAX_PRINTED = 20  # problems printed per shard set

shards_app = typer.Typer(help="Check shards of codes, or import codes that others made.", no_args_is_help=True)


@shards_app.command("check")
def shards_check(
    manifests: Annotated[
        list[str], typer.Argument(parser=expanded, metavar="MANIFEST...", help="Paths or URLs of .json manifests.")
    ],
    recipe: Annotated[
        str | None,
        typer.Option(parser=expanded, metavar="RECIPE", help="Also check that the shards are for this recipe."),
    ] = None,
    overrides: SetOption = [],  # noqa: B006
    json_file: JsonOption = None,
) -> None:
    """Read every sample, print a summary, and list all problems. Exit status 1: problems found."""
    from zipar_train.data.labels import listed
    from zipar_train.data.manifest import Manifest
    from zipar_train.data.shards import read_manifest, same_classes
    from zipar_train.data.validate import check_shards
    from zipar_train.models.family import fits
    from zipar_train.recipe.load import load_recipe

    model = load_recipe(recipe, overrides).model if recipe else None
    from tqdm import tqdm

    fitting = fits(model) if model else None
    try:
        misfit = fitting.loaded().misfit if fitting else None
    except ValueError as error:  # the rest is checked without it
        print(f"caption lengths are not checked: {error}", file=sys.stderr)
        misfit = None
    results, problems = [], []
    read: dict[str, Manifest] = {}
    for manifest in manifests:
        if model:
            read_manifest(
                manifest,
                grids=model.rasters,
                codes=model.codebook_size,
                classes=model.num_classes,
                captions=model.captions,
            )
        found = check_shards(manifest, progress=lambda shards: tqdm(shards, desc="shards", leave=False), misfit=misfit)
        held, counts = found.manifest, found.per_class.values()
        for other, theirs in read.items():
            try:
                same_classes(other, manifest, (theirs, held))
            except ValueError as error:
                found.problems.append(str(error))
        read[manifest] = held
        per_class = f"{min(counts)} to {max(counts)} images" if counts else "no images"
        classes = f"{len(counts)} of {held.classes} classes, {per_class} each" if held.classes else "captions"
        classes += f" ({listed(held.class_names)})" if held.class_names else ""
        lines = {
            "source": f"{held.source}; views: {held.views}; {held.skipped} images skipped",
            "samples": f"{found.samples:,} of {held.samples:,} readable, {found.views:,} views, "
            f"{len(held.shards)} shards",
            "grid": f"{', '.join(str(grid) for grid, _ in held.split())}, "
            f"{found.codes_used:,} of {held.codes:,} codes occur",
            "condition": classes + (f", {found.features:,} with features" if found.features else ""),
            "tokenizer": f"sha256 {held.tokenizer}" if held.tokenizer else "not recorded",
            "verdict": "whole" if not found.problems else f"{len(found.problems)} problems",
        }
        print(f"{manifest}\n" + "\n".join(f"  {name:10} {text}" for name, text in lines.items()))
        more = len(found.problems) - MAX_PRINTED
        problems += found.problems[:MAX_PRINTED] + ([f"{manifest}: {more:,} problems more"] if more > 0 else [])
        results.append(
            {
                "manifest": manifest,
                "samples": found.samples,
                "views": found.views,
                "per_class": found.per_class,
                "codes_used": found.codes_used,
                "problems": found.problems,
                "layout": held.model_dump(exclude={"shards"}),
            }
        )
    if json_file:
        write_json(json_file, results)
    if problems:
        print("\n".join(f"zipar-train: {problem}" for problem in problems), file=sys.stderr)
        raise typer.Exit(1)


@shards_app.command("import")
def shards_import(
    recipe: RecipeOption,
    codes: Annotated[
        Path,
        typer.Option(
            parser=user_path,
            metavar="PATH",
            help="A LlamaGen code folder, a RandAR tar or its folder, or a 1d-tokenizer .jsonl.",
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
    split: Annotated[str, typer.Option(help="The manifest's name.")] = "train",
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Convert codes made by LlamaGen, RandAR or 1d-tokenizer (RAR) into shards."""
    from functools import partial

    from tqdm import tqdm

    from zipar_train.data.import_codes import import_codes
    from zipar_train.recipe.load import load_recipe

    bar = partial(tqdm, desc=f"{split} images", unit=" images")
    written = import_codes(load_recipe(recipe, overrides), codes=codes, out=out, split=split, progress=bar)
    print(f"{out / split}.json: {written.samples:,} samples in {len(written.shards)} shards, from a {written.source}")

"""The `evaluate` command, which scores checkpoints at each window, and `advise`, which recommends how to decode."""

from pathlib import Path
from typing import Annotated, Any

import typer

from zipar_train.cli.options import (
    CheckpointOption,
    Int8Option,
    JsonOption,
    RecipeOption,
    SetOption,
    chart_file,
    expanded,
    integers,
    numbers,
    output_folder,
    user_path,
    write_json,
)


def evaluate(
    recipe: RecipeOption,
    checkpoint: CheckpointOption,
    compare: Annotated[
        list[str],
        typer.Option(
            parser=expanded,
            metavar="PATH",
            help="Another checkpoint to score beside it; the first is the baseline. Repeatable.",
        ),
    ] = [],  # noqa: B006
    windows: Annotated[str | None, typer.Option(help="For example 8,4,2,1; otherwise the recipe's.")] = None,
    released: Annotated[
        bool,
        typer.Option("--released", help="Also decode the first compared checkpoint as the released ZipAR code does."),
    ] = False,
    adaptive: Annotated[
        bool,
        typer.Option("--adaptive", help="Also with adaptive windows, with these as the smallest."),
    ] = False,
    lookahead: Annotated[
        int | None, typer.Option(help="Also with this many slots fed per pass; otherwise the recipe's. 0: none.")
    ] = None,
    npz: Annotated[bool, typer.Option("--npz", help="Write the images for ADM's evaluator too.")] = False,
    png: Annotated[bool, typer.Option("--png", help="Write the images as a folder of PNG too.")] = False,
    search_guidance: Annotated[
        str | None,
        typer.Option(help="Only try guidance scales, for example 1.5,1.75,2.0, and say which is best."),
    ] = None,
    search_images: Annotated[
        int | None, typer.Option(min=10, help="Images generated at each scale and window; 2000 if not given.")
    ] = None,
    int8: Int8Option = False,
    overrides: SetOption = [],  # noqa: B006
    out: Annotated[
        Path | None,
        typer.Option(
            parser=user_path,
            callback=output_folder,
            metavar="PATH",
            help="The report's folder; `evaluation` in the run folder, `evaluation-int8` with --int8.",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Score checkpoints at several windows: passes, time, bits, FID and related scores, CLIP score; as an HTML report.

    A second run resumes; under torchrun, processes share the generation.
    """
    from zipar_train.recipe.load import load_recipe

    ahead = [] if lookahead is None else [f"sampling.lookahead={lookahead}"]
    loaded = load_recipe(recipe, [*overrides, *ahead])
    sizes = integers("--windows", windows) if windows is not None else None
    scales = numbers("--search-guidance", search_guidance) if search_guidance is not None else None
    path = Path(checkpoint)
    if not path.exists():
        raise ValueError(f"no checkpoint at {path}: train it with `zipar-train fit`, or give another path")
    folder = out or (path if path.is_dir() else path.resolve().parent.parent) / f"evaluation{'-int8' * int8}"
    if search_images is not None and scales is None:
        raise ValueError("--search-images goes with --search-guidance")
    if scales is not None and (compare or released or adaptive or npz or png):
        raise ValueError(
            "--search-guidance tries one checkpoint: leave --compare, --released, --adaptive, --npz, --png out"
        )
    from zipar_train.io.files import folder_lock
    from zipar_train.run.ranks import process

    rank, world, _ = process()
    with folder_lock(folder, rank, world):
        if scales is not None:
            _search(loaded, checkpoint, scales, sizes, search_images or 2000, folder, json_file, int8=int8)
        else:
            chosen = {"released": released, "adaptive": adaptive, "npz": npz, "png": png, "int8": int8}
            _score(loaded, checkpoint, compare, sizes, folder, json_file, **chosen)


def _score(
    loaded: Any,
    checkpoint: str,
    compare: list[str],
    windows: list[int] | None,
    folder: Path,
    json_file: Path | None,
    **chosen: bool,
) -> None:
    from zipar_train.evaluation.evaluate import evaluate as work
    from zipar_train.evaluation.report.text import log_to_wandb, notes, summary, table, write_report
    from zipar_train.io.tables import aligned

    done = work(loaded, checkpoint, compare=compare, windows=windows, out=folder, **chosen)
    if done is None:
        print("this process has generated its share; the first one scores")
        return
    report, samples, images = done
    files = write_report(report, samples, folder)
    print("\n".join(aligned(table(report), "<")))
    said = [*summary(report), *(line for line in notes(report) if line.startswith(("**", "†")))]
    print("\n" + "\n".join(said).replace("**", ""))
    print("\n".join(["", *map(str, [*files, *images])]))
    if json_file:
        write_json(json_file, report.model_dump())
    log_to_wandb(report, [file for file in files if file.suffix == ".png"])


def _search(
    loaded: Any,
    checkpoint: str,
    scales: list[float],
    windows: list[int] | None,
    images: int,
    folder: Path,
    json_file: Path | None,
    *,
    int8: bool,
) -> None:
    from zipar_train.evaluation.guidance_search import lines
    from zipar_train.evaluation.guidance_search import search_guidance as work

    found = work(loaded, checkpoint, scales, windows=windows, images=images, out=folder, int8=int8)
    if found is None:
        print("this process has generated its share; the first one scores")
        return
    print("\n".join(lines(found)))
    if json_file:
        write_json(json_file, found.model_dump())


def advise(
    recipe: RecipeOption,
    checkpoint: CheckpointOption,
    shards: Annotated[
        str | None,
        typer.Option(parser=expanded, metavar="MANIFEST", help="Held-out codes, a manifest; otherwise the recipe's."),
    ] = None,
    windows: Annotated[
        str | None, typer.Option(help="For example 16,12,8,4; otherwise powers of two and the recipe's.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Tolerated share of bits above next-token's; 0.01: one percent.")
    ] = 0.01,
    lookahead: Annotated[
        str, typer.Option(help="Slots fed per pass to try besides none, at windows within the tolerance.")
    ] = "16,32,64",
    batch_size: Annotated[int, typer.Option(help="Images generated together when passes and time are measured.")] = 1,
    images: Annotated[int | None, typer.Option(help="Images whose bits are counted; otherwise all.")] = None,
    overrides: SetOption = [],  # noqa: B006
    png: Annotated[
        Path | None,
        typer.Option(
            parser=user_path,
            callback=chart_file,
            metavar="FILE",
            help="Plot bits and the attention that is cut off.",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Recommend a window and lookahead for a checkpoint: bits per code, attention cut off by layer, time per image.

    Bits and attention come from held-out codes. Time is measured by generating images.
    """
    from zipar_train.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    sizes = integers("--windows", windows) if windows is not None else None
    slots = integers("--lookahead", lookahead)
    from zipar_train.evaluation.window_advice import advise as work
    from zipar_train.evaluation.window_advice import lines

    advice = work(
        loaded,
        checkpoint,
        shards=shards or loaded.data.val,
        windows=sizes,
        tolerance=tolerance,
        lookaheads=slots,
        batch_size=batch_size,
        images=images,
    )
    print("\n".join(lines(advice)))
    if json_file:
        write_json(json_file, advice.model_dump())
    if png:
        from zipar_train.evaluation.advice_plot import plot

        plot(advice, png)
        print(f"\n{png}")

"""The command line: every verb a few lines over a function that does the work. Heavy imports wait inside the verbs."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="zipar-train",
    help="Fine-tune autoregressive image generators under ZipAR masks, and decode their rows in parallel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeOption = Annotated[str, typer.Option("--recipe", help="A shipped recipe's name, or the path of a .yaml file.")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key, for example optim.lr=1e-4. Repeatable.")
]
CheckpointOption = Annotated[
    str, typer.Option("--checkpoint", help="A run folder, a .ckpt file or an exported folder.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the same for programs.")]


def main() -> None:
    """Entry point: mistakes of the user's become one message and exit status 2; ZIPAR_TRACEBACK=1 shows where."""
    try:
        app(standalone_mode=True)
    except (ValueError, OSError) as error:
        if os.environ.get("ZIPAR_TRACEBACK"):
            raise
        print(f"zipar-train: {error}", file=sys.stderr)
        sys.exit(2)


@app.command()
def recipes() -> None:
    """List the shipped recipes, a line each."""
    from zipar_train.recipe import load_recipe, recipe_folder, shipped

    for name in shipped():
        print(f"{name:16} {load_recipe(name).about}")
    print(f"\nFiles: {recipe_folder()}. Copy one, change it, and give its path to --recipe.")


@app.command()
def plan(
    recipe: RecipeOption,
    overrides: SetOption = [],  # noqa: B006
    window: Annotated[int | None, typer.Option(help="The window to map and draw; the recipe's smallest.")] = None,
    windows: Annotated[str | None, typer.Option(help="Windows of the table, for example 24,16,8.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the pass map and the mask.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Show what each window takes: passes, reduction, width, and when each code is drawn. Needs no weights."""
    from zipar_train.plan import Plan
    from zipar_train.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    grid = loaded.model.raster

    def make(size: int) -> Plan:
        return Plan.zipar(grid, window=size, stand_in=loaded.zipar.stand_in)

    named = {
        grid.row_length,
        *loaded.zipar.windows,
        *loaded.evaluate.windows,
        *(w for w in (16, 12, 8, 4, 2, 1) if w < grid.width),
    }
    sizes = integers("--windows", windows) if windows else sorted(named, reverse=True)
    shown = make(min(loaded.zipar.windows) if window is None else window)
    rows = [
        {"window": p.window, "passes": p.passes, "reduction": p.reduction, "width": p.width, "slots": len(p)}
        for p in map(make, sizes)
    ]
    print(f"{loaded.name}: {grid} codes, {grid.codes} next-token passes\n")
    print("window  passes  fewer  widest pass  slots")
    for row in rows:
        print("{window:6}  {passes:6}  {reduction:5.1%}  {width:11}  {slots:5}".format(**row))
    drawn = shown.drawn()
    print(f"\nThe pass that draws each code at window {shown.window}:\n")
    digits = len(str(shown.passes))
    for line in drawn:
        print(" ".join(f"{t:{digits}}" for t in line))
    if png:
        from zipar_train.picture import draw_plan

        draw_plan(shown, png)
        print(f"\n{png}")
    if json_file:
        write_json(json_file, {"recipe": loaded.name, "grid": [grid.height, grid.width], "windows": rows,
                               "map": {"window": shown.window, "drawn": drawn.tolist()}})  # fmt: skip


@app.command()
def tokenize(
    recipe: RecipeOption,
    images: Annotated[str, typer.Option(help="Where images come from: `digits`, scikit-learn's handwritten digits.")],
    out: Annotated[Path, typer.Option(help="The folder to write train.json, val.json and their tar files into.")],
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Turn images into shards of codes."""
    from zipar_train.recipe import load_recipe
    from zipar_train.tokenize import tokenize as work

    for split, manifest in work(load_recipe(recipe, overrides), images=images, out=out).items():
        print(f"{out / split}.json: {manifest.samples:,} images in {len(manifest.shards)} shards")


@app.command()
def fit(
    recipe: RecipeOption,
    overrides: SetOption = [],  # noqa: B006
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run folder's checkpoint, if it has one.")
    ] = False,
) -> None:
    """Train a recipe into its run folder. Ctrl-C finishes the step, keeps a checkpoint and stops."""
    from zipar_train.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    from zipar_train.training.callbacks import Stopped
    from zipar_train.training.trainer import fit as work

    try:
        print(work(loaded, resume=resume))
    except Stopped as stop:
        again = " ".join(["zipar-train fit --recipe", recipe, *(f"--set '{o}'" for o in overrides), "--resume"])
        print(f"\nzipar-train: {stop}. Continue with: {again}", file=sys.stderr)
        raise typer.Exit(128 + stop.signum) from None


@app.command()
def draw(
    checkpoint: CheckpointOption,
    labels: Annotated[str, typer.Option(help="Class numbers, for example 3,5: one image each.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")],
    window: Annotated[int | None, typer.Option(help="1 .. the grid's width; next-token if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Image k of a seed is always the same.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1: none.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: the most probable code.")] = None,
    top_k: Annotated[int | None, typer.Option(help="0: no cut.")] = None,
    top_p: Annotated[float | None, typer.Option(help="1: no cut.")] = None,
) -> None:
    """Draw images into one picture. What is not given is as the recipe says."""
    classes = integers("--labels", labels)
    from zipar_train.decoding.generator import load

    given: dict[str, Any] = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    generator = load(checkpoint)
    images = generator.draw(classes, window=window, seed=seed, **{k: v for k, v in given.items() if v is not None})
    images.save(out)
    print(f"{out}: {len(images)} images in {generator.plan(window).passes} passes")


@app.command()
def evaluate(
    recipe: RecipeOption,
    checkpoint: CheckpointOption,
    compare: Annotated[
        list[str], typer.Option(help="Another checkpoint to score beside it; the first is the baseline. Repeatable.")
    ] = [],  # noqa: B006
    windows: Annotated[str | None, typer.Option(help="For example 8,4,2,1; otherwise the recipe's.")] = None,
    overrides: SetOption = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="The report's folder; `evaluation` in the run folder.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Score checkpoints at several windows: passes, time, bits a code, Frechet distance; a table, plots and samples."""
    from zipar_train.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    sizes = integers("--windows", windows) if windows else None
    from zipar_train.evaluation.evaluate import evaluate as work
    from zipar_train.evaluation.report import HEADER, cells, findings, log_to_wandb, write_report

    path = Path(checkpoint)
    folder = out or (path if path.is_dir() else path.parent.parent) / "evaluation"
    if not path.exists():
        raise ValueError(f"no checkpoint at {path}: train it with `zipar-train fit`, or give another path")
    report, samples = work(loaded, checkpoint, compare=compare, windows=sizes, out=folder)
    files = write_report(report, samples, folder)
    lines = [list(HEADER), *cells(report)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print("\n" + "\n".join(findings(report)).replace("**", ""))
    print(f"\nFD, KID, precision, recall: features of {report.features}; not comparable with Inception FID.")
    print("\n".join(map(str, files)))
    if json_file:
        write_json(json_file, report.model_dump())
    if loaded.log.wandb != "disabled":
        log_to_wandb(report, [file for file in files if file.suffix == ".png"])


@app.command()
def export(
    checkpoint: CheckpointOption,
    out: Annotated[Path, typer.Option(help="A new folder.")],
    to: Annotated[str, typer.Option(help="hf: a folder that transformers' from_pretrained loads.")] = "hf",
) -> None:
    """Write a checkpoint as a model folder with its card."""
    if to != "hf":
        raise ValueError(f"--to {to!r} is unknown: use 'hf'")
    from zipar_train.export import export as work

    print(work(checkpoint, out))


def integers(option: str, text: str) -> list[int]:
    """The numbers of a comma-separated list.

    Raises:
        ValueError: if one is no whole number.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{option} {text!r}: write whole numbers with commas between them, for example 8,4,2,1"
        ) from None


def write_json(path: Path, content: Any) -> None:
    from zipar_train.files import write_whole

    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())

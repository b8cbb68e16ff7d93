"""The command line: thin commands over functions that do the work; heavy imports are inside the commands."""

import os
import sys
from pathlib import Path
from shlex import quote
from traceback import clear_frames
from typing import Annotated, Any, NoReturn, cast

import typer

from zipar_train.cli.bench import bench
from zipar_train.cli.doctor import doctor
from zipar_train.cli.evaluate import advise, evaluate
from zipar_train.cli.options import (
    EitherCheckpointOption,
    JsonOption,
    OrRecipeOption,
    RecipeOption,
    SetOption,
    chart_file,
    expanded,
    integers,
    one_of,
    output_folder,
    output_place,
    picture_file,
    user_path,
    write_json,
)
from zipar_train.cli.shards import shards_app
from zipar_train.cli.sweep import sweep
from zipar_train.io.console import lasting
from zipar_train.io.remote import conceal
from zipar_train.recipe.renamed import check_arguments
from zipar_train.run.launcher import check_variables, rank
from zipar_train.run.signals import Heard, Stopped, raised, requeue

app = typer.Typer(
    name="zipar-train",
    help="Fine-tune autoregressive image generators under ZipAR masks, and decode their rows in parallel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(shards_app, name="shards")
app.command()(bench)
app.command()(evaluate)
app.command()(advise)
app.command()(sweep)
app.command()(doctor)


PRINTING = ("recipes", "plan", "advise", "bench", "doctor", "shards")  # commands whose result is their output


def main() -> None:
    """Run the command line and exit with a status that tells how the command ended.

    A user error prints one message and exits with status 2 (ZIPAR_TRACEBACK=1 shows the traceback). Signal n exits
    with status 128 + n.
    """
    sys.argv[1:] = map(conceal, sys.argv[1:])  # W&B's metadata and process launchers repeat the arguments
    with lasting() as out, raised() as heard:
        try:
            check_variables()
            check_arguments(sys.argv[1:])
            app(standalone_mode=True)
        except Stopped as stop:
            _end(stop, heard)
        except Exception as error:
            if heard.signum is not None:  # libraries wrap exceptions from signal handlers
                _end(Stopped(heard.signum, str(error)), heard)
            if os.environ.get("ZIPAR_TRACEBACK") or not isinstance(error, (ValueError, OSError)):
                raise
            clear_frames(error.__traceback__)
            print(f"zipar-train: {error}", file=sys.stderr)
            sys.exit(2)
        except SystemExit as end:
            if not end.code and sys.argv[1:2] and sys.argv[1] in PRINTING and out.disk_full():
                sys.exit(1)
            raise


def _end(stop: Stopped, heard: Heard) -> NoReturn:
    heard.quiet()
    clear_frames(stop.__traceback__)  # frees iterators, which ends their loader processes
    if rank() == 0:
        print(f"\nzipar-train: {stop}; {requeue(stop) or stop.advice}", file=sys.stderr)
    sys.exit(128 + stop.signum)


@app.command()
def recipes() -> None:
    """List the shipped recipes, one per line."""
    from zipar_train.recipe.load import load_recipe, recipe_folder, shipped

    for name in shipped():
        print(f"{name:16} {load_recipe(name).description}")
    print(f"\nFiles: {recipe_folder()}. Copy one, change it, and give its path to --recipe.")


@app.command()
def plan(
    recipe: RecipeOption,
    overrides: SetOption = [],  # noqa: B006
    window: Annotated[int | None, typer.Option(help="The window to map and draw; the recipe's smallest.")] = None,
    windows: Annotated[str | None, typer.Option(help="Windows of the table, for example 24,16,8.")] = None,
    png: Annotated[
        Path | None,
        typer.Option(parser=user_path, callback=chart_file, metavar="FILE", help="Draw the pass map and the mask."),
    ] = None,
    memory: Annotated[
        bool, typer.Option(help="Estimate the memory of training and generation, in ten seconds.")
    ] = True,
    gib: Annotated[
        float | None,
        typer.Option(
            "--device-memory", min=0.001, help="Memory of a device that it should fit into; this machine's GPU's."
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Show passes per window, the pass that predicts each code, and estimated memory. Needs no weights."""
    from zipar_train.plan.table import Plan
    from zipar_train.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    grid = loaded.model.raster

    def make(size: int) -> Plan:
        return Plan.zipar(grid, window=size, prompt=loaded.model.prompt, **loaded.zipar.rule)

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
    print(f"\nThe pass that generates each code at window {shown.window}:\n")
    digits = len(str(shown.passes))
    for line in drawn:
        print(" ".join(f"{t:{digits}}" for t in line))
    if png:
        from zipar_train.plan.diagram import draw_plan

        draw_plan(shown, png)
        print(f"\n{png}")
    record: dict[str, Any] = {"recipe": loaded.name, "grid": [grid.height, grid.width], "windows": rows,
              "map": {"window": shown.window, "drawn": drawn.tolist()}}  # fmt: skip
    if memory:
        from zipar_train.training.memory_estimate import advice, predict, room_here

        found = predict(loaded)
        print("\n" + "\n".join(found.lines()))
        room = room_here() if gib is None else gib * 2**30
        told = [] if room is None else advice(loaded, found, room)
        if room is not None:
            print("\n" + "\n".join(told or [f"It fits into {room / 2**30:.1f} GiB."]))
        record["memory"] = {**found.model_dump(), "advice": told}
    if json_file:
        write_json(json_file, record)


@app.command()
def tokenize(
    recipe: RecipeOption,
    images: Annotated[
        str,
        typer.Option(
            parser=expanded,
            metavar="SOURCE",
            help="A folder with a folder a class, tar shards, a `datasets` folder or id, or `digits`.",
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
        done = work(loaded, images=images, out=out, split=part, sources=sources, kind=cast(Any, views),
                    features=features, per_shard=per_shard, batch_size=batch_size)  # fmt: skip
        if done.images:
            print(f"{part}: {done.images / done.seconds:,.0f} images/s, {done.waited / done.seconds:.0%} of the time "
                  "waiting for images")  # fmt: skip
        if done.manifest is None:
            print(f"{part}: this process has done its share; others are still at work")
            continue
        print(f"{out / part}.json: {done.manifest.samples:,} images in {len(done.manifest.shards)} shards")
        if done.manifest.skipped:
            print(left_out(done, (out / f"{part}.json").with_suffix(".skipped.txt")), file=sys.stderr)


@app.command()
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
    from zipar_train.sweep.spec import overrides_of_agent

    overrides = [*overrides, *overrides_of_agent(more)]
    loaded = load_recipe(recipe, overrides)
    if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ:  # a W&B agent: a folder for each of its runs
        own = f"{loaded.run_dir}-{os.environ['WANDB_SWEEP_ID']}/{os.environ['WANDB_RUN_ID']}"
        overrides.append(override("run_dir", own))
        if loaded.log.wandb == "offline" and not os.environ.get("WANDB_MODE"):
            overrides.append("log.wandb=online")  # the sweep's server needs the metrics
        loaded, resume = load_recipe(recipe, overrides), True  # the agent may run it again
    try:
        from zipar_train.training.fit import fit as work
        from zipar_train.training.fit import rank_zero_print

        made = work(loaded, resume=resume, allow=allow)
        rank_zero_print(str(made) if made else "trainer.fast_dev_run: tried out, nothing is kept")
    except Stopped as stop:
        again = ["zipar-train fit --recipe", quote(recipe), *(f"--set {quote(o)}" for o in overrides)]
        stop.advice = f"continue with: {' '.join([*again, '--resume'])}"
        raise


@app.command()
def generate(
    out: Annotated[
        Path, typer.Option(parser=user_path, callback=picture_file, metavar="PATH", help="The picture to write.")
    ],
    checkpoint: EitherCheckpointOption = None,
    recipe: OrRecipeOption = None,
    overrides: SetOption = [],  # noqa: B006
    labels: Annotated[str | None, typer.Option(help="Class numbers, for example 3,5: one image each.")] = None,
    captions: Annotated[
        list[str], typer.Option("--caption", help="A text-conditional model's prompt: one image each. Repeatable.")
    ] = [],  # noqa: B006
    window: Annotated[int | None, typer.Option(help="1 .. the grid's width; next-token if not given.")] = None,
    released: Annotated[
        bool, typer.Option("--released", help="As the released ZipAR code draws, unwritten slots attended: a baseline.")
    ] = False,
    adaptive: Annotated[
        bool,
        typer.Option(
            "--adaptive", help="A row starts once its first code passes verification, at --window the earliest."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Image k of a seed is always the same.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1: none.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: the most probable code.")] = None,
    top_k: Annotated[int | None, typer.Option(help="0: no cut.")] = None,
    top_p: Annotated[float | None, typer.Option(help="1: no cut.")] = None,
) -> None:
    """Generate images into one picture. Options that are not given default to the recipe's."""
    if (labels is None) == (not captions):
        raise ValueError("give either --labels or --caption")
    if released and adaptive:
        raise ValueError("--released draws as the released code does, which has no adaptive windows: drop one of them")
    if adaptive and window is None:
        raise ValueError("--adaptive needs --window: the smallest that a row may open at")
    wanted: Any = integers("--labels", labels) if labels is not None else captions
    source = one_of(checkpoint, recipe, overrides)
    from zipar_train.decoding.generator import load

    given: dict[str, Any] = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    generator = load(source, overrides=overrides)
    settings = {key: value for key, value in given.items() if value is not None}
    manner: Any = "released" if released else "adaptive" if adaptive else "planned"
    images = generator.generate(wanted, window=window, seed=seed, manner=manner, **settings)
    images.save(out)
    least, most = int(images.passes.min()), int(images.passes.max())
    print(f"{out}: {len(images)} images in {least if least == most else f'{least} to {most}'} passes")


@app.command()
def export(
    out: Annotated[
        Path,
        typer.Option(parser=user_path, callback=output_place, metavar="PATH",
                     help="A new folder; for --to llamagen a new .pt file."),
    ],
    checkpoint: EitherCheckpointOption = None,
    recipe: OrRecipeOption = None,
    overrides: SetOption = [],  # noqa: B006
    to: Annotated[
        str,
        typer.Option(help="hf: for from_pretrained | llamagen: a .pt for the original scripts | adapter: the LoRA "
                          "alone. The first two have adapters merged."),
    ] = "hf",
) -> None:  # fmt: skip
    """Export weights for other software, with a model card."""
    if to not in ("hf", "llamagen", "adapter"):
        raise ValueError(f"--to {to!r} is unknown: use hf, llamagen or adapter")
    source = one_of(checkpoint, recipe, overrides)
    from zipar_train.export.weights import export as work
    from zipar_train.recipe.load import load_recipe

    print(work(load_recipe(recipe, overrides) if recipe else source, out, to=cast(Any, to)))

"""The `bench` command: speed of generation, of passes by their rows, or of training steps, on this machine."""

from pathlib import Path
from typing import Annotated, Any

import typer

from zipar_train.cli.options import JsonOption, RecipeOption, SetOption, chart_file, integers, user_path, write_json


def bench(
    recipe: RecipeOption,
    windows: Annotated[
        str | None, typer.Option(help="For example 24,16,8; otherwise the recipe's, and next-token.")
    ] = None,
    batch_sizes: Annotated[
        str | None, typer.Option(help="Images at once, for example 1,8,64; otherwise 1, for --train the recipe's.")
    ] = None,
    grids: Annotated[
        str | None, typer.Option(help="Square grids, for example 16,24,32,48; otherwise the recipe's.")
    ] = None,
    rounds: Annotated[
        int, typer.Option("--repeats", min=1, help="Counted rounds of each method, after the warm-up.")
    ] = 3,
    alone: Annotated[
        bool, typer.Option("--no-baselines", help="Measure our decoder only, without the baselines.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Our decoder with torch.compile too: minutes before the first image.")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Our decoder with int8 weights too, beside the floor of its bytes.")
    ] = False,
    train: Annotated[
        bool, typer.Option("--train", help="Training steps under the smallest window instead, beside the causal one.")
    ] = False,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Single passes with so many rows of each image instead, for example 1,2,4,8,16,32: slots, twice "
            "under guidance."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; otherwise bfloat16 on a GPU, float32 on a CPU.")
    ] = None,
    overrides: SetOption = [],  # noqa: B006
    json_file: JsonOption = None,
    png: Annotated[
        Path | None,
        typer.Option(
            parser=user_path,
            callback=chart_file,
            metavar="FILE",
            help="Plot milliseconds per pass, and the roofline.",
        ),
    ] = None,
) -> None:
    """Measure the time per pass and image, compared with this device's roofline floor. Uses random weights.

    --json is rewritten after every round. Exit status 1: some rows could not be measured; the output says why.
    """
    from zipar_train.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    batches = integers("--batch-sizes", batch_sizes) if batch_sizes else [loaded.data.micro_batch_size if train else 1]
    sizes = integers("--grids", grids) if grids else []
    wanted = integers("--windows", windows) if windows else []
    fed = integers("--rows", rows) if rows is not None else []
    for option, numbers in {"--batch-sizes": batches, "--grids": sizes, "--windows": wanted, "--rows": fed}.items():
        if wrong := [number for number in numbers if number < 1]:
            raise ValueError(f"{option}: {wrong[0]} must be at least 1")
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"--dtype {dtype!r} is unknown: use float32 or bfloat16")
    others: dict[str, tuple[Any, dict[str, Any]]] = {
        "--train": (
            train,
            {
                "--png": png,
                "--dtype": dtype,
                "--rows": rows,
                "--compiled": compiled,
                "--int8": int8,
                "--no-baselines": alone,
            },
        ),
        "--rows": (rows, {"--windows": windows, "--grids": grids}),
    }
    for table, (asked, meaningless) in others.items():
        for option, given in meaningless.items():
            if asked and given:
                raise ValueError(f"{option} does not apply to {table}")
    import torch

    from zipar_train.benchmark.report import decode_lines, plot, plot_rows, rows_lines, train_lines

    def save(report: Any) -> None:
        if json_file:
            write_json(json_file, report.model_dump())

    if train:
        from zipar_train.benchmark.train import bench_train

        window = min(wanted or loaded.zipar.windows)
        steps = bench_train(loaded, window=window, batches=batches, grids=sizes, rounds=rounds, save=save)
        save(steps)
        print("\n".join(train_lines(steps)))
        if steps.failures:
            raise typer.Exit(1)
        return
    how: dict[str, Any] = {
        "batches": batches,
        "rounds": rounds,
        "baselines": not alone,
        "compiled": compiled,
        "int8": int8,
        "dtype": getattr(torch, dtype) if dtype else None,
        "save": save,
    }
    if fed:
        from zipar_train.benchmark.rows import bench_rows

        passes = bench_rows(loaded, rows=fed, **how)
        save(passes)
        print("\n".join(rows_lines(passes)))
        if png:
            plot_rows(passes, png)
            print(f"\n{png}")
        if passes.failures:
            raise typer.Exit(1)
        return
    from zipar_train.benchmark.decode import bench_decode

    widest = max(sizes) if sizes else loaded.model.raster.row_length
    wanted = sorted(wanted or {widest, *loaded.evaluate.windows}, reverse=True)
    found = bench_decode(loaded, windows=wanted, grids=sizes, **how)
    save(found)
    print("\n".join(decode_lines(found)))
    if png:
        plot(found, png)
        print(f"\n{png}")
    if found.failures:
        raise typer.Exit(1)

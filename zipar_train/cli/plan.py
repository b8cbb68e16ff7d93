"""The command `plan`: passes, masks and memory of each window."""

from pathlib import Path
from typing import Annotated, Any

import typer

from zipar_train.cli.options import (
    JsonOption,
    RecipeOption,
    SetOption,
    chart_file,
    integers,
    user_path,
    write_json,
)


def plan(
    recipe: RecipeOption,
    overrides: SetOption = [],  # noqa: B006
    window: Annotated[int | None, typer.Option(help="The window to show; otherwise the recipe's smallest.")] = None,
    windows: Annotated[str | None, typer.Option(help="Windows of the table, for example 24,16,8.")] = None,
    png: Annotated[
        Path | None,
        typer.Option(parser=user_path, callback=chart_file, metavar="FILE", help="Plot the pass map and the mask."),
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
    from zipar_train.io.tables import aligned
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
    plans = [make(size) for size in sizes]
    rows = [
        {"window": p.window, "passes": p.passes, "reduction": p.reduction, "width": p.width, "slots": len(p)}
        for p in plans
    ]
    print(f"{loaded.name}: {grid} codes, {grid.num_codes} next-token passes\n")
    cells = [[*map(str, (p.window, p.passes, f"{p.reduction:.1%}", p.width, len(p)))] for p in plans]
    print("\n".join(aligned([["window", "passes", "fewer", "widest pass", "slots"], *cells])))
    maps = grid.images(shown.generated_at())
    print(f"\nThe pass that generates each code at window {shown.window}:\n")
    digits = len(str(shown.passes))
    print("\n\n".join("\n".join(" ".join(f"{t:{digits}}" for t in line) for line in each) for each in maps))
    if png:
        from zipar_train.plan.diagram import plot_plan

        plot_plan(shown, png)
        print(f"\n{png}")
    record: dict[str, Any] = {
        "recipe": loaded.name,
        "grid": [*grid.sides],
        "windows": rows,
        "map": {"window": shown.window, "generated_at": maps[-1].tolist()},
    }
    if preview := grid.preview:
        record |= {"preview": [*preview.sides]}
        record["map"]["preview_generated_at"] = maps[0].tolist()
    if memory:
        from zipar_train.training.memory_estimate import advice, predict, room_here

        found = predict(loaded)
        print("\n" + "\n".join(found.lines()))
        room = room_here() if gib is None else gib * 2**30
        advice_lines = [] if room is None else advice(loaded, found, room)
        if room is not None:
            print("\n" + "\n".join(advice_lines or [f"It fits into {room / 2**30:.1f} GiB."]))
        record["memory"] = {**found.model_dump(), "advice": advice_lines}
    if json_file:
        write_json(json_file, record)

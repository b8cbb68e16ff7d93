"""Print the table of models in docs/models.md: sizes, passes, and the batches that fit into common devices.

    python scripts/models_table.py

Memory is the estimate of `zipar-train plan`, of the recipe as it is: LoRA where the recipe has it, and the largest
number of images whose estimate is below 95 % of the device.
"""

import argparse
from collections.abc import Sequence

from zipar_train.plan.table import Plan
from zipar_train.recipe.load import load_recipe, shipped
from zipar_train.recipe.schema import Recipe
from zipar_train.training.memory_estimate import Memory, predict

DEVICES = (24, 48, 80)  # GiB
USABLE = 0.95  # share of a device's memory that a batch may take
LICENCES = {  # of the published weights and their code, as their authors state it
    "llamagen": "MIT",
    "llamagen-t2i": "MIT",
    "janus": "MIT, weights DeepSeek Model License",
    "lumina": "none stated",
    "emu3": "Apache 2.0",
    "simplear": "MIT",
    "glm-image": "MIT",
}
OWN = ("digits", "mnist")  # recipes without published weights
HEAD = ["recipe", "parameters, M", "licence", "codes", "passes at windows W / 16 / 8 / 4"]
HEAD += ["images per training batch on 24 / 48 / 80 GiB", "images generated at once on 24 / 48 / 80 GiB"]


def passes(recipe: Recipe) -> str:
    """Return the passes of an image at the widest window and at windows 16, 8 and 4."""
    grid = recipe.model.raster
    windows = [grid.row_length, *(window for window in (16, 8, 4) if window < grid.row_length)]
    plans = [Plan.zipar(grid, window=w, prompt=recipe.model.prompt, **recipe.zipar.rule) for w in windows]
    return " / ".join(f"{plan.passes:,}" for plan in plans)


def most(memory: Memory, room: float, *, fixed: float) -> str:
    """Return how many images fit into `room` bytes; a dash if not even one does.

    Args:
        fixed: Bytes that do not depend on the number of images.
    """
    each = (memory.total - fixed) / memory.images
    images = int((room - fixed) / each) if room > fixed else 0
    return f"{images:,}" if images else "-"


def row(name: str) -> list[str]:
    """Return a recipe's row of the table."""
    recipe = load_recipe(name)
    found = predict(recipe)
    train, generation = found.train, found.generation
    kept = train.weights + train.optimizer + train.average + train.teacher
    fixed = {
        "train": max(train.total - train.activations, kept + train.gradients),
        "generation": generation.total - generation.cache - generation.activations,
    }
    fits = [
        " / ".join(most(memory, USABLE * size * 2**30, fixed=fixed[kind]) for size in DEVICES)
        for kind, memory in (("train", train), ("generation", generation))
    ]
    licence = LICENCES[recipe.model.family]
    return [f"`{name}`", f"{found.parameters / 1e6:,.0f}", licence, str(recipe.model.raster), passes(recipe), *fits]


def table(names: Sequence[str]) -> str:
    """Return the table in Markdown."""
    rows = [HEAD, ["---"] * len(HEAD), *(row(name) for name in names)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def published() -> list[str]:
    """Return the recipes of models whose weights others have published."""
    return [name for name in shipped() if not name.startswith(OWN)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="recipes; by default all of published models")
    print(table(parser.parse_args().recipes or published()))

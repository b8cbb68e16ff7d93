"""A figure of a plan: the pass that generates each code, and the attention mask."""

from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap

from zipar_train.io.figures import plt, write_figure
from zipar_train.plan.table import NEVER, Plan


def plot_plan(plan: Plan, path: str | Path) -> None:
    """Write a figure of the plan: the image's pass map (H, W) beside the mask (S, S), stand-ins in orange.

    Raises:
        ValueError: If the file extension is not a supported image format.
        OSError: If the file cannot be written.
    """
    passes, visible = plan.grid.images(plan.generated_at())[-1], plan.visible().astype(np.int8)
    bright = passes.min() + 0.6 * (passes.max() - passes.min())
    which = "each code of the image" if plan.grid.preview else "each code"
    visible[:, plan.expires != NEVER] *= 2
    with plt.rc_context({"font.size": 10}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
        left.imshow(passes, cmap="viridis")
        left.set_title(f"pass that generates {which}: {plan.passes} passes, {plan.reduction:.0%} fewer", fontsize=11)
        left.set(xlabel="column", ylabel="row")
        if passes.size <= 24 * 24:
            size = min(9, 160 / max(passes.shape))
            for row, column in [(r, c) for r in range(passes.shape[0]) for c in range(passes.shape[1])]:
                left.text(
                    column,
                    row,
                    passes[row, column],
                    ha="center",
                    va="center",
                    fontsize=size,
                    color="white" if passes[row, column] < bright else "black",
                )
        right.imshow(
            visible, cmap=ListedColormap(["#f4f1ea", "#2f6f8f", "#d97b3c"]), vmin=0, vmax=2, interpolation="nearest"
        )
        right.set_title("attention mask, in decode order (orange: stand-ins)", fontsize=11)
        right.set(xlabel=f"key: {len(plan)} slots", ylabel="query")
        figure.suptitle(f"{plan.grid} codes, window {plan.window}", fontsize=13)
        write_figure(figure, Path(path))

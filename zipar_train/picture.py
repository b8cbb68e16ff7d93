"""A plan drawn: when each code is drawn, and who sees whom."""

import io
from pathlib import Path

import matplotlib
import numpy as np

from zipar_train.files import FIGURES, write_whole
from zipar_train.plan import NEVER, Plan

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


def draw_plan(plan: Plan, path: str | Path) -> None:
    """Write a picture of the plan: the pass map (H, W) beside the mask (S, S), stand-ins in orange.

    Raises:
        ValueError: for an ending that is no picture format.
        OSError: if the file cannot be written.
    """
    drawn, visible = plan.drawn(), plan.visible().astype(np.int8)
    visible[:, plan.expires != NEVER] *= 2
    with plt.rc_context({"font.size": 10}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
        left.imshow(drawn, cmap="viridis")
        left.set_title(f"the pass that draws each code: {plan.passes} passes, {plan.reduction:.0%} fewer", fontsize=11)
        left.set(xlabel="column", ylabel="row")
        if drawn.size <= 24 * 24:
            size = min(9, 160 / max(drawn.shape))
            for row, column in [(r, c) for r in range(drawn.shape[0]) for c in range(drawn.shape[1])]:
                light = drawn[row, column] < plan.passes * 0.6
                left.text(column, row, drawn[row, column], ha="center", va="center", fontsize=size,
                          color="white" if light else "black")  # fmt: skip
        right.imshow(
            visible, cmap=ListedColormap(["#f4f1ea", "#2f6f8f", "#d97b3c"]), vmin=0, vmax=2, interpolation="nearest"
        )
        right.set_title("who sees whom, in decode order (orange: stand-ins)", fontsize=11)
        right.set(xlabel=f"key: {len(plan)} slots", ylabel="query")
        figure.suptitle(f"{plan.grid} codes, window {plan.window}", fontsize=13)
        write_figure(figure, Path(path))


def write_figure(figure: Figure, path: Path, *, dpi: int = 130) -> None:
    """Write a figure in the format its name ends in, whole or not at all, and close it.

    Raises:
        ValueError: for an ending that is no picture format.
        OSError: if the file cannot be written.
    """
    buffer = io.BytesIO()
    try:
        if path.suffix not in FIGURES:
            raise ValueError(f"{path}: no picture format of ours ends in {path.suffix!r}. Use .png, .pdf or .svg")
        figure.savefig(buffer, format=path.suffix.lstrip(".") or "png", dpi=dpi, bbox_inches="tight")
    finally:
        plt.close(figure)
    write_whole(path, buffer.getvalue())

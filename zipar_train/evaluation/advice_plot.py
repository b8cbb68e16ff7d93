"""Plot of a window advice: bits by window, attention cut off by layer, and the attention map."""

from pathlib import Path

import matplotlib
import numpy as np

from zipar_train.evaluation.window_advice import Advice
from zipar_train.io.figures import write_figure

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter  # noqa: E402


def plot(advice: Advice, path: Path) -> None:
    """Plot bits by window, attention cut off by layer, and the attention map, as in the paper's figure 3.

    Raises:
        ValueError: If the extension is not a picture format.
        OSError: If the file cannot be written.
    """
    colours = plt.get_cmap("viridis")(np.linspace(0.05, 0.9, len(advice.windows)))
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
        windows = [row.window for row in advice.windows]
        left.plot(windows, [row.bits for row in advice.windows], "o-", color="#2f7f9f")
        borne = advice.windows[0].bits * (1 + advice.tolerance)
        left.axhline(borne, ls="--", lw=1, color="#777777")
        left.annotate(
            f"{advice.tolerance:.1%} above next-token",
            (windows[0], borne),
            xytext=(0, 4),
            ha="right",
            textcoords="offset points",
            fontsize=8,
            color="#777777",
        )
        left.set(xscale="log", xlabel="window, codes", ylabel="held-out bits a code")
        left.set_xticks(windows, [str(window) for window in windows])
        left.xaxis.set_minor_formatter(NullFormatter())
        left.minorticks_off()
        for row, colour in zip(advice.windows, colours, strict=True):
            if any(row.cut):
                middle.plot(
                    range(len(row.cut)),
                    [100 * c for c in row.cut],
                    "o-",
                    ms=3,
                    color=colour,
                    label=f"window {row.window}",
                )
        middle.set(xlabel="layer", ylabel="attention on codes not generated yet, %", ylim=(0, None))
        middle.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(windows) > 1:
            middle.legend(frameon=False, fontsize=8)
        shown = np.array(advice.attention, dtype=float)[:12]
        half = shown.shape[1] // 2
        image = right.imshow(
            100 * shown,
            cmap="magma_r",
            norm="log",
            aspect="auto",
            interpolation="nearest",
            extent=(-half - 0.5, half + 0.5, len(shown) - 0.5, -0.5),
        )
        right.set(xlabel="columns to the side", ylabel="rows above")
        right.set_title("where attention lies: % a code, mean of layers", fontsize=10)
        bar = figure.colorbar(image, ax=right, format=ScalarFormatter())
        bar.ax.yaxis.set_minor_formatter(ScalarFormatter())
        write_figure(figure, path)

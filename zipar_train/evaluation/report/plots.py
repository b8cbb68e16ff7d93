"""Plots of an evaluation: quality against cost, and the same samples at every window."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from zipar_train.evaluation.report.schema import EvaluationReport
from zipar_train.io.figures import write_figure

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter  # noqa: E402

COLOURS = ("#8a8a8a", "#c0573e", "#2f7f9f", "#5b8c5a", "#9a6a93", "#b58a2b")
COSTS = {"passes": "forward passes an image", "milliseconds": "ms per image, batch size 1"}
QUALITIES = {"fid": "Frechet distance", "clip": "CLIP score", "bits": "held-out bits a code"}
BETTER = {"fid": "lower is better", "clip": "higher is better", "bits": "lower is better"}


def pareto(report: EvaluationReport, *, paper: Mapping[str, list[tuple[float, float]]] | None = None) -> Figure:
    """Plot quality against passes and milliseconds, with a line per checkpoint and a point per window.

    Args:
        report: The report.
        paper: Published (passes, score) by quality, shown as open points over passes only, because times of other
            machines are not comparable.
    """
    names = list(dict.fromkeys(row.name for row in report.rows))
    shown = [quality for quality in QUALITIES if report.measured(quality)]
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            len(shown),
            2,
            figsize=(10, 3.4 * len(shown) + 0.6),
            sharey="row",
            sharex="col",
            layout="constrained",
            squeeze=False,
        )
        for line, quality in enumerate(shown):
            for column, cost in enumerate(COSTS):
                axis = axes[line, column]
                for name, colour in zip(names, cycle(COLOURS), strict=False):
                    rows = [row for row in report.rows if row.name == name and getattr(row, quality) is not None]
                    if not rows:
                        continue
                    scores = [getattr(row, quality) for row in rows]
                    means = [s if quality == "bits" else s.mean for s in scores]
                    error = None if quality == "bits" else [s.std or 0.0 for s in scores]
                    style = {"planned": "-", "released": "--", "adaptive": ":"}[rows[0].mode]
                    style = "-." if rows[0].lookahead else style
                    axis.errorbar(
                        [getattr(row, cost) for row in rows],
                        means,
                        error,
                        marker="o",
                        ms=4,
                        capsize=2,
                        lw=1.6,
                        ls=style,
                        color=colour,
                        label=name,
                    )
                if column == 0 and paper and paper.get(quality):
                    axis.plot(
                        *zip(*paper[quality], strict=True),
                        "D",
                        ms=5,
                        mfc="none",
                        color="#555555",
                        label="published†" if report.differences else "published",
                    )
                axis.set_xscale("log")
                axis.grid(alpha=0.2)
                if quality == "fid" and all(row.fid.mean > 0 for row in report.rows if row.fid):
                    axis.set_yscale("log")
                    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
                    axis.yaxis.set_major_formatter(ScalarFormatter())
                    axis.yaxis.set_minor_formatter(NullFormatter())
            axes[line, 0].set_ylabel(f"{QUALITIES[quality]}\n({BETTER[quality]})")
        for column, (cost, title) in enumerate(COSTS.items()):
            axis = axes[-1, column]
            ticks = _apart(sorted({round(getattr(row, cost)) for row in report.rows if row.name == names[0]}))
            axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.minorticks_off()
            axis.set_xlabel(title)
        last, quality = axes[-1, 0], shown[-1]
        for row in (row for row in report.rows if row.name == names[-1]):
            value = getattr(row, quality)
            if value is not None:
                last.annotate(
                    f"window {row.window}",
                    (row.passes, value if quality == "bits" else value.mean),
                    xytext=(0, -14),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color="#777777",
                )
        last.margins(y=0.18)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(f"{report.recipe['name']}: quality against cost, a point a window", fontsize=12)
    return figure


def _apart(ticks: list[int]) -> list[int]:
    """Return the ticks whose labels do not overlap on a logarithmic axis."""
    kept: list[int] = []
    for tick in ticks:
        if not kept or tick > 1.15 * kept[-1]:
            kept.append(tick)
    return kept


def sheet(samples: Mapping[tuple[str, int], Tensor], name: str) -> Tensor:
    """Return one checkpoint's images as uint8 (h, w, 3), a row per window, a column per image, white lines between."""
    tiles = [
        torch.nn.functional.pad(pixels, (0, 1, 0, 1), value=255) for (n, _), pixels in samples.items() if n == name
    ]
    return torch.cat([torch.cat(list(row), dim=-1) for row in tiles], dim=-2).permute(1, 2, 0)


def plot_samples(samples: Mapping[tuple[str, int], Tensor], path: Path) -> None:
    """Plot samples to a file: a block per checkpoint, a row per window, a column per image, the same in every row."""
    names = list(dict.fromkeys(name for name, _ in samples))
    images = len(next(iter(samples.values())))
    rows = {name: [window for n, window in samples if n == name] for name in names}
    heights = [len(windows) for windows in rows.values()]
    height, width = (side + 1 for side in next(iter(samples.values())).shape[-2:])
    small = max(height, width) < 65
    wide = 0.62 if small else 1.3  # inches per image
    high = wide * height / width
    with plt.rc_context({"font.size": 9}):
        figure, axes = plt.subplots(
            len(names),
            1,
            figsize=(wide * images + 1.4, (high + 0.04) * sum(heights) + 0.4 * len(names)),
            squeeze=False,
            layout="constrained",
            height_ratios=heights,
        )
        for axis, name in zip(axes[:, 0], names, strict=True):
            axis.imshow(sheet(samples, name).numpy(), interpolation="nearest" if small else "antialiased")
            axis.set_yticks([height * (i + 0.5) for i in range(len(rows[name]))], [f"window {w}" for w in rows[name]])
            axis.set_xticks([])
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            axis.set_title(name, loc="left", fontsize=10)
        write_figure(figure, path, dpi=160)

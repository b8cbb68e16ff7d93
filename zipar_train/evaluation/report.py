"""A report for people: `report.json`, `report.md`, `pareto.png`, `samples.png`."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib
import torch
from PIL import Image

from zipar_train.evaluation.evaluate import Report, Row, Samples, Score
from zipar_train.files import make_folder, write_whole
from zipar_train.picture import write_figure

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import NullFormatter, ScalarFormatter  # noqa: E402

COLOURS = ("#7a7a7a", "#c0573e", "#2f6f8f", "#5b8c5a", "#8a5a83", "#b58a2b")


def write_report(report: Report, samples: Samples, out: str | Path) -> list[Path]:
    """Write the four files; returns their paths.

    Raises:
        OSError: if one cannot be written.
    """
    out = Path(out)
    make_folder(out)
    write_whole(out / "report.json", (report.model_dump_json(indent=1) + "\n").encode())
    write_whole(out / "report.md", markdown(report).encode())
    plot_pareto(report, out / "pareto.png")
    plot_samples(report, samples, out / "samples.png")
    return [out / name for name in ("report.json", "report.md", "pareto.png", "samples.png")]


HEADER = ("checkpoint", "window", "passes", "fewer", "ms/image", "bits/code", "window costs", "gap closed",
          "FD", "KID x1000", "precision", "recall", "agreement")  # fmt: skip


def cells(report: Report) -> list[list[str]]:
    """The table's rows as text, in HEADER's columns."""

    def pm(score: Score, scale: float = 1, digits: int = 2) -> str:
        return f"{score.mean * scale:.{digits}f} ± {score.std * scale:.{digits}f}"

    return [
        [
            row.checkpoint,
            str(row.window),
            str(row.passes),
            f"{row.reduction:.0%}",
            f"{row.milliseconds:.0f}",
            f"{row.bits:.3f}",
            f"{row.window_costs:+.1%}" if row.window_costs else "",
            "" if row.gap_closed is None else f"{row.gap_closed:.0%}",
            pm(row.fid),
            pm(row.kid, 1000, 1),
            pm(row.precision),
            pm(row.recall),
            pm(row.agreement, 100, 1) + " %",
        ]
        for row in report.rows
    ]


def findings(report: Report) -> list[str]:
    """What the numbers say, in sentences that are computed and can come out otherwise."""
    if report.baseline is None:
        return []
    widest = report.rows[0].window
    others = dict.fromkeys(row.checkpoint for row in report.rows if row.checkpoint != report.baseline)
    lines = []
    for name in others:
        kept = report.row(name, widest).bits / report.row(report.baseline, widest).bits - 1
        lines.append(f"**{name}** against {report.baseline}: next-token bits {kept:+.1%}.")
        for row in report.rows:
            if row.checkpoint == name and row.gap_closed is not None:
                base = report.row(report.baseline, row.window)
                lines.append(
                    f"At window {row.window} it closes {row.gap_closed:.0%} of the gap in bits; "
                    f"Frechet distance {base.fid.mean:.2f} -> {row.fid.mean:.2f}, "
                    f"agreement {base.agreement.mean:.1%} -> {row.agreement.mean:.1%}."
                )
    return lines


def table(report: Report) -> list[str]:
    """The table in Markdown."""
    return ["| " + " | ".join(row) + " |" for row in [list(HEADER), ["---"] * len(HEADER), *cells(report)]]


def reading(report: Report) -> list[str]:
    """How to read the table, and with what it was made."""
    environment = ", ".join(f"{key} {value}" for key, value in report.environment.items())
    draw = ", ".join(f"{key} {value:g}" for key, value in report.recipe["draw"].items())
    return [
        "- **bits/code** is exact: mean -log2 p of held-out codes under that window's mask, without guidance.",
        "- **window costs**: bits above this checkpoint's own next-token bits.",
        "- **gap closed**: of the bits that the first compared checkpoint"
        + (f" ({report.baseline})" if report.baseline else "")
        + " loses at that window against its own next-token bits, the share this one does not lose.",
        f"- **FD** (Frechet distance), **KID**, **precision** and **recall** are torch-fidelity's, on the features of "
        f"`{report.features}`, a small network trained on this recipe's training images "
        f"({report.features_accuracy:.1%} right on held-out ones). **Not comparable with Inception FID**, "
        "nor with another recipe's numbers. KID is unbiased for independent draws; ours are balanced over classes, "
        "which makes it a little negative where nothing differs.",
        "- **agreement**: share of drawn images which that network names as the label they were drawn for.",
        f"- Mean ± standard deviation over seeds {', '.join(map(str, report.seeds))}, {report.images:,} images each; "
        f"reference: {report.reference_images:,} images of {report.reference}. "
        "Fewer than 50,000 images: a Frechet distance of this size is biased upwards, alike in every row.",
        "- **ms/image**: median of nine images drawn alone (batch 1), windows and checkpoints taking turns. "
        f"Sampling: {draw}.",
        f"- {environment}.",
    ]


def markdown(report: Report) -> str:
    """The report as Markdown."""
    lines = [
        f"# {report.recipe['name']}: windows and what they cost",
        "",
        *table(report),
        "",
        *(f"- {line}" for line in findings(report)),
        "",
        "![Quality against passes and time](pareto.png)",
        "",
        "![Samples](samples.png)",
        "",
        "## How to read it",
        "",
        *reading(report),
        "",
    ]
    return "\n".join(lines)


def plot_pareto(report: Report, path: Path) -> None:
    """Quality (Frechet distance; bits a code) against passes and against milliseconds, a line a checkpoint."""
    names = list(dict.fromkeys(row.checkpoint for row in report.rows))
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(2, 2, figsize=(10, 7.2), sharey="row", sharex="col", layout="constrained")
        for name, colour in zip(names, _cycle(COLOURS), strict=False):
            rows = [row for row in report.rows if row.checkpoint == name]
            for column, cost in enumerate(("passes", "milliseconds")):
                xs = [getattr(row, cost) for row in rows]
                fd, error = [row.fid.mean for row in rows], [row.fid.std for row in rows]
                axes[0, column].errorbar(xs, fd, error, marker="o", ms=4, capsize=2, lw=1.6, color=colour, label=name)
                axes[1, column].plot(xs, [row.bits for row in rows], marker="o", ms=4, lw=1.6, color=colour)
                axes[0, column].set(xscale="log", yscale="log")
                axes[1, column].set(xscale="log")
        for column, (cost, title) in enumerate(
            (("passes", "forward passes an image"), ("milliseconds", "ms an image"))
        ):
            axis = axes[1, column]
            ticks = sorted({round(getattr(row, cost)) for row in report.rows if row.checkpoint == names[0]})
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.minorticks_off()
            axis.set_xlabel(title)
        for row in (row for row in report.rows if row.checkpoint == names[-1]):
            axes[1, 0].annotate(f"window {row.window}", (row.passes, row.bits), xytext=(0, -14),
                                textcoords="offset points", ha="center", fontsize=8, color="#555555")  # fmt: skip
        axes[0, 0].yaxis.set_major_formatter(ScalarFormatter())
        axes[0, 0].yaxis.set_minor_formatter(NullFormatter())
        axes[0, 0].set_ylabel("Frechet distance\n(small classifier; lower is better)")
        axes[1, 0].set_ylabel("held-out bits a code\n(lower is better)")
        axes[1, 0].margins(y=0.18)
        axes[0, 0].legend(frameon=False)
        figure.suptitle(f"{report.recipe['name']}: quality against cost, a point a window", fontsize=12)
        write_figure(figure, path)


def plot_samples(report: Report, samples: Samples, path: Path) -> None:
    """A block a checkpoint, a row a window, a column an image number: the same draws in every row."""
    names = list(dict.fromkeys(name for name, _ in samples))
    windows = list(dict.fromkeys(window for _, window in samples))
    images = len(next(iter(samples.values())))
    with plt.rc_context({"font.size": 9}):
        figure, axes = plt.subplots(
            len(names), 1, figsize=(0.62 * images + 1.4, 0.66 * len(windows) * len(names) + 0.4 * len(names)),
            squeeze=False, layout="constrained",
        )  # fmt: skip
        for axis, name in zip(axes[:, 0], names, strict=True):
            tiles = [torch.nn.functional.pad(samples[name, w], (0, 1, 0, 1), value=255) for w in windows]
            side = tiles[0].shape[-1]
            sheet = torch.cat([torch.cat(list(row), dim=-1) for row in tiles], dim=-2).permute(1, 2, 0)
            axis.imshow(sheet.numpy(), interpolation="nearest")
            axis.set_yticks([side * (i + 0.5) for i in range(len(windows))], [f"window {w}" for w in windows])
            axis.set_xticks([])
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            axis.set_title(name, loc="left", fontsize=10)
        write_figure(figure, path, dpi=160)


def log_to_wandb(report: Report, pictures: Iterable[Path]) -> None:
    """One W&B run with the table and the pictures, online or offline as the recipe says."""
    from zipar_train.recipe import parse
    from zipar_train.training.trainer import wandb_logger

    logger = wandb_logger(parse(report.recipe, where="the report's recipe"), "evaluate")
    flat = [_flat(row) for row in report.rows]
    logger.log_table("evaluation", columns=list(flat[0]), data=[list(row.values()) for row in flat])
    for picture in pictures:
        with Image.open(picture) as image:
            logger.log_image(picture.stem, [image.copy()])
    logger.experiment.finish()


def _flat(row: Row) -> dict[str, float | str | None]:
    """A row as numbers, a score as its mean and its standard deviation."""
    flat: dict[str, float | str | None] = {}
    for key, value in row.model_dump().items():
        flat |= {key: value["mean"], f"{key}_std": value["std"]} if isinstance(value, dict) else {key: value}
    return flat


def _cycle(items: Iterable[str]) -> Iterable[str]:
    kept = list(items)
    while True:
        yield from kept

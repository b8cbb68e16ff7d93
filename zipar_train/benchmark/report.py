"""Tables of benchmark results, and a plot with the roofline floor."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from zipar_train.benchmark.results import (
    AHEAD,
    CAUSAL,
    COMPILED,
    EAGER,
    OURS,
    PLAIN,
    ROUNDED,
    STOCK,
    DecodeReport,
    DecodeRow,
    RowsReport,
    TrainReport,
)
from zipar_train.io.figures import write_figure
from zipar_train.io.tables import aligned

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter  # noqa: E402

COLOURS = {
    OURS: "#2f6f8f",
    COMPILED: "#5b8c5a",
    AHEAD: "#3f3f8f",
    ROUNDED: "#4fa3a5",
    PLAIN: "#8a5a83",
    EAGER: "#c0573e",
    STOCK: "#b58a2b",
}


def decode_lines(report: DecodeReport) -> list[str]:
    """Return the lines of the decode table, its ratios and remarks."""
    cells = [
        [
            "method",
            "grid",
            "window",
            "batch",
            "passes",
            "ms/pass",
            "spread",
            "floor",
            "x floor",
            "ms/image",
            "images/s",
            "MiB",
            "same codes",
        ]
    ]
    for row in report.rows:
        cells.append(
            [
                row.method,
                f"{row.grid[0]}x{row.grid[1]}",
                str(row.window),
                str(row.batch),
                f"{row.passes:.{0 if row.passes.is_integer() else 1}f}",
                f"{row.pass_ms:.3g}",
                f"{row.spread:.0%}",
                f"{row.floor_ms:.3g}",
                f"{row.times_floor:.1f}",
                f"{row.image_ms:,.4g}",
                f"{row.images_per_second:.3g}",
                _mib(row.memory),
                "" if row.code_match is None else f"{row.code_match:.2%}",
            ]
        )
    return [_head(report), "", *aligned(cells, "<>"), "", *_ratios(report), *_remarks(report)]


def _head(report: DecodeReport | RowsReport) -> str:
    return (
        f"{report.recipe['name']}, random weights, {report.dtype}, guidance {report.guidance:g}; "
        f"{report.environment['device']}: copies {report.copy_bandwidth / 1e9:,.3g} GB/s, "
        f"multiplies {report.matmul_rate / 1e12:.3g} TFLOP/s"
        + (f", integers {report.int8_rate / 1e12:.3g} TOP/s" if report.int8_rate else "")
    )


def _ratios(report: DecodeReport) -> list[str]:
    """Return sentences that compare the image times of one run with next-token decoding and other decoders."""
    times = {(r.method, tuple(r.grid), r.batch, r.window): r.image_ms for r in report.rows}
    lines = []
    for (method, grid, batch, window), taken in times.items():
        if method != OURS:
            continue
        said = []
        if window != grid[1] and (plain := times.get((method, grid, batch, grid[1]))):
            said.append(f"{taken / plain:.2f} of next-token's time")
        for other in (PLAIN, EAGER, STOCK):
            if slower := times.get((other, grid, batch, window)):
                said.append(f"{slower / taken:.1f}x as fast as {other}")
        if said:
            lines.append(f"window {window}, batch {batch}, {grid[0]}x{grid[1]}: " + ", ".join(said))
    return lines


def _remarks(report: DecodeReport | RowsReport | TrainReport) -> list[str]:
    """Return the failures and notes as lines."""
    failures = [
        f"not measured: {f.method}, window {f.window}, batch {f.batch}, {f.grid[0]}x{f.grid[1]}: {f.error}"
        for f in report.failures
    ]
    return [*failures, *(f"note: {note}" for note in report.notes)]


def rows_lines(report: RowsReport) -> list[str]:
    """Return the lines of the table of passes by their rows, and its remarks."""
    cells = [
        ["rows", "slots", "images", "method", "ms/pass", "spread", "floor", "x floor", "int8 floor", "x fewest rows"]
    ]
    for row in report.rows:
        cells.append(
            [
                f"{'' if row.guided or report.guidance == 1 else 'unguided '}{row.rows}",
                str(row.slots),
                str(row.batch),
                row.method,
                f"{row.pass_ms:.3g}",
                f"{row.spread:.0%}",
                f"{row.floor_ms:.3g}",
                f"{row.times_floor:.1f}",
                f"{row.int8_floor_ms:.3g}",
                f"{row.against_fewest:.2f}",
            ]
        )
    return [_head(report), "", *aligned(cells, ">>><>"), "", *_remarks(report)]


def train_lines(report: TrainReport) -> list[str]:
    """Return the lines of the training table, and the fastest attention for each number of slots."""
    cells = [
        ["step", "grid", "window", "slots", "batch", "ms/step", "spread", "tokens/s", "utilisation", "of causal", "MiB"]
    ]
    for row in report.rows:
        cells.append(
            [
                row.attention if row.attention == CAUSAL else f"plan, {row.attention}",
                f"{row.grid[0]}x{row.grid[1]}",
                str(row.window),
                str(row.slots),
                str(row.batch),
                f"{row.step_ms:,.4g}",
                f"{row.spread:.0%}",
                f"{row.tokens_per_second:,.4g}",
                f"{row.utilisation:.0%}",
                "" if row.against_causal is None else f"{row.against_causal:.2f}",
                _mib(row.memory),
            ]
        )
    lines = [
        f"{report.recipe['name']}, random weights, {report.precision}{', compiled' if report.compiled else ''}; "
        f"{report.environment['device']}; utilisation of {report.rate / 1e12:.3g} TFLOP/s ({report.rate_is})",
        "",
        *aligned(cells, "<>"),
        "",
    ]
    tried = {row.attention for row in report.rows} - {CAUSAL}
    for slots, attention in report.choices().items():
        why = "the faster here" if len(tried) > 1 else "the only one that trains on this device"
        lines.append(f"{slots} slots: --set tune.attention={attention}, {why}")
    return [*lines, *_remarks(report)]


def plot(report: DecodeReport, path: Path) -> None:
    """Plot milliseconds per pass over window, batch size and grid, a panel for each that varies, the floor dashed.

    Raises:
        ValueError: If the extension is not a picture format.
        OSError: If the file cannot be written.
    """
    axes = {"window": "window, codes", "batch": "images at once", "grid": "rows and columns, codes"}
    varied = [name for name in axes if len({_value(row, name) for row in report.rows}) > 1] or ["window"]
    figure, panels = plt.subplots(1, len(varied), figsize=(5.2 * len(varied), 4.2), layout="constrained", squeeze=False)
    for panel, name in zip(panels[0], varied, strict=True):
        _panel(panel, report.rows, name)
        panel.set_xlabel(axes[name])
    panels[0, 0].set_ylabel("milliseconds a pass")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    figure.suptitle(_title(report), fontsize=11)
    write_figure(figure, path)


def plot_rows(report: RowsReport, path: Path) -> None:
    """Plot milliseconds per pass over its rows: a panel for each batch size, a line for each method, the floors dashed.

    Raises:
        ValueError: If the extension is not a picture format.
        OSError: If the file cannot be written.
    """
    batches = list(dict.fromkeys(row.batch for row in report.rows))
    methods = list(dict.fromkeys(row.method for row in report.rows))
    spare = [colour for name, colour in COLOURS.items() if name not in methods]
    size = (5.6 * len(batches), 4.4)
    figure, panels = plt.subplots(1, len(batches), figsize=size, layout="constrained", squeeze=False)
    for panel, batch in zip(panels[0], batches, strict=True):
        rows = [row for row in report.rows if row.batch == batch]
        for place, method in enumerate(methods):
            shown = [row for row in rows if row.method == method]
            colour = COLOURS.get(method, spare[place % len(spare)])  # the released loop has the one of other charts
            _line(panel, [(row.rows, row.pass_ms, row.spread) for row in shown], label=method, colour=colour)
        last = sorted(rows, key=lambda row: not row.int8)  # a dictionary keeps the floor of the dtype
        floors = {row.rows: (row.floor_ms, row.int8_floor_ms) for row in last}
        for number, (label, colour) in enumerate(((f"floor, {report.dtype}", "#333333"), ("floor, int8", "#999999"))):
            panel.plot([*floors], [floor[number] for floor in floors.values()], "--", color=colour, label=label)
        panel.set(xlabel="rows of a pass", title=f"{batch} image{'s' if batch > 1 else ''} at once")
        _log_axes(panel, [*floors])
    panels[0, 0].set_ylabel("milliseconds a pass")
    entries: dict[str, Any] = {}
    for panel in panels[0]:
        handles, labels = panel.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(_title(report), fontsize=11)
    write_figure(figure, path)


def _line(panel: Axes, points: Sequence[tuple[int, float, float]], *, label: str, colour: str) -> None:
    """Plot a method's milliseconds from (place, milliseconds, spread); nothing without points."""
    if points:
        where, taken, spread = zip(*points, strict=True)
        margin = [t * s / 2 for t, s in zip(taken, spread, strict=True)]
        panel.errorbar(where, taken, yerr=margin, marker="o", markersize=4, label=label, color=colour, capsize=2)


def _title(report: DecodeReport | RowsReport) -> str:
    return f"{report.recipe['name']}, {report.dtype}, guidance {report.guidance:g}, {report.environment['device']}"


def _value(row: DecodeRow, name: str) -> int:
    return row.grid[1] if name == "grid" else getattr(row, name)


def _panel(panel: Axes, rows: Sequence[DecodeRow], name: str) -> None:
    """Plot milliseconds over one of window, batch size and grid, with the other two as in the first row."""
    others = [other for other in ("window", "batch", "grid") if other != name]
    first = {other: _value(rows[0], other) for other in others}
    if name != "window":  # the smallest window measured at every batch size or grid
        values = {_value(row, name) for row in rows}
        at = {w: {_value(row, name) for row in rows if row.window == w} for w in {row.window for row in rows}}
        first["window"] = min(w for w in at if at[w] == values or len(at[w]) == max(map(len, at.values())))
        panel.set_title(f"window {first['window']}", fontsize=10)
    shown = [row for row in rows if all(_value(row, other) == first[other] for other in others)]
    for method, colour in COLOURS.items():
        line = sorted((_value(row, name), row.pass_ms, row.spread) for row in shown if row.method == method)
        _line(panel, line, label=method, colour=colour)
    # with row ends, the passes of transformers' generate differ from a plan's; those with lookahead always do
    # those of int8 weights are lower
    floor = sorted({(_value(row, name), row.floor_ms) for row in shown if row.method not in (STOCK, AHEAD, ROUNDED)})
    panel.plot(*zip(*floor, strict=True), "--", color="#333333", label="floor of the bytes and operations")
    _log_axes(panel, [place for place, _ in floor])


def _log_axes(panel: Axes, places: Sequence[int]) -> None:
    """Set both axes to logarithmic, with ticks at these places of the horizontal one."""
    panel.set(xscale="log", yscale="log")
    panel.set_xticks(places)
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(ScalarFormatter())
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.grid(alpha=0.25, which="both")
    panel.spines[["top", "right"]].set_visible(False)


def _mib(memory: int | None) -> str:
    return "" if memory is None else f"{memory / 2**20:,.0f}"

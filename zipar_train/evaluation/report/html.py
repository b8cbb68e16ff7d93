"""HTML report of an evaluation: one file without network access, with table, plots and samples, light and dark."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import yaml
from markupsafe import Markup, escape
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from zipar_train.evaluation.report.schema import EvaluationReport
from zipar_train.plan.table import Plan
from zipar_train.recipe.model import Model

PLAIN = "#000000"  # matplotlib's colour of text and axes, replaced by the page's


def html(
    report: EvaluationReport,
    samples: Mapping[tuple[str, int], Tensor],
    figure: Figure,
    *,
    table: Sequence[Sequence[str]],
    summary: Sequence[str],
    notes: Sequence[str],
) -> str:
    """Render the page and return its HTML.

    Args:
        report: The report.
        samples: uint8 (B, 3, height, width) by checkpoint and window.
        figure: The plot; it is closed afterwards.
        table: The heading, then the rows.
        summary, notes: Sentences, with **bold** in Markdown.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    names = list(dict.fromkeys(name for name, _ in samples))
    strips = {owner: f"strip-{number}" for number, owner in enumerate(samples)}
    rows, last = [], None
    for number, cells in enumerate(table[1:]):
        published = cells[0].startswith("published")
        row = report.rows[number] if number < len(report.rows) else None  # published rows come last
        rows.append(
            {
                "cells": [(mean, f"± {spread}" if spread else "") for mean, _, spread in map(_parts, cells)],
                "kind": " ".join(["first"] * (cells[0] != last) + ["published"] * published),
                "strip": strips.get((row.model_copy(update={"lookahead": 0}).name, row.window)) if row else None,
            }
        )
        last = cells[0]
    return template.render(
        name=report.recipe["name"],
        heading=table[0],
        rows=rows,
        summary=[_bold(line) for line in summary],
        notes=[_bold(line) for line in notes],
        figure=Markup(_svg(figure)),
        small=next(iter(samples.values())).shape[-2:].numel() < 64 * 64,
        checkpoints=[
            {
                "name": name,
                "strips": [
                    {
                        "id": strips[owner, window],
                        "window": window,
                        "images": len(pixels),
                        "png": _strip(pixels),
                        "alt": f"{len(pixels)} images of {name}, window {window}",
                    }
                    for (owner, window), pixels in samples.items()
                    if owner == name
                ],
            }
            for name in names
        ],
        passes={
            strips[row.name, row.window]: passes_of(report, row.window)
            for row in report.rows
            if (row.name, row.window) in strips and row.mode != "adaptive"  # whose images have plans of their own
        },
        recipe=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True),
    )


def passes_of(report: EvaluationReport, window: int) -> list[list[int]]:
    """Return the pass that generates each code of an image at a window, from 0, H lists of W."""
    zipar = report.recipe["zipar"]
    rule = {key: zipar.get(key) for key in ("first_row", "preview_window") if zipar.get(key) is not None}
    plan = Plan.zipar(Model.model_validate(report.recipe["model"]).raster, window=window, **rule)
    return plan.grid.images(plan.generated_at())[-1].tolist()


def _parts(cell: str) -> tuple[str, str, str]:
    """Return a cell's value, sign and spread: `1.5 ± 0.2 %` is `1.5 %` and `0.2`."""
    value, sign, spread = cell.partition(" ± ")
    unit = " %" if sign and spread.endswith(" %") else ""
    return value + unit, sign, spread.removesuffix(unit)


def _bold(line: str) -> Markup:
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", str(escape(line)))
    return Markup(text.replace(" -&gt; ", "&nbsp;→ "))


def _svg(figure: Figure) -> str:
    """Return the figure as an SVG element whose text and axes use the page's colour."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "zipar-train"}):
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = text.replace(PLAIN, "currentColor")
    return text.replace('<g id="text', '<g fill="currentColor" id="text')


def _strip(pixels: Tensor) -> str:
    """Return images side by side as a base64 PNG, with transparent lines between them."""
    opaque = pad(pixels, (0, 0, 0, 0, 0, 1), value=255)  # alpha channel
    row = pad(opaque, (0, 1), value=0).permute(2, 0, 3, 1).flatten(1, 2)[:, :-1]
    buffer = io.BytesIO()
    Image.fromarray(row.contiguous().numpy()).save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()

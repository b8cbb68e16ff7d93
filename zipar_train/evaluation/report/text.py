"""Text of an evaluation's report: table columns, sentences, Markdown, and the report files (mainly `report.html`)."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from PIL import Image

from zipar_train.evaluation.report.html import html
from zipar_train.evaluation.report.plots import pareto, plot_samples
from zipar_train.evaluation.report.protocol import in_pixels
from zipar_train.evaluation.report.schema import SCORES, EvaluationReport, EvaluationRow, Samples
from zipar_train.evaluation.scores.scores import Score
from zipar_train.io.figures import write_figure
from zipar_train.io.files import make_folder, write_atomic
from zipar_train.recipe.published import Paper


def write_report(report: EvaluationReport, samples: Samples, out: str | Path) -> list[Path]:
    """Write the five report files and return their paths.

    Raises:
        OSError: If a file cannot be written.
    """
    out = Path(out)
    make_folder(out)
    write_atomic(out / "report.json", (report.model_dump_json(indent=1) + "\n").encode())
    write_atomic(out / "report.md", markdown(report).encode())
    published = published_points(report)
    write_figure(pareto(report, paper=published), out / "pareto.png")
    plot_samples(samples, out / "samples.png")
    figures = pareto(report, paper=published)
    page = html(report, samples, figures, table=table(report), summary=summary(report), notes=notes(report))
    write_atomic(out / "report.html", page.encode())
    return [out / name for name in ("report.html", "report.md", "report.json", "pareto.png", "samples.png")]


def paper_of(report: EvaluationReport) -> Paper | None:
    return Paper.model_validate(report.recipe["published_results"]) if report.recipe.get("published_results") else None


def published_points(report: EvaluationReport) -> dict[str, list[tuple[float, float]]]:
    """Return the recipe's published (passes, score) pairs by quality."""
    paper = paper_of(report)
    rows = paper.rows if paper else []
    return {
        "fid": [(row.passes, row.fid) for row in rows if row.fid and report.protocol.features == "inception"],
        "clip": [(row.passes, row.clip) for row in rows if row.clip is not None],
    }


def frechet_name(report: EvaluationReport) -> str:
    """Return the column name of the Frechet distance: FID only with Inception features, else FD."""
    protocol = report.protocol
    if protocol.features != "inception":
        return "FD"
    name = "FID" if protocol.images == 50_000 else f"FID-{protocol.images / 1000:g}k"
    return f"{name} (val)" if protocol.validation else name


def columns(report: EvaluationReport) -> list[tuple[str, Callable[[EvaluationRow], str]]]:
    """Return the heading and the text function of every column that is not empty."""
    few = {
        "fid": frechet_name(report),
        "sfid": "s" + frechet_name(report),
        "kid": "KID x1000",
        "isc": "IS",
        "precision": "precision",
        "recall": "recall",
        "class_accuracy": "class accuracy",
        "clip": "CLIP",
    }
    scales = {"kid": (1000, 1), "class_accuracy": (100, 1), "clip": (1, 4), "precision": (1, 3), "recall": (1, 3)}

    def shown(name: str) -> Callable[[EvaluationRow], str]:
        scale, digits = scales.get(name, (1, 2))
        unit = " %" if name == "class_accuracy" else ""
        return lambda row: _pm(getattr(row, name), scale, digits) + unit if getattr(row, name) else ""

    found: list[tuple[str, Callable[[EvaluationRow], str]]] = [
        ("checkpoint", lambda row: row.name),
        ("window", lambda row: str(row.window)),
        ("passes", lambda row: f"{row.passes:,.1f} ± {row.passes_std:.1f}" if row.passes_std else f"{row.passes:,g}"),
        ("fewer", lambda row: f"{row.reduction:.0%}"),
        ("ms/image", lambda row: f"{row.milliseconds:,.0f}"),
    ]
    if report.measured("images_per_second"):
        found.append(("images/s", lambda row: "" if row.images_per_second is None else f"{row.images_per_second:,.3g}"))
    if report.measured("bits"):
        found += [
            ("bits/code", lambda row: "" if row.bits is None else f"{row.bits:.3f}"),
            ("window costs", lambda row: f"{row.window_costs:+.1%}" if row.window_costs else ""),
        ]
    if report.measured("gap_closed"):
        found.append(("gap closed", lambda row: "" if row.gap_closed is None else f"{row.gap_closed:.0%}"))
    return found + [(few[name], shown(name)) for name in SCORES if report.measured(name)]


def _pm(score: Score, scale: float, digits: int) -> str:
    spread = "" if score.std is None else f" ± {score.std * scale:.{digits}f}"
    return f"{score.mean * scale:.{digits}f}{spread}"


def table(report: EvaluationReport) -> list[list[str]]:
    """Return the heading, the report's rows, and the published rows of the recipe; † marks incomparable ones.

    A published FID is never put into a column of distances from another network.
    """
    found = columns(report)
    names = [name for name, _ in found]
    rows = [names] + [[text(row) for _, text in found] for row in report.rows]
    paper = paper_of(report)
    mark = "†" if report.differences else ""
    for published in paper.rows if paper else []:
        cells = {
            "checkpoint": f"published{mark}",
            "window": str(published.window),
            "passes": f"{published.passes:,}",
            "fewer": f"{1 - published.passes / max(r.passes for r in paper.rows):.0%}" if paper else "",
            "ms/image": f"{published.seconds * 1000:,.0f}†" if published.seconds else "",
        }
        scores = {}
        if published.fid is not None and report.protocol.features == "inception":
            scores[frechet_name(report)] = f"{published.fid:.2f}{mark}"
        if published.clip is not None:
            scores["CLIP"] = f"{published.clip:.3f}{mark}"
        if scores.keys() & set(names):
            cells |= scores
            rows.append([cells.get(name, "") for name in names])
    return rows


def summary(report: EvaluationReport) -> list[str]:
    """Return sentences that compare each checkpoint with the baseline, computed from the rows."""
    if report.baseline is None:
        return []
    widest = report.rows[0].window
    name = frechet_name(report) if report.protocol.features == "inception" else "Frechet distance"
    others = dict.fromkeys(row.checkpoint for row in report.rows if row.checkpoint != report.baseline)
    lines = []
    for other in others:
        before, after = report.row(report.baseline, widest), report.row(other, widest)
        kept = [f"bits {after.bits / before.bits - 1:+.1%}"] if before.bits and after.bits else []
        kept += [f"{name} {before.fid.mean:.2f} -> {after.fid.mean:.2f}"] if before.fid and after.fid else []
        kept += [f"CLIP score {before.clip.mean:.4f} -> {after.clip.mean:.4f}"] if before.clip and after.clip else []
        lines.append(f"**{other}** against {report.baseline}, next-token kept: {', '.join(kept)}.")
        for row in report.rows:
            if row.checkpoint != other or row.window == widest or row.mode != "planned" or row.lookahead:
                continue
            base = report.row(report.baseline, row.window)
            said = [f"closes {row.gap_closed:.0%} of the gap in bits"] if row.gap_closed is not None else []
            said += [f"{name} {base.fid.mean:.2f} -> {row.fid.mean:.2f}"] if base.fid and row.fid else []
            said += [f"CLIP score {base.clip.mean:.4f} -> {row.clip.mean:.4f}"] if base.clip and row.clip else []
            if base.class_accuracy and row.class_accuracy:
                said.append(f"class accuracy {base.class_accuracy.mean:.1%} -> {row.class_accuracy.mean:.1%}")
            lines.append(f"At window {row.window}, {row.reduction:.0%} fewer passes: {', '.join(said)}.")
    return lines


def notes(report: EvaluationReport) -> list[str]:
    """Return sentences on how to read the table and how it was measured."""
    protocol = report.protocol
    environment = ", ".join(f"{key} {value}" for key, value in report.environment.items())
    before = in_pixels(protocol.generated_size).removesuffix(" px")
    resized = f", resized from {before} (bicubic, as LlamaGen does)" if protocol.size != protocol.generated_size else ""
    seeds = f"seed{'s' * (len(protocol.seeds) > 1)} {', '.join(map(str, protocol.seeds))}"
    lines = [
        f"Generated: {protocol.images:,} images a row and seed ({seeds}), {protocol.conditions}, "
        f"{in_pixels(protocol.size)}{resized}, {protocol.dtype}; guidance {protocol.guidance:g}, "
        f"temperature {protocol.temperature:g}, top-k {protocol.top_k}, top-p {protocol.top_p:g}.",
    ]
    if protocol.reference:
        over = "" if protocol.reference_images is None else f", {protocol.reference_images:,} images"
        lines.append(
            f"Compared with: {protocol.reference}{over} (sha256 {(protocol.reference_checksum or '')[:8]}), by "
            f"features of {protocol.features} (weights' sha256 {(protocol.features_weights or '')[:8]}), through "
            "torch-fidelity."
        )
    lines += [f"**{warning}**" for warning in report.warnings]
    paper = paper_of(report)
    if paper:
        lines.append(f"Published: {paper.source}.")
    if report.differences:
        lines.append(f"† Not comparable with the published numbers: {'; '.join(report.differences)}.")
    if paper and any(row.seconds for row in paper.rows):
        lines.append("† Published times are of another machine.")
    if report.held_out:
        lines += [
            f"bits/code is exact: mean -log2 p of held-out codes ({report.held_out}) under that window's mask, without "
            "guidance. Window costs: bits above the checkpoint's own next-token bits.",
        ]
    if any(row.lookahead for row in report.rows):
        lines.append(
            "Lookahead: the same images as without it, up to rounding; ± of passes: standard deviation over images."
        )
    if report.measured("gap_closed"):
        lines.append(
            f"Gap closed: of the bits that {report.baseline} loses at that window against its own next-token bits, the "
            "share this one does not lose."
        )
    if report.measured("class_accuracy"):
        lines.append(
            f"Class accuracy: share of images that the classifier ({report.features_accuracy:.1%} right on held-out "
            "ones) names as the class they were generated for."
        )
    if report.measured("kid"):
        lines.append(
            "KID is unbiased for independent draws; classes in turn make it a little negative where nothing differs."
        )
    if len(protocol.seeds) > 1:
        lines.append("±: standard deviation over seeds.")
    else:
        lines.append(
            "±: standard error from one seed's images. FID: leaving out each tenth in turn; KID: spread of subsets; "
            "IS: its ten splits; shares: binomial; sFID: none."
        )
    lines.append(
        "ms/image: median of three to nine images, the same for every row, each generated alone, windows and "
        "checkpoints taking turns"
        + ("; images/s: one process at the recipe's batch size." if report.measured("images_per_second") else ".")
    )
    lines += [f"{name}: {origin}." for name, origin in report.checkpoints.items()]
    return [*lines, f"{environment}."]


def markdown_table(report: EvaluationReport) -> list[str]:
    heading, *rows = table(report)
    return ["| " + " | ".join(row) + " |" for row in [heading, ["---"] * len(heading), *rows]]


def markdown(report: EvaluationReport) -> str:
    """Return the report as Markdown."""
    return "\n".join(
        [
            f"# {report.recipe['name']}: windows and what they cost",
            "",
            *markdown_table(report),
            "",
            *(f"- {line}" for line in summary(report)),
            "",
            "![Quality against passes and time](pareto.png)",
            "",
            "![Samples](samples.png)",
            "",
            "## How to read it",
            "",
            *(f"- {line}" for line in notes(report)),
            "",
        ]
    )


def log_to_wandb(report: EvaluationReport, pictures: Iterable[Path]) -> None:
    """Log the table and pictures as one W&B run, online or offline by the recipe's `log` section."""
    from zipar_train.recipe.load import parse
    from zipar_train.training.wandb_tracking import start

    recipe = parse(report.recipe, where="the report's recipe")
    run = start(recipe, "evaluate", config={"environment": report.environment, "dtype": report.protocol.dtype})
    if run is None:
        return
    flat = [_flat(row) for row in report.rows]
    for picture in pictures:
        with Image.open(picture) as image:
            run.log_image(picture.stem, [image.copy()])
    table = partial(run.table, "evaluation", list(flat[0]), [list(row.values()) for row in flat])
    run.finish(last={"table": table})


def _flat(row: EvaluationRow) -> dict[str, float | str | None]:
    """Return a row as a flat dictionary, with each score split into mean and standard deviation."""
    flat: dict[str, float | str | None] = {}
    for key, value in row.model_dump().items():
        mean, std = (value["mean"], value["std"]) if isinstance(value, dict) else (value, None)
        flat |= {key: mean, f"{key}_std": std} if key in SCORES else {key: value}
    return flat

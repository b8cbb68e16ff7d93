"""How the evidence is told: Markdown tables between marks in docs/evidence.md, and the plot."""

import re
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from measured import provenance

from zipar_train.io.figures import plt, write_figure
from zipar_train.io.files import make_folder, write_atomic

DOCS = Path(__file__).parents[2] / "docs"
PICTURES = DOCS / "evidence"
WINDOWS = [14, 7, 4, 3, 2, 1]
VALIDATION = "seed 0, 2,000 validation images"
UNTUNED, CONTROL, TUNED = "untuned", "control: one more epoch, next-token", "one epoch, mixed windows"
Found = dict[tuple[str, str, int], list[dict[str, Any]]]  # model, mode of drawing, window: a row for each seed


def write(
    name: str, folder: Path, lines: list[str], words: str, *, step: str | None = None, results: Iterable[str] = ()
) -> None:
    """Print a table, write it to a folder, and put it between its marks in docs/evidence.md.

    Args:
        words: Seeds and images.
        step: The step that makes the table, if it has another name.
        results: Names of the results that it shows, see `measured`.
    """
    text = "\n".join([*lines, "", f"`scripts/evidence/run {step or name}`; {words}; {provenance(results)}."])
    print(f"\n{text}\n", flush=True)
    make_folder(folder)
    write_atomic(folder / f"{name}.md", f"{text}\n".encode())
    page = DOCS / "evidence.md"
    if page.is_file():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        found, times = marked.subn(lambda match: f"{match[1]}{text}\n{match[2]}", page.read_text())
        assert times == 1, f"{page} has no place for {name}"
        write_atomic(page, found.encode())


def slug(words: str) -> str:
    return re.sub("[^a-z0-9]+", "-", words.lower()).strip("-")


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]


def closed(bits: float, untuned: float, limit: float) -> float | None:
    """Return the share of the closable bits, those of the untuned model above the limit, that are no longer lost.

    None if less than 0.1 % of the limit is closable.
    """
    closable = untuned - limit
    return (untuned - bits) / closable if closable > 0.001 * limit else None


def pm(values: list[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "-"
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def picture(found: Found) -> None:
    """Bits and Frechet distance against passes, bars over seeds."""
    make_folder(PICTURES)
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for axis, told, title in (
            (axes[0], lambda row: row["bits"], "held-out bits a code"),
            (axes[1], lambda row: row["fid"]["mean"], "Frechet distance of what is drawn"),
        ):
            for (name, mode), colour, style in (
                ((UNTUNED, "planned"), "#8a8a8a", "o-"),
                ((CONTROL, "planned"), "#c0573e", "o-"),
                ((TUNED, "planned"), "#2f7f9f", "o-"),
                ((UNTUNED, "adaptive"), "#8a8a8a", "s:"),
                ((TUNED, "adaptive"), "#2f7f9f", "s:"),
            ):
                rows = [found[name, mode, w] for w in WINDOWS if (name, mode, w) in found]
                if any(told(row) is None for each in rows for row in each):
                    continue
                values = [[told(row) for row in each] for each in rows]
                label = name if mode == "planned" else f"{name}, adaptive"
                axis.errorbar(
                    [mean(row["passes"] for row in each) for each in rows],
                    [mean(v) for v in values],
                    [stdev(v) if len(v) > 1 else 0 for v in values],
                    fmt=style,
                    color=colour,
                    ms=4,
                    lw=1.6,
                    capsize=2,
                    label=label,
                )
            passes = {w: found[TUNED, "planned", w][0]["passes"] for w in WINDOWS}
            axis.set_xscale("log")
            axis.set_xticks(list(passes.values()), [f"{p:.0f}\n({w})" for w, p in passes.items()])
            axis.minorticks_off()
            axis.grid(alpha=0.2)
            axis.set(
                xlabel="forward passes an image, and the window that takes them", ylabel=f"{title}\n(lower is better)"
            )
        axes[1].set_yscale("log")
        axes[1].set_yticks(ticks := [0.2, 0.3, 0.5, 1, 2, 3, 5], [f"{tick:g}" for tick in ticks])
        axes[1].minorticks_off()
        axes[1].legend(frameon=False, fontsize=9)
        write_figure(figure, PICTURES / "headline.png", dpi=150)

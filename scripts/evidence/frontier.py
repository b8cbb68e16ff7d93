"""Quality against forward passes and against milliseconds, for every way of decoding: windows, lookahead, adaptive."""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib import ticker
from measured import measured, results
from models import DIGITS, MNIST_14, OUT, Dataset, evaluated, sets
from natural_images import IMAGENETTE, distances
from tables import PICTURES, TUNED, UNTUNED

from zipar_train import load
from zipar_train.evaluation.likelihood import milliseconds
from zipar_train.io.figures import plt, write_figure
from zipar_train.io.files import make_folder

LOOKAHEAD, BATCHES = (0, 32), (1, 32)
SEED, ROUNDS, COUNTED = 0, 5, 100  # COUNTED: images whose passes are averaged
DRAWN = 2000  # images of MNIST for a distance
COLOURS = {UNTUNED: "#8a8a8a", TUNED: "#2f7f9f"}
Distances = Callable[[Dataset], dict[tuple[str, str, int], float]]
Point = dict[str, Any]  # model, mode, window, lookahead, passes, fid, milliseconds by batch size


def points(dataset: Dataset, distances: Distances) -> list[Point]:
    """Measure each way of decoding the untuned and the tuned model, seed 0; results are kept.

    Lookahead changes no image, so its quality is that of the same window without it.

    Args:
        distances: Returns the Frechet distance by model, mode and window.
    """
    return measured(name_of(dataset), partial(measure, dataset, distances))


def name_of(dataset: Dataset) -> str:
    return f"frontier of {dataset.name}"


def digit_distances(dataset: Dataset) -> dict[tuple[str, str, int], float]:
    """Return the Frechet distance to validation images by model, mode and window."""
    runs = {UNTUNED: dataset.base(SEED), TUNED: dataset.tuned(SEED)}
    name = f"frontier-{dataset.name}-scores"
    arguments = ["--compare", runs[UNTUNED], "--windows", ",".join(map(str, dataset.windows)), "--adaptive"]
    few = sets(f"evaluate.images={DRAWN}") if dataset is MNIST_14 else []
    rows = evaluated(name, runs[TUNED], *arguments, *few, "--out", OUT / name, recipe=dataset.recipe)
    words = {run.name: model for model, run in runs.items()}
    return {(words[row["checkpoint"]], row["mode"], row["window"]): row["fid"]["mean"] for row in rows}


def measure(dataset: Dataset, distances: Distances) -> list[Point]:
    scores, runs = distances(dataset), {UNTUNED: dataset.base(SEED), TUNED: dataset.tuned(SEED)}
    generators = {model: load(run) for model, run in runs.items()}
    found: list[Point] = []
    ways: dict[tuple[int, int], Any] = {}
    decoding = [(window, "planned", lookahead) for lookahead in LOOKAHEAD for window in dataset.windows]
    decoding += [(window, "adaptive", 0) for window in dataset.windows[1:]]
    for model, (window, mode, lookahead) in product(runs, decoding):
        generate = partial(generators[model].generate, window=window, mode=mode, lookahead=lookahead, pixels=False)
        for batch in BATCHES:
            ways[len(found), batch] = partial(generated, generate, labels(batch))
        passes = generate(labels(COUNTED), seed=SEED).passes.double().mean().item()
        fid = scores[model, mode, window]
        point = {"model": model, "window": window, "mode": mode, "lookahead": lookahead}
        found.append(point | {"passes": passes, "fid": fid, "milliseconds": {}})
    for (at, batch), time in milliseconds(ways, rounds=ROUNDS, seconds=900).items():
        found[at]["milliseconds"][str(batch)] = time / batch
    return found


def labels(images: int) -> list[int]:
    return [number % 10 for number in range(images)]


def generated(generate: Any, classes: list[int], turn: int) -> None:
    generate(classes, seed=turn)


def line(found: list[Point], model: str, mode: str, lookahead: int) -> list[Point]:
    return [p for p in found if (p["model"], p["mode"], p["lookahead"]) == (model, mode, lookahead)]


def draw(found: dict[str, list[Point]], path: Path) -> None:
    """Draw one row of panels for each dataset: the distance against passes, and against time at each batch size."""
    panels = [("forward passes per image", lambda point: point["passes"])]
    panels += [
        (f"milliseconds per image, batch size {batch}", lambda point, b=str(batch): point["milliseconds"][b])
        for batch in BATCHES
    ]
    ways = [("planned", 0, "o-", "windows"), ("adaptive", 0, "s:", "adaptive windows")]
    ways += [("planned", ahead, "D--", f"windows, lookahead {ahead}") for ahead in LOOKAHEAD if ahead]
    make_folder(path.parent)
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            len(found), len(panels), figsize=(12, 3.4 * len(found)), layout="constrained", squeeze=False
        )
        for (name, of_dataset), across in zip(found.items(), axes, strict=True):
            for axis, (title, told) in zip(across, panels, strict=True):
                for (model, colour), (mode, ahead, style, words) in product(COLOURS.items(), ways):
                    each = line(of_dataset, model, mode, ahead)
                    x, y = [told(point) for point in each], [point["fid"] for point in each]
                    label = f"{model}: {words}"
                    axis.plot(x, y, style, color=colour, ms=4, lw=1.4, label=label)
                    if mode == "planned" and not (model == UNTUNED and ahead):
                        for point, at in zip(each, x, strict=True):
                            where = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 7}
                            axis.annotate(str(point["window"]), (at, point["fid"]), color=colour, **where)
                axis.set(xscale="log", yscale="log", xlabel=title)
                for scale in (axis.xaxis, axis.yaxis):
                    scale.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
                    scale.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
                    scale.set_minor_locator(ticker.NullLocator())
                axis.grid(alpha=0.2)
            across[0].set_ylabel(f"{name}\nFrechet distance (lower is better)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        write_figure(figure, path, dpi=130)


def frontier(folder: Path | None = None) -> None:
    """Measure digits, MNIST and Imagenette as far as they are not, and draw them.

    Args:
        folder: What natural_images.py describes; None: Imagenette only if it has been measured.
    """
    found = {"digits, 8 x 8": points(DIGITS, digit_distances), "MNIST, 14 x 14": points(MNIST_14, digit_distances)}
    if folder or name_of(IMAGENETTE) in results():
        found["Imagenette, 24 x 24"] = points(IMAGENETTE, partial(distances, folder=folder))
    draw(found, PICTURES / "frontier.png")

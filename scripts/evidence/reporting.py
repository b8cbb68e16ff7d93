"""Results on fresh images, three seeds: the headline, bits at every window, and the shortest schedules."""

import shutil
from statistics import mean
from typing import Any

from limits import bits_on, limit
from models import MNIST, MNIST_14, OUT, SEEDS, evaluated, sets
from tables import CONTROL, PICTURES, TUNED, UNTUNED, WINDOWS, Found, closed, picture, pm, slug, table, write

FRESH, FRESH_WORDS = MNIST / "fresh.json", "10,000 fresh images"
ONE = "zipar.windows={14: 1, 7: 1, 4: 1, 2: 1, 1: 1}"
SHORTEST = {
    "row 0 completed first": [ONE],
    "rows overlapping from the first": [ONE, "zipar.first_row=overlapping"],
}


def headline() -> None:
    """Base, control and tuned models: every window, planned and adaptive."""
    found: Found = {}
    for seed in SEEDS:
        base, control, tuned = (make(seed) for make in (MNIST_14.base, MNIST_14.control, MNIST_14.tuned))
        names = {base.name: UNTUNED, control.name: CONTROL, tuned.name: TUNED}
        fresh = [*sets(f"data.val={FRESH}", f"evaluate.seeds=[{seed}]"), "--out", OUT / f"fresh-{seed}"]
        rows = evaluated(f"control-{seed}", control, "--compare", base, "--windows", "14,4,2", *fresh)
        rows = [row for row in rows if row["checkpoint"] == control.name]
        rows += evaluated(f"fresh-{seed}", tuned, "--compare", base, "--released", "--adaptive", *fresh)
        for row in rows:
            found.setdefault((names[row["checkpoint"]], row["mode"], row["window"]), []).append(row)

    def cells(name: str, mode: str, window: int) -> list[str]:
        rows = found[name, mode, window]
        passes = mean(row["passes"] for row in rows)
        bits = [pm([row["bits"] for row in rows], 4)] if mode == "planned" else []  # bits are of a mask
        scores = [pm([row[score]["mean"] for row in rows], 3) for score in ("fid", "precision", "recall")]
        return [
            name,
            str(window),
            f"{passes:.1f}" if mode == "adaptive" else f"{passes:.0f}",
            *bits,
            *scores,
            pm([100 * row["class_accuracy"]["mean"] for row in rows], 1),
        ]

    head = [
        "model",
        "window",
        "passes",
        "bits a code",
        "FD",
        "precision",
        "recall",
        "class accuracy, %",
    ]
    models, words = [UNTUNED, CONTROL, TUNED], f"seeds 0, 1, 2, {FRESH_WORDS}, 5,000 generated images"
    told = [(name, window) for name in models for window in WINDOWS if (name, "planned", window) in found]
    write("headline", OUT, table(head, [cells(name, "planned", window) for name, window in told]), words)
    released = [cells(models[0], "released", window) for window in WINDOWS[1:]]
    write("released", OUT, table([*head[:3], *head[4:]], released), words, step="headline")
    adaptive = [cells(name, "adaptive", window) for name in (models[0], models[2]) for window in WINDOWS[1:]]
    write("adaptive", OUT, table(["model", "smallest window", *head[2:3], *head[4:]], adaptive), words, step="headline")
    picture(found)
    shutil.copyfile(OUT / f"fresh-{SEEDS[0]}" / "samples.png", PICTURES / "samples.png")


def windows() -> None:
    """Bits at every window from half a row down, trained or not, and the share of the closable bits that is closed."""
    wanted = [14, 7, 6, 5, 4, 3, 2, 1]
    untuned, tuned_bits = (
        [bits_on(FRESH, model(seed), wanted) for seed in SEEDS] for model in (MNIST_14.base, MNIST_14.tuned)
    )
    lowest = {window: limit(MNIST_14, window)["bits"] for window in WINDOWS}
    rows = []
    for window in wanted:
        pairs = list(zip(untuned, tuned_bits, strict=True))
        shares = [closed(after[window], before[window], lowest[window]) for before, after in pairs if window in lowest]
        rows.append(
            [
                str(window),
                pm([bits[window] for bits in untuned], 4),
                pm([bits[window] for bits in tuned_bits], 4),
                f"{lowest[window]:.4f}" if window in lowest else "",
                *(pm([100 * (each[at][window] / each[0][14] - 1) for each in pairs], 2) for at in (0, 1)),
                pm([100 * share for share in shares if share is not None], 0),
            ]
        )
    head = ["window", "untuned, bits", "tuned, bits", "limit, bits"]
    head += ["untuned, above next-token, %", "tuned, above it, %", "closed of the closable, %"]
    write("windows", OUT, table(head, rows), f"seeds 0, 1, 2 (limits: 0), {FRESH_WORDS}")


def shortest() -> None:
    """The shortest schedules: window 1 with row 1 starting before row 0 is complete, beside others as short."""
    rows = []
    for words, overrides in SHORTEST.items():
        found: dict[int, list[dict[str, Any]]] = {}
        for seed in SEEDS:
            run = MNIST_14.tuned(seed, *overrides, name=f"shortest-{slug(words)}")
            name = f"shortest-{slug(words)}-{seed}"
            more = [*sets(*overrides, f"data.val={FRESH}", f"evaluate.seeds=[{seed}]"), "--out", OUT / name]
            for row in evaluated(name, run, "--windows", "3,2,1", *more):
                found.setdefault(row["window"], []).append(row)
        rows += [
            [
                words,
                str(window),
                f"{each[0]['passes']:.0f}",
                pm([row["bits"] for row in each], 4),
                pm([row["fid"]["mean"] for row in each], 3),
                pm([100 * row["class_accuracy"]["mean"] for row in each], 1),
            ]
            for window, each in found.items()
        ]
    head = ["trained and generated with", "window", "passes", "bits a code", "FD", "class accuracy, %"]
    write("shortest", OUT, table(head, rows), f"seeds 0, 1, 2, {FRESH_WORDS}, 5,000 generated images")

"""Results on test images: the headline of three seeds, and bits at every window."""

import shutil
from statistics import mean

from models import MNIST, OUT, SEEDS, base, control, evaluated, sets, tuned
from tables import CONTROL, PICTURES, TUNED, UNTUNED, WINDOWS, Found, picture, pm, share, table, write
from tqdm import tqdm

from zipar_train import load
from zipar_train.data.loader import ShardLoader
from zipar_train.evaluation.likelihood import bits_per_code


def headline() -> None:
    """Base, control and tuned models: every window, planned and adaptive."""
    found: Found = {}
    for seed in SEEDS:
        names = {base(seed).name: UNTUNED, control(seed).name: CONTROL, tuned(seed).name: TUNED}
        test = [*sets(f"data.val={MNIST / 'test.json'}", f"evaluate.seeds=[{seed}]"), "--out", OUT / f"test-{seed}"]
        rows = evaluated(f"control-{seed}", control(seed), "--compare", base(seed), "--windows", "14,4,2", *test)
        rows = [row for row in rows if row["checkpoint"] == control(seed).name]
        rows += evaluated(f"test-{seed}", tuned(seed), "--compare", base(seed), "--released", "--adaptive", *test)
        for row in rows:
            found.setdefault((names[row["checkpoint"]], row["mode"], row["window"]), []).append(row)

    def cells(name: str, mode: str, window: int) -> list[str]:
        rows = found[name, mode, window]
        passes = mean(row["passes"] for row in rows)
        bits, gap = [], []
        if mode == "planned":  # bits are of a mask
            bits = [pm([row["bits"] for row in rows], 4)]
            gap = [pm([100 * row["gap_closed"] for row in rows if row["gap_closed"] is not None], 1)]
        scores = [pm([row[score]["mean"] for row in rows], 3) for score in ("fid", "precision", "recall")]
        return [
            name,
            str(window),
            f"{passes:.1f}" if mode == "adaptive" else f"{passes:.0f}",
            *bits,
            *gap,
            *scores,
            pm([100 * row["class_accuracy"]["mean"] for row in rows], 1),
        ]

    head = [
        "model",
        "window",
        "passes",
        "bits a code",
        "gap closed, %",
        "FD",
        "precision",
        "recall",
        "class accuracy, %",
    ]
    models = [UNTUNED, CONTROL, TUNED]
    told = [(name, window) for name in models for window in WINDOWS if (name, "planned", window) in found]
    write("headline", OUT, table(head, [cells(name, "planned", window) for name, window in told]))
    released = [cells(models[0], "released", window) for window in WINDOWS[1:]]
    write("released", OUT, table([*head[:3], *head[5:]], released))
    adaptive = [cells(name, "adaptive", window) for name in (models[0], models[2]) for window in WINDOWS[1:]]
    write("adaptive", OUT, table(["model", "smallest window", *head[2:3], *head[5:]], adaptive))
    picture(found)
    shutil.copyfile(OUT / f"test-{SEEDS[0]}" / "samples.png", PICTURES / "samples.png")


def windows() -> None:
    """Bits at every window from half a row down, trained or not: what tuning leaves of the gap."""
    test, wanted = ShardLoader(MNIST / "test.json", batch_size=500), [14, 7, 6, 5, 4, 3, 2]
    bits: dict[tuple[str, int], list[float]] = {}
    for seed in SEEDS:
        for name, run in ((UNTUNED, base(seed)), (TUNED, tuned(seed))):
            generator = load(run)
            for window in tqdm(wanted, desc=run.name, unit="windows"):
                found = bits_per_code(generator.inference_family, generator.plan(window), test, images=5000)
                bits.setdefault((name, window), []).append(found)
    rows = []
    for window in wanted:
        each = list(zip(bits[UNTUNED, 14], bits[UNTUNED, window], bits[TUNED, window], strict=True))
        shares = [share(after, before, whole) for whole, before, after in each]
        rows.append(
            [
                str(window),
                pm(bits[UNTUNED, window], 4),
                pm(bits[TUNED, window], 4),
                *(pm([100 * (value[at] / value[0] - 1) for value in each], 2) for at in (1, 2)),
                pm([100 * one for one in shares if one is not None], 0),
            ]
        )
    head = ["window", "untuned, bits", "tuned, bits", "untuned, above next-token, %", "tuned, above it, %", "closed, %"]
    write("windows", OUT, table(head, rows))

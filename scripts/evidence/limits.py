"""The limit of each window: the bits of a model that is trained for that window alone, until it stops improving.

No tuning can be expected to do better: a code that is generated without some of its neighbours has less context. What
the untuned model's bits are above the limit is called closable.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from measured import measured
from models import DIGITS, MNIST_14, OUT, Dataset
from tables import table, write
from tqdm import tqdm

from zipar_train import load
from zipar_train.data.loader import ShardLoader
from zipar_train.evaluation.likelihood import bits_per_code
from zipar_train.run.metrics_csv import validations

SCRATCH = 2  # the window of the run from scratch
PATIENCE, LEAST, MOST = 3, 1e-3, 60  # epochs without an improvement by this share of the bits, and epochs at most


def limit(dataset: Dataset, window: int, *, scratch: bool = False) -> dict[str, Any]:
    """Return the limit of a window, seed 0: see `limit_run`.

    Returns:
        `curve`: validation bits after each epoch. `bits`: those of the best epoch, on the images that results are
        reported on.
    """

    def measure() -> dict[str, Any]:
        run, curve = limit_run(dataset, window, scratch=scratch)
        return {"curve": curve, "bits": bits_on(dataset.reported, run / "checkpoints" / "best.ckpt", [window])[window]}

    return measured(name_of(dataset, window, scratch=scratch), measure)


def name_of(dataset: Dataset, window: int, *, scratch: bool = False) -> str:
    return f"limit of {dataset.name} at window {window}{', from scratch' * scratch}"


def bits_on(shards: Path, run: Path, windows: Iterable[int]) -> dict[int, float]:
    """Return the bits of a model at several windows on all images of a shard set."""
    generator, images = load(run), ShardLoader(shards, batch_size=250)
    return {
        window: bits_per_code(generator.inference_family, generator.plan(window), images)
        for window in tqdm(windows, desc=f"bits of {run.name}", unit="windows")
    }


def limit_run(dataset: Dataset, window: int, *, scratch: bool = False) -> tuple[Path, list[float]]:
    """Train under one window until validation bits stop improving, from the untuned model of seed 0.

    The learning rate is constant and the weights are averaged, so that a run can go on for as long as it improves; any
    other schedule needs to know its end.

    Args:
        scratch: Start from a model that was trained from scratch as the untuned one was, but under the window.

    Returns:
        The run, whose best.ckpt has the fewest validation bits, and the bits after each epoch.
    """
    only, name = f"zipar.windows={{{window}: 1}}", f"limit-{window}{'-scratch' * scratch}"
    start = dataset.base(0, only, name=f"scratch-{window}") if scratch else dataset.base(0)
    run = dataset.run(0, name)
    while not stopped(curve := curve_of(run, window)) and len(curve) < MOST:
        dataset.tuned(
            0,
            *(only, "tune.distill=0", f"data.val_windows=[{window}]"),
            *("optim.lr=1e-3", "optim.schedule=constant", "optim.warmup=0", f"optim.ema_decay={dataset.average}"),
            f"checkpoint_monitor=val/bits_w{window}",
            f"trainer.max_epochs={(len(curve) // PATIENCE + 1) * PATIENCE}",
            name=name,
            start=start,
            change="trainer.max_epochs",
        )
    return run, curve


def curve_of(run: Path, window: int) -> list[float]:
    """Return the validation bits after each epoch of a run; empty before its first."""
    return [metrics[f"val/bits_w{window}"] for metrics in validations(run).values()]


def stopped(curve: list[float]) -> bool:
    """Return True if the last PATIENCE values are no improvement on those before by LEAST."""
    before, last = curve[:-PATIENCE], curve[-PATIENCE:]
    return bool(before) and min(last) > min(before) * (1 - LEAST)


def limits() -> None:
    """Write the limits of digits and MNIST: the fewest bits, and the epochs that they took."""
    cases = [("digits", DIGITS, window, False) for window in DIGITS.windows]
    cases += [("MNIST", MNIST_14, window, False) for window in MNIST_14.windows]
    cases += [("MNIST, from scratch", MNIST_14, SCRATCH, True)]
    rows = []
    for words, dataset, window, scratch in cases:
        curve = limit(dataset, window, scratch=scratch)["curve"]
        rows.append([words, str(window), f"{min(curve):.4f}", f"{curve.index(min(curve)) + 1}"])
    results = [name_of(dataset, window, scratch=scratch) for _, dataset, window, scratch in cases]
    head = ["images", "window", "limit, bits", "epochs"]
    write("limits", OUT, table(head, rows), "seed 0, validation images", results=results)


if __name__ == "__main__":  # some limits only: two can run beside each other
    import sys

    for window in map(int, sys.argv[2].split(",")):
        dataset = {"digits": DIGITS, "mnist": MNIST_14}[sys.argv[1]]
        print(dataset.name, window, limit(dataset, window, scratch="scratch" in sys.argv), flush=True)

"""The limit of each window: the bits of a model that is trained for that window alone, until it stops improving.

No tuning can be expected to do better: a code that is generated without some of its neighbours has less context. What
the untuned model's bits are above the limit is called closable.
"""

from pathlib import Path

from models import DIGITS, MNIST_14, OUT, Dataset
from tables import table, write

from zipar_train.run.metrics_csv import validations

SCRATCH = 2  # the window of the run from scratch
PATIENCE, LEAST, MOST = 3, 5e-4, 60  # epochs without an improvement by this share of the bits, and epochs at most


def limit(dataset: Dataset, seed: int, window: int, *, scratch: bool = False) -> tuple[Path, list[float]]:
    """Train under one window until validation bits stop improving, from the untuned model.

    The learning rate is constant and the weights are averaged, so that a run can go on for as long as it improves; any
    other schedule needs to know its end.

    Args:
        scratch: Start from a model that was trained from scratch as the untuned one was, but under the window.

    Returns:
        The checkpoint with the fewest validation bits, and the bits after each epoch.
    """
    only = f"zipar.windows={{{window}: 1}}"
    start = dataset.base(seed, only, name=f"scratch-{window}") if scratch else dataset.base(seed)
    for epochs in range(PATIENCE, MOST + 1, PATIENCE):
        run = dataset.tuned(
            seed,
            *(only, "tune.distill=0", f"data.val_windows=[{window}]"),
            *("optim.lr=1e-3", "optim.schedule=constant", "optim.warmup=0", f"optim.ema_decay={dataset.average}"),
            *(f"checkpoint_monitor=val/bits_w{window}", f"trainer.max_epochs={epochs}"),
            name=f"limit-{window}{'-scratch' * scratch}",
            start=start,
            change="trainer.max_epochs",
        )
        curve = [metrics[f"val/bits_w{window}"] for metrics in validations(run).values()]
        if stopped(curve):
            break
    return run / "checkpoints" / "best.ckpt", curve


def stopped(curve: list[float]) -> bool:
    """Return True if the last PATIENCE values are no improvement on those before by LEAST."""
    before, last = curve[:-PATIENCE], curve[-PATIENCE:]
    return bool(before) and min(last) > min(before) * (1 - LEAST)


def limits() -> None:
    """Write the limits of digits and MNIST: the fewest bits, and the epochs that they took."""
    rows = []
    for words, dataset in (("digits", DIGITS), ("MNIST", MNIST_14)):
        for window in dataset.windows:
            curve = limit(dataset, 0, window)[1]
            rows.append([words, str(window), f"{min(curve):.4f}", f"{curve.index(min(curve)) + 1}"])
    curve = limit(MNIST_14, 0, SCRATCH, scratch=True)[1]
    rows.append(["MNIST, from scratch", str(SCRATCH), f"{min(curve):.4f}", f"{curve.index(min(curve)) + 1}"])
    write("limits", OUT, table(["images", "window", "limit, bits", "epochs"], rows), "seed 0, validation images")


if __name__ == "__main__":  # some limits only: two can run beside each other
    import sys

    dataset = {"digits": DIGITS, "mnist": MNIST_14}[sys.argv[1]]
    for window in map(int, sys.argv[2].split(",")):
        found, curve = limit(dataset, 0, window, scratch="scratch" in sys.argv)
        print("LIMIT", dataset.name, window, found, [f"{bits:.4f}" for bits in curve], flush=True)

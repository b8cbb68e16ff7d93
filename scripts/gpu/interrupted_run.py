"""A training run that is killed and resumed: when to kill it, and whether it went on as if nothing had happened.

    python scripts/gpu/interrupted_run.py RUN --tolerance 0.02 --json FILE    # after the run was resumed

The run logs its steps when it begins to write a checkpoint. Killed then, it goes on from the checkpoint before, so that
the steps between the two are made twice: their losses must be the same.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any


def logged(run: Path) -> list[dict[int, dict[str, float]]]:
    """Of each start of a run, the numbers of its training steps as its CSV file has them; steps count from 1."""
    starts = []
    for file in sorted((run / "logs").glob("version_*/metrics.csv"), key=lambda f: int(f.parent.name.split("_")[1])):
        steps: dict[int, dict[str, float]] = {}
        with file.open(newline="") as rows:
            for row in csv.DictReader(rows):
                if row.get("train/loss"):
                    steps[int(row["step"]) + 1] = {name: float(text) for name, text in row.items() if name and text}
        starts.append(steps)
    return starts


def reached(run: Path, step: int) -> bool:
    """Whether a run has logged a step."""
    try:
        return any(max(steps, default=0) >= step for steps in logged(run))
    except (ValueError, OSError):
        return False  # a line that is half written


def lose_newest(run: Path) -> None:
    """Take the newest checkpoint away if an older one is there, as a kill in the middle of writing it does."""
    folder = run / "checkpoints"
    older = sorted(folder.glob("step-*.ckpt"))
    if older:
        older[-1].replace(folder / "last.ckpt")


def validated(run: Path) -> bool:
    """Whether the numbers of a validation were logged."""
    for file in (run / "logs").glob("version_*/metrics.csv"):
        with file.open(newline="") as rows:
            if any(text and name.startswith("val/bits") for row in csv.DictReader(rows) for name, text in row.items()):
                return True
    return False


def speed(run: Path) -> dict[str, Any]:
    """What the newest start of a run logged of its speed: medians over its second half, as the first steps compile."""
    steps = ([steps for steps in logged(run) if steps] or [{}])[-1]
    steady = [steps[step] for step in sorted(steps)[len(steps) // 2 :]]

    def middle(name: str) -> float | None:
        values = [numbers[f"train/{name}"] for numbers in steady if f"train/{name}" in numbers]
        return median(values) if values else None

    names = ("images_per_second", "mfu", "memory_gib", "data_wait")
    return {"steps": len(steps)} | {name: middle(name) for name in names} if steps else {}


def continuity(run: Path) -> dict[str, Any]:
    """Whether a run that was killed and resumed went on.

    Raises:
        ValueError: if the run was not resumed, or no step was made twice, or one is missing.
    """
    starts = [steps for steps in logged(run) if steps]
    if len(starts) < 2:
        raise ValueError(f"{run} has logs of {len(starts)} starts: it was not resumed")
    first, second = starts[-2:]
    twice = sorted(first.keys() & second.keys())
    if not twice:
        raise ValueError(f"{run}: no step was made twice; the first start made {len(first)}, the second {len(second)}")
    last = max(second)
    if missing := set(range(1, last + 1)) - first.keys() - second.keys():
        raise ValueError(f"{run}: step {min(missing)} is in no log")
    losses = {step: (first[step]["train/loss"], second[step]["train/loss"]) for step in twice}
    return {
        "steps": last,
        "steps_made_twice": twice,
        "largest_difference": max(abs(a - b) / abs(a) for a, b in losses.values()),  # as a share of the loss
        "losses": {str(step): pair for step, pair in losses.items()},
        "first_loss": first[min(first)]["train/loss"],
        "last_loss": second[last]["train/loss"],
        "validated": validated(run),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tolerance", type=float, required=True, help="share of a loss that it may differ by")
    parser.add_argument("--json", type=Path, required=True)
    asked = parser.parse_args()
    try:
        told = continuity(asked.run)
    except ValueError as error:
        sys.exit(str(error))
    asked.json.write_text(json.dumps(told, indent=1))
    print(json.dumps(told, indent=1))
    if told["largest_difference"] > asked.tolerance:
        sys.exit(f"a step made twice differs by {told['largest_difference']:.2%} of its loss")
    if not told["validated"]:
        sys.exit("no validation was logged")

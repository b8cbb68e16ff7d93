"""Short runs of the digits' recipes, and what they leave."""

import csv

import torch


def losses(run):
    """step -> train loss, over all logs of a run folder in order."""
    found = {}
    for path in sorted((run / "logs").glob("*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
        for row in csv.DictReader(path.open()):
            if row.get("train/loss"):
                found[int(row["step"])] = float(row["train/loss"])
    return found


def quick(tiny, tmp_path, name, *more):
    return [
        *tiny,
        f"run_dir={tmp_path}/{name}",
        "trainer.log_every_n_steps=1",
        "trainer.max_epochs=2",
        "trainer.check_val_every_n_epoch=1",
        "zipar.windows={8: 1, 4: 1, 2: 1}",
        *more,
    ]


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

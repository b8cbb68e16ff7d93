"""Short runs of the digits' recipes, their data, and what they leave."""

import csv
from pathlib import Path

import torch

from zipar_train.data.manifest import Layout
from zipar_train.data.shards import read_manifest, read_shard, write_shards
from zipar_train.models.restore import read
from zipar_train.recipe.load import load_recipe


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


SHORT = [
    "data.micro_batch_size=4",
    "trainer.limit_train_batches=40",
    "trainer.check_val_every_n_epoch=1",
    "optim.ema_decay=0.9",
    "trainer.val_check_interval=8",
    "trainer.limit_val_batches=4",
    "checkpoint_every=2",
    "checkpoint_keep=2",
    "checkpoint_monitor=val/bits_w2",
]


def same_end(a: Path, b: Path) -> None:
    """Two runs' losses, weights, averages and optimizers are equal to the bit."""
    assert losses(a) == losses(b) and len(losses(a)) > 10
    one, two = read(a), read(b)
    assert states_equal(one.state, two.state)
    assert states_equal(one.extra["current_model_state"], two.extra["current_model_state"])
    optimizers = [saved.extra["optimizer_states"][0]["state"] for saved in (one, two)]
    assert all(torch.equal(optimizers[0][i][k], optimizers[1][i][k]) for i in optimizers[0] for k in optimizers[0][i])
    assert not states_equal(
        one.state, {k.removeprefix("model."): v for k, v in one.extra["current_model_state"].items()}
    )


def some(shards: Path, folder: Path, count: int) -> Path:
    """The digits' first training images as shards of 100, in a folder."""
    whole = read_manifest(shards / "train.json")
    samples = [s for shard in whole.shards for s in read_shard(shards / "train.json", shard, whole)]
    layout = {k: v for k, v in whole.model_dump().items() if k not in ("shards", "skipped")}
    write_shards(samples[:count], folder / "train.json", layout=Layout(**layout), per_shard=100)
    return folder


LORA = "tune.lora={rank: 4, alpha: 8, targets: [q_proj, v_proj, down_proj]}"


def tuned(tiny, tmp_path, base, name, *more):
    return load_recipe("digits", quick(tiny, tmp_path, name, f"model.weights={base}", *more))

"""What else was tried for the one epoch: seed 0, validation images, each trial one change to the recipe."""

import json
import re
from typing import Any

from models import MNIST_14

from zipar_train.run.metrics_csv import validations

WINDOWS = [14, 7, 4, 3, 2, 1]
Trial = tuple[str, dict[str, Any], list[str]]  # words, arguments of variants.Variant, overrides of the recipe
TRIALS: list[Trial] = [
    ("the recipe", {}, []),
    ("windows in turn, narrow ones mostly early", {"order": "narrow first"}, []),
    ("windows in turn, narrow ones mostly late", {"order": "narrow last"}, []),
    ("window 2 twice as often", {}, ["zipar.windows={14: 1, 7: 1, 4: 1, 2: 2}"]),
    ("window 2 twice as often, no window 7", {}, ["zipar.windows={14: 1, 4: 1, 2: 2}"]),
    ("window 3 in place of 7", {}, ["zipar.windows={14: 1, 4: 1, 3: 1, 2: 1}"]),
    ("with window 1", {}, ["zipar.windows={14: 1, 7: 1, 4: 1, 2: 1, 1: 1}"]),
    ("codes weighted by missing context, up to 2", {"context": 1}, []),
    ("codes weighted by missing context, up to 5", {"context": 4}, []),
    ("teacher's share 1, .8, .5, .2 from window 14 to 2", {"shares": {14: 1.0, 7: 0.8, 4: 0.5, 2: 0.2}}, []),
    ("teacher's share .2, .5, .8, 1 from window 14 to 2", {"shares": {14: 0.2, 7: 0.5, 4: 0.8, 2: 1.0}}, []),
    ("narrow windows taught by the model itself at 14", {"own": True}, []),
    ("learning rate x 0.7 for each layer down", {"layer_decay": 0.7}, []),
    ("learning rate x 1.4 for each layer down", {"layer_decay": 1.4}, []),
    ("learning rate 4e-3", {}, ["optim.lr=4e-3"]),
    ("8 images per step", {}, ["data.micro_batch_size=8"]),
    ("LoRA, rank 16, learning rate 1e-2", {}, ["tune.lora={rank: 16}", "optim.lr=1e-2"]),
    ("two epochs", {}, ["trainer.max_epochs=2"]),
]


def bits_of_trial(words: str, variant: dict[str, Any], overrides: list[str]) -> dict[int, float]:
    """Train a trial as far as it is not, and return its validation bits by window."""
    run = MNIST_14.tuned(
        0,
        *(f"data.val_windows={WINDOWS}", *overrides),
        name=f"tuning-{re.sub('[^a-z0-9]+', '-', words.lower())}",
        variant=json.dumps(variant),
    )
    metrics = list(validations(run).values())[-1]
    return {window: metrics[f"val/bits_w{window}"] for window in WINDOWS}

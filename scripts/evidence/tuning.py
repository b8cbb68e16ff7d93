"""What was tried for the one epoch: seed 0, validation images; each trial changes the recipe in one way."""

import json
from pathlib import Path
from typing import Any

from limits import bits_on, limit
from measured import measured
from models import MNIST, MNIST_14, OUT
from tables import VALIDATION, WINDOWS, closed, slug, table, write

from zipar_train.run.metrics_csv import validations

Trial = tuple[str, dict[str, Any], list[str]]  # words, arguments of variants.Variant, overrides of the recipe
LORA = "tune.lora={rank: 16, alpha: 16, targets: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]}"
AVERAGED = ["optim.schedule=constant", "optim.ema_decay=0.995"]
TRIALS: list[Trial] = [
    ("the recipe", {}, []),
    # windows
    ("window 7 alone", {}, ["zipar.windows={7: 1}"]),
    ("window 4 alone", {}, ["zipar.windows={4: 1}"]),
    ("window 2 alone", {}, ["zipar.windows={2: 1}"]),
    ("window 2 twice as often", {}, ["zipar.windows={14: 1, 7: 1, 4: 1, 2: 2}"]),
    ("window 2 twice as often, without window 7", {}, ["zipar.windows={14: 1, 4: 1, 2: 2}"]),
    ("window 3 in place of 7", {}, ["zipar.windows={14: 1, 4: 1, 3: 1, 2: 1}"]),
    ("with window 1", {}, ["zipar.windows={14: 1, 7: 1, 4: 1, 2: 1, 1: 1}"]),
    ("narrow windows mostly early", {"order": "narrow first"}, []),
    ("narrow windows mostly late", {"order": "narrow last"}, []),
    # loss
    ("codes weighted by missing context, up to 2", {"context": 1}, []),
    ("codes weighted by missing context, up to 5", {"context": 4}, []),
    ("no teacher", {}, ["tune.distill=0"]),
    ("teacher alone", {}, ["tune.distill=1"]),
    ("teacher's share 1, .8, .5, .2 from window 14 to 2", {"shares": {14: 1.0, 7: 0.8, 4: 0.5, 2: 0.2}}, []),
    ("teacher's share .2, .5, .8, 1 from window 14 to 2", {"shares": {14: 0.2, 7: 0.5, 4: 0.8, 2: 1.0}}, []),
    ("narrow windows taught by the model's own window 14", {"own": True}, []),
    # optimizer
    ("learning rate 1e-3", {}, ["optim.lr=1e-3"]),
    ("learning rate 4e-3", {}, ["optim.lr=4e-3"]),
    ("constant learning rate, averaged weights", {}, AVERAGED),
    ("constant learning rate 4e-3, averaged weights", {}, [*AVERAGED, "optim.lr=4e-3"]),
    ("learning rate x 0.7 for each layer down", {"layer_decay": 0.7}, []),
    ("learning rate x 1.4 for each layer down", {"layer_decay": 1.4}, []),
    ("32 images per step", {}, ["data.micro_batch_size=32"]),
    ("8 images per step", {}, ["data.micro_batch_size=8"]),
    ("LoRA, rank 16, learning rate 1e-2", {}, [LORA, "optim.lr=1e-2"]),
    # amount
    ("a tenth of an epoch", {}, ["trainer.limit_train_batches=125"]),
    ("half an epoch", {}, ["trainer.limit_train_batches=625"]),
    ("two epochs", {}, ["trainer.max_epochs=2"]),
]


def trained(words: str, variant: dict[str, Any], overrides: list[str]) -> dict[int, float]:
    """Train a trial as far as it is not, and return its validation bits by window."""

    def measure() -> dict[int, float]:
        windows = f"data.val_windows={WINDOWS}"
        run = MNIST_14.tuned(0, windows, *overrides, name=f"trial-{slug(words)}", variant=json.dumps(variant))
        return validation_bits(run)

    return {int(window): bits for window, bits in measured(f"trial: {words}", measure).items()}


def validation_bits(run: Path) -> dict[int, float]:
    """Return the bits by window of a run's last validation."""
    metrics = list(validations(run).values())[-1]
    return {window: metrics[f"val/bits_w{window}"] for window in WINDOWS}


def untuned_bits() -> dict[int, float]:
    """Return the validation bits of the untuned model by window."""
    found = measured("untuned, validation", lambda: bits_on(MNIST / "val.json", MNIST_14.base(0), WINDOWS))
    return {int(window): bits for window, bits in found.items()}


def compare(name: str, trials: list[Trial]) -> None:
    """Write a table of trials: bits, what next-token loses, and the share of the closable bits that is closed."""
    untuned = untuned_bits()
    lowest = {window: min(limit(MNIST_14, window)["curve"]) for window in WINDOWS[1:]}
    rows = [["**untuned**", *(f"{untuned[w]:.4f}" for w in WINDOWS), *[""] * len(WINDOWS)]]
    rows += [["**limit**", "", *(f"{lowest[w]:.4f}" for w in WINDOWS[1:]), *[""] * len(WINDOWS)]]
    for trial in trials:
        bits = trained(*trial)
        shares = [closed(bits[w], untuned[w], lowest[w]) for w in WINDOWS[1:]]
        rows.append(
            [
                trial[0],
                *(f"{bits[w]:.4f}" for w in WINDOWS),
                f"{bits[WINDOWS[0]] / untuned[WINDOWS[0]] - 1:+.2%}",
                *("-" if share is None else f"{share:.0%}" for share in shares),
            ]
        )
    head = ["change", *(f"bits at {w}" for w in WINDOWS), "next-token", *(f"closed at {w}" for w in WINDOWS[1:])]
    results = [f"trial: {words}" for words, _, _ in trials]
    write(name, OUT, table(head, rows), VALIDATION, results=results)


def tuning() -> None:
    compare("tuning", TRIALS)


if __name__ == "__main__":  # some trials only, by their numbers: two can run beside each other
    import sys

    for number in map(int, sys.argv[1:]):
        print(TRIALS[number][0], trained(*TRIALS[number]), flush=True)

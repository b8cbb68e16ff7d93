"""Runs of a few steps, and what is done in the middle of them."""

import signal

from zipar_train.training.callbacks.checkpoint import Checkpoint
from zipar_train.training.module import ZipARModule


def short(tiny, tmp_path, name, *more):
    kept = [override for override in tiny if not override.startswith(("log.", "run_dir="))]
    return [
        *kept,
        f"run_dir={tmp_path}/{name}",
        "trainer.log_every_n_steps=1",
        "trainer.max_epochs=2",
        "trainer.limit_train_batches=8",
        "trainer.limit_val_batches=2",
        "trainer.check_val_every_n_epoch=1",
        "zipar.windows={8: 1, 2: 1}",
        *more,
    ]


def at_step(monkeypatch, step: int, act) -> None:
    """Do something in the middle of training."""
    whole = ZipARModule.training_step

    def stepped(module, batch, batch_idx):
        if module.trainer.global_step == step:
            act(module.trainer)
        return whole(module, batch, batch_idx)

    monkeypatch.setattr(ZipARModule, "training_step", stepped)


def stop(trainer) -> None:
    next(c for c in trainer.callbacks if isinstance(c, Checkpoint)).heard.signum = signal.SIGTERM

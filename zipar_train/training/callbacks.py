"""What a run leaves behind while it goes on: checkpoints, and lines in a log."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from zipar_train.sections import Recipe


class Stopped(Exception):
    """A signal ended the run after its step, with a checkpoint written."""

    def __init__(self, signum: int, checkpoint: Path):
        super().__init__(f"stopped by {signal.Signals(signum).name}; {checkpoint} is whole")
        self.signum, self.checkpoint = signum, checkpoint


class Checkpoint(L.Callback):
    """Keeps `checkpoints/last.ckpt` of a run folder, with the recipe inside.

    It is written aside and renamed, so that it is whole at any moment. On SIGINT or SIGTERM the step in progress is
    finished, a checkpoint is written and `Stopped` is raised; a second signal ends the process at once.

    Args:
        every: optimizer steps between checkpoints; None: epoch ends only.
        data: what is trained on and held out, in words, for model cards.
    """

    def __init__(self, recipe: Recipe, *, every: int | None = None, data: dict[str, str] | None = None):
        self.recipe, self.every, self.data = recipe, every, data or {}
        self.path = Path(recipe.run) / "checkpoints" / "last.ckpt"
        self.signum: int | None = None
        self.handlers: dict[int, Any] = {}
        self.stepped_to = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self.handlers[signum] = signal.signal(signum, self._stop)
        self.stepped_to = trainer.global_step

    def _stop(self, signum: int, frame: Any) -> None:
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        self.handlers.clear()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.stepped_to:
            return  # gradients are being accumulated, and a checkpoint would lose them
        self.stepped_to = trainer.global_step
        stop = trainer.strategy.reduce_boolean_decision(self.signum is not None, all=False)
        if stop or (self.every and trainer.global_step % self.every == 0):
            self._save(trainer)
        if stop:
            raise Stopped(self.signum or signal.SIGTERM, self.path)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        aside = self.path.with_name("last.ckpt.part")
        trainer.save_checkpoint(aside)
        if trainer.is_global_zero:
            os.replace(aside, self.path)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"], checkpoint["data"] = self.recipe.model_dump(), self.data


class Lines(L.Callback):
    """Progress for logs that are no terminal: a line at every epoch's end, with bits where it validated."""

    validated = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validated = not trainer.sanity_checking

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        wanted = ("train/loss", "val/") if self.validated else ("train/loss",)
        self.validated = False
        numbers = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(wanted)}
        told = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        print(f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}: {told}", flush=True)

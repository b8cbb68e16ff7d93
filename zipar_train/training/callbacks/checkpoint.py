"""Callbacks that write checkpoints and progress lines during a run."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch.optim.lr_scheduler import LambdaLR

from zipar_train.recipe.schema import Recipe
from zipar_train.run.checkpoints import folder, numbered, older
from zipar_train.run.signals import Heard, Stopped
from zipar_train.training.callbacks.average import Average
from zipar_train.training.csv_log import Log as Log
from zipar_train.training.optimizer import fused


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint writer that writes to a temporary file and renames it, so a failed write keeps the old file intact.

    Attributes:
        failure: Message of the last failed write, or None. It is not raised: other processes wait for this one, and
            training can continue.
    """

    failure: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path, self.failure = Path(path), None
        aside = path.with_name(f"{path.name}.part")
        try:
            with open(aside, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
            with suppress(OSError):
                aside.unlink()
            reason = error if isinstance(error, OSError) else error.__context__ or error
            self.failure = f"{path} could not be written ({getattr(reason, 'strerror', None) or reason})"


class Limit(Timer):
    """Lightning's timer for `trainer.max_time`; it restarts when a run is resumed."""

    def __init__(self, duration: Any):
        super().__init__(duration, verbose=False)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the saved state, so that the time of earlier processes is not counted."""


class Checkpoint(L.Callback):
    """Callback that writes the checkpoints of a run folder, each with its recipe; see `zipar_train.run.checkpoints`.

    After a signal, the current step is finished, a checkpoint is written and `Stopped` is raised, on all processes at
    the same step. A validation in progress is aborted and starts again when the run is resumed. Logs are flushed before
    each checkpoint, so they contain every step before it.

    Args:
        recipe: The recipe of the run.
        data: Description of training and held-out data, for model cards.
        shards: Checksums of the manifests by recipe key, which a resumed run compares.
        step: Step of the checkpoint that the run continues from.

    Attributes:
        heard: Signals received so far; set by `fit`.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        data: dict[str, str] | None = None,
        shards: dict[str, str] | None = None,
        step: int | None = None,
    ):
        self.recipe, self.data, self.shards, self.saved = recipe, data or {}, shards or {}, step
        self.every, self.keep, self.best = recipe.checkpoint_every, recipe.checkpoint_keep, recipe.checkpoint_monitor
        self.folder = folder(recipe.run_dir)
        self.path = self.folder / "last.ckpt"
        self.io = AtomicCheckpointIO()
        self.heard = Heard()
        self.stepped_to = -1
        self.least: float | None = None  # best validation value so far

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.heard.listen()  # replaces Lightning's SIGTERM handler, which would end the run with status 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.heard.listen()
        self.heard.raising = False  # from here on, finish the step and save before stopping
        self.stepped_to = trainer.global_step
        if self.saved is not None:  # learning rate of the current recipe; unchanged if the recipe is
            for schedule in (config.scheduler for config in trainer.lr_scheduler_configs):
                assert isinstance(schedule, LambdaLR)
                groups = schedule.optimizer.param_groups
                for group, base, share in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                    group["lr"] = base * share(schedule.last_epoch)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.stepped_to:
            return  # gradients are being accumulated, and a checkpoint would lose them
        self.stepped_to = trainer.global_step
        loop = trainer.fit_loop
        over = trainer.global_step == trainer.max_steps or (trainer.should_stop and loop._can_stop_early)
        stop = self._asked(trainer)
        if stop and (trainer.is_last_batch or loop.epoch_loop._should_check_val_fx(loop._data_fetcher)):  # type: ignore[arg-type]
            stop = False  # stop in the validation or at the epoch's end instead: a resumed run would skip them
        if stop or over or (self.every and trainer.global_step % self.every == 0):
            self._save(trainer)
        if stop:
            raise self._stopped()

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if not self._asked(trainer):
            return
        if not trainer.sanity_checking:
            for average in (each for each in trainer.callbacks if isinstance(each, Average)):  # type: ignore[attr-defined]
                average.on_validation_epoch_end(trainer, pl_module)  # restores the training weights
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()
            progress.total.ready = progress.total.started = 1  # type: ignore[attr-defined]  # an interrupted validation for Lightning
            self._save(trainer)
        raise self._stopped()

    def _asked(self, trainer: L.Trainer) -> bool:
        """Return True if any process has been asked to stop."""
        return trainer.strategy.reduce_boolean_decision(self.heard.signum is not None, all=False)

    def _stopped(self) -> Stopped:
        saved = "nothing is saved" if self.saved is None else f"{self.path} of step {self.saved:,} is whole"
        return Stopped(self.heard.signum or signal.SIGTERM, "; ".join(filter(None, [self.io.failure, saved])))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.best is None or trainer.sanity_checking or trainer.global_step == 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        bits = float(trainer.callback_metrics[self.best])  # mean over all devices
        if self.least is None or bits < self.least:
            self.least = bits
            trainer.save_checkpoint(self.folder / "best.ckpt")
            self._told()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_last_batch or self.saved != trainer.global_step:  # else max_time or max_steps ended it
            self._save(trainer)
        if self._asked(trainer) and not trainer.fit_loop.done:
            raise self._stopped()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.io.failure:
            raise ValueError(f"{self.io.failure}, and the run is over. Make room and resume it with --resume")

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for logger in trainer.loggers:
            logger.save()
        aside = self.folder / "next.ckpt"  # renamed once it is complete on every node
        trainer.save_checkpoint(aside)
        if not trainer.is_global_zero:
            self.saved = trainer.global_step
        if not trainer.is_global_zero or self._told():
            return
        try:
            if self.keep > 1 and self.saved not in (None, trainer.global_step) and self.path.is_file():
                place = numbered(self.recipe.run_dir, self.saved)  # type: ignore[arg-type]
                if not place.exists():  # otherwise the run continues from it, because the last one is damaged
                    os.replace(self.path, place)
            os.replace(aside, self.path)
            for extra in filter(Path.is_file, older(self.recipe.run_dir)[self.keep - 1 :]):
                extra.unlink()
        except OSError as error:
            self.io.failure = f"{self.path} could not be written ({error.strerror})"
            self._told()
        else:
            self.saved = trainer.global_step

    def _told(self) -> bool:
        """Print a warning and return True if the last write failed."""
        if not self.io.failure:
            return False
        whole = "none is there yet" if self.saved is None else f"that of step {self.saved:,} is as it was"
        print(f"{self.io.failure}; {whole}. Training continues; free some space", file=sys.stderr, flush=True)
        return True

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"], checkpoint["data"] = self.recipe.model_dump(), self.data
        checkpoint["shards"] = self.shards
        checkpoint["least"], checkpoint["batches_a_step"] = self.least, trainer.accumulate_grad_batches

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Adapt the loaded state to the current recipe: batch counts, betas, weight decay and learning rates."""
        self.least = checkpoint["least"]
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        theirs, ours = checkpoint["batches_a_step"], trainer.accumulate_grad_batches
        for counts in (progress["total"], progress["current"]):  # batches per device; the last is partly counted
            steps, begun = counts["ready"] // theirs, counts["ready"]
            for what, count in counts.items():
                counts[what] = steps * ours - (begun - count)
        groups = pl_module.optimizer().param_groups
        kernel = fused(trainer.strategy.root_device)  # for the current device, not the one that saved them
        for state in checkpoint["optimizer_states"]:
            for saved, group in zip(state["param_groups"], groups, strict=True):
                saved |= {"betas": group["betas"], "weight_decay": group["weight_decay"], "initial_lr": group["lr"]}
                saved["fused"] = kernel
        for state in checkpoint["lr_schedulers"]:
            state["base_lrs"] = [group["lr"] for group in groups]


class EpochPrinter(L.Callback):
    """Progress printer for output that is not a terminal: one line per epoch, with validation bits if available."""

    validated = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validated = not trainer.sanity_checking

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parts = [f"train/loss {pl_module.loss:.4g}"]  # type: ignore[str-format]
        if self.validated:
            parts += [f"{key} {value:.4g}" for key, value in trainer.callback_metrics.items() if key.startswith("val/")]
        self.validated = False
        print(f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}: {'  '.join(parts)}", flush=True)

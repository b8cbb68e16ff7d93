"""What a run leaves behind while it goes on: checkpoints, and lines in a log."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch.optim.lr_scheduler import LambdaLR

from zipar_train.checkpoints import folder, numbered, older
from zipar_train.sections import Recipe
from zipar_train.training.optimizer import fused


class Stopped(Exception):
    """A signal ended the run after its step."""

    def __init__(self, signum: int, saved: str):
        super().__init__(f"stopped by {signal.Signals(signum).name}; {saved}")
        self.signum = signum


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints aside and renames them: a file is whole at any moment, and a failed write leaves it as it was.

    A failure is kept in `failure` and not raised: other processes wait for this one, and training can go on.
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
        except (OSError, RuntimeError) as error:  # torch says RuntimeError where a disk is full
            with suppress(OSError):
                aside.unlink()
            reason = error if isinstance(error, OSError) else error.__context__ or error
            self.failure = f"{path} could not be written ({getattr(reason, 'strerror', None) or reason})"


class Log(CSVLogger):
    """Lightning's CSV log, which keeps its rows for a later try where a disk is full."""

    @rank_zero_only
    def save(self) -> None:
        with suppress(OSError):
            super().save()


class Checkpoint(L.Callback):
    """Keeps the checkpoints of a run folder, the recipe inside each; see `zipar_train.checkpoints`.

    On SIGINT, SIGTERM or, under SLURM, SIGUSR1 the step in progress is finished, a checkpoint is written and `Stopped`
    is raised; a second signal ends the process at once. What the logs hold is written first: no step before a
    checkpoint is missing from them.

    Args:
        data: what is trained on and held out, in words, for model cards.
        shards: checksums of the manifests by the recipe's keys, for `same_shards`.
        step: of the checkpoint that the run continues from.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        data: dict[str, str] | None = None,
        shards: dict[str, str] | None = None,
        step: int | None = None,
    ):
        self.recipe, self.data, self.shards, self.saved = recipe, data or {}, shards, step
        self.every, self.keep, self.best = recipe.checkpoint_every, recipe.checkpoint_keep, recipe.checkpoint_best
        self.folder = folder(recipe.run)
        self.path = self.folder / "last.ckpt"
        self.io = WholeFiles()
        self.signum: int | None = None
        self.handlers: dict[int, Any] = {}
        self.stepped_to = -1
        self.least: float | None = None  # of the best validation

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signals = [signal.SIGINT, signal.SIGTERM]
        if "SLURM_JOB_ID" in os.environ:
            signals.append(signal.SIGUSR1)  # before its time is over: `#SBATCH --signal=USR1@120`
        for signum in signals:
            self.handlers[signum] = signal.signal(signum, self._stop)
        self.stepped_to = trainer.global_step
        if self.saved is not None:  # the rate of the schedule as it is; of an unchanged recipe's the same
            for schedule in (config.scheduler for config in trainer.lr_scheduler_configs):
                assert isinstance(schedule, LambdaLR)
                groups = schedule.optimizer.param_groups
                for group, base, share in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                    group["lr"] = base * share(schedule.last_epoch)

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
            saved = f"{self.path} of step {self.saved:,} is whole" if self.saved is not None else "nothing is saved"
            raise Stopped(self.signum or signal.SIGTERM, "; ".join(filter(None, [self.io.failure, saved])))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.best is None or trainer.sanity_checking or trainer.global_step == 0:
            return
        bits = float(trainer.callback_metrics[self.best])  # over all devices
        if self.least is None or bits < self.least:
            self.least = bits
            trainer.save_checkpoint(self.folder / "best.ckpt")
            self._told()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.io.failure:
            raise ValueError(f"{self.io.failure}, and the run is over. Make room and resume it with --resume")

    def _save(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()
        aside = self.folder / "next.ckpt"  # under its name when it is known to be whole, on every node
        trainer.save_checkpoint(aside)
        if not trainer.is_global_zero:
            self.saved = trainer.global_step
        if not trainer.is_global_zero or self._told():
            return
        try:
            if self.keep > 1 and self.saved not in (None, trainer.global_step) and self.path.is_file():
                place = numbered(self.recipe.run, self.saved)  # type: ignore[arg-type]
                if not place.exists():  # else the run goes on from it, because the last one is damaged
                    os.replace(self.path, place)
            os.replace(aside, self.path)
            for extra in older(self.recipe.run)[self.keep - 1 :]:
                extra.unlink()
        except OSError as error:
            self.io.failure = f"{self.path} could not be written ({error.strerror})"
            self._told()
        else:
            self.saved = trainer.global_step

    def _told(self) -> bool:
        """Say that a write failed, if one did."""
        if not self.io.failure:
            return False
        whole = "none is there yet" if self.saved is None else f"that of step {self.saved:,} is as it was"
        print(f"{self.io.failure}; {whole}. Training goes on, make room", file=sys.stderr, flush=True)
        return True

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"], checkpoint["data"], checkpoint["shards"] = (
            self.recipe.model_dump(),
            self.data,
            self.shards,
        )
        checkpoint["least"], checkpoint["batches_a_step"] = self.least, trainer.accumulate_grad_batches

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """What was saved by the recipe as it was, made to fit the recipe as it is."""
        self.least = checkpoint["least"]
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        theirs, ours = checkpoint["batches_a_step"], trainer.accumulate_grad_batches
        for counts in (progress["total"], progress["current"]):  # batches of a device; the last is not all counted yet
            steps, begun = counts["ready"] // theirs, counts["ready"]
            for what, count in counts.items():
                counts[what] = steps * ours - (begun - count)
        groups = pl_module.optimizer().param_groups
        kernel = fused(trainer.strategy.root_device)  # where the weights will be, whatever device saved them
        for state in checkpoint["optimizer_states"]:
            for saved, group in zip(state["param_groups"], groups, strict=True):
                saved |= {"betas": group["betas"], "weight_decay": group["weight_decay"], "initial_lr": group["lr"]}
                saved["fused"] = kernel
        for state in checkpoint["lr_schedulers"]:
            state["base_lrs"] = [group["lr"] for group in groups]


class Lines(L.Callback):
    """Progress for logs that are no terminal: a line at every epoch's end, with bits where it validated."""

    validated = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validated = not trainer.sanity_checking

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        told = [f"train/loss {pl_module.loss:.4g}"]  # type: ignore[str-format]
        if self.validated:
            told += [f"{key} {value:.4g}" for key, value in trainer.callback_metrics.items() if key.startswith("val/")]
        self.validated = False
        print(f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}: {'  '.join(told)}", flush=True)

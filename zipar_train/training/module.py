"""The training module: next-token cross-entropy, optionally with distillation, under one of a mix of windows."""

import sys
from collections.abc import Mapping, Sequence
from math import inf, isfinite, log, nan, sqrt
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from zipar_train.data.batch import Batch
from zipar_train.models import lora
from zipar_train.models.attention import attention_kernels
from zipar_train.models.conditions import Condition
from zipar_train.models.family import Family, target_hidden_states
from zipar_train.run.ranks import rank_zero_print
from zipar_train.training.frozen import add_frozen, omit_frozen
from zipar_train.training.fsdp import shard
from zipar_train.training.grid_plans import GridPlans
from zipar_train.training.guard import STOP_REMEDY, Guard, format_keys
from zipar_train.training.loss import losses
from zipar_train.training.optimizer import (
    Schedule,
    build_optimizer,
    build_schedule,
    clip_gradients,
    gradient_norm,
    parameters_of,
)
from zipar_train.training.teacher import Teacher, original_weights

GOLDEN = (sqrt(5) - 1) / 2


class ZipARModule(L.LightningModule):
    """Lightning module that fine-tunes a family, all weights or adapters only, under ZipAR masks.

    It works with any Lightning Trainer and any loader of `Batch` objects.

    Each step trains one window of the mix. The windows follow a golden-ratio sequence over their weights, so even a
    short run has them in the right shares. Windows and label dropout depend only on (seed, epoch, step), so a resumed
    run repeats an uninterrupted one, and several devices repeat a single one.

    Args:
        family: The generator; its `model` is trained.
        windows: Weight of each window in the mix; the grid's row length means next-token.
        val_windows: Windows at which validation reports bits per code. None: those of the mix, and next-token.
        rule: Arguments of `Plan.zipar` other than the window.
        other_grids: Rows and columns of further grids that batches may have. Their plans have the same windows, at
            most a row. The widest window of the family's grid means next-token on every grid.
        teacher: The original model, for distillation; it is not trained or saved. None for adapters: the family
            without its adapters is the teacher.
        distill: Weight of KL(teacher's next-token distribution || model) in the loss, 0 .. 1; the rest is the
            cross-entropy of the codes.
        label_dropout: Share of conditions replaced by the null condition.
        seed: Seed of windows and label dropout.
        lr, betas, weight_decay: See `build_optimizer`.
        warmup: Share of all steps over which the learning rate rises.
        schedule: "cosine" (to zero) or "constant" after the warmup.
        attention: Attention and form of the mask: dense for "sdpa", a BlockMask for "flex_attention" (GPU only).
        guard: Check of each step before the optimizer takes it. None: no check.

    Raises:
        ValueError: If a window does not fit the grid, or an option is unknown.
    """

    def __init__(
        self,
        family: Family,
        *,
        windows: Mapping[int, float],
        val_windows: Sequence[int] | None = None,
        rule: Mapping[str, Any] | None = None,
        other_grids: Sequence[Sequence[int]] = (),
        teacher: Family | None = None,
        distill: float = 0.0,
        label_dropout: float = 0.1,
        seed: int = 0,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.05,
        warmup: float = 0.02,
        schedule: Schedule = "cosine",
        attention: Literal["sdpa", "flex_attention"] = "sdpa",
        guard: Guard | None = None,
    ):
        super().__init__()
        if schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule {schedule!r} is unknown: use 'cosine' or 'constant'")
        if distill and teacher is None and not any(lora.MARK in name for name, _ in family.model.named_parameters()):
            raise ValueError("distill needs a teacher: the family with the weights that training starts from")
        self.family, self.model = family, family.model
        widest = family.grid.row_length
        self.val_windows = list(val_windows or sorted({*windows, widest}, reverse=True))
        self.plans = GridPlans(
            family,
            windows={*windows, *self.val_windows, widest},
            rule=rule or {},
            other_grids=other_grids,
            attention=attention,
        )
        self.windows = dict(windows)
        self.teacher, self.distill = Teacher(teacher) if teacher and distill else None, distill
        self.label_dropout, self.seed = label_dropout, seed
        self.lr, self.betas, self.weight_decay, self.warmup, self.schedule = lr, betas, weight_decay, warmup, schedule
        self.attention, self.guard = attention, guard
        self.parts: list[Tensor] = []  # losses of the batches of the current step
        self.keys: list[str] = []  # sample keys of the current step
        self.window, self.loss = 0, nan  # of the last step, over all devices
        self.norm = torch.tensor(0.0)  # gradient norm of the last step
        self.metrics: dict[str, float] = {}  # metrics of the last step
        self.metered = False  # True if a `ThroughputLogger` logs them
        self.sharded = False
        self.base: str | None = None  # fingerprint of the weights that adapters or distillation started from

    def configure_model(self) -> None:
        """Shard the weights among devices under FSDP; otherwise do nothing."""
        if self._trainer is None or not isinstance(self._trainer.strategy, ModelParallelStrategy) or self.sharded:
            return
        assert self.device_mesh is not None
        shard(self.model, self.device_mesh["data_parallel"])
        self.strict_loading = all(
            p.requires_grad for p in self.model.parameters()
        )  # see `omit_frozen`; `fit` checks names
        self.sharded = True

    def on_fit_start(self) -> None:
        if self.teacher:
            self.teacher.family.model.to(device=self.device)  # type: ignore[call-arg]
        if self.attention == "flex_attention" and self.device.type != "cuda":
            raise ValueError(f"tune.attention = flex_attention has no backward pass on {self.device}: use sdpa there")

    def sample_window(self, epoch: int, step: int) -> int:
        """Return the window of a training step."""
        start = np.random.default_rng([self.seed, epoch]).random()
        shares = np.cumsum(list(self.windows.values()))
        return list(self.windows)[int(np.searchsorted(shares, (start + step * GOLDEN) % 1 * shares[-1], side="right"))]

    def sample_dropout(self, epoch: int, step: int, places: range) -> Tensor:
        """Return which images of a step lose their condition, bool (B,), by their places in the step."""
        rng = np.random.default_rng([self.seed, epoch, step])
        return torch.from_numpy(rng.random(places.stop)[places.start :] < self.label_dropout)

    def places(self, batch_idx: int, images: int) -> tuple[int, range]:
        """Return the step within the epoch that a batch belongs to, and the places of its images in that step.

        Places make the treatment of an image independent of the number of devices and of accumulated batches.
        """
        step, part = divmod(batch_idx, self.trainer.accumulate_grad_batches)
        start = (self.global_rank * self.trainer.accumulate_grad_batches + part) * images
        return step, range(start, start + images)

    def losses(
        self, batch: Batch, condition: Condition, window: int, *, with_teacher: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the losses of B images under a window's plan, nats per code, see `loss.losses`.

        Args:
            batch: Codes of B images.
            condition: Checked conditions of the images.
            window: The window.
            with_teacher: Also return the KL divergence from the teacher's next-token distribution; otherwise None.
        """

        def states(family: Family, window: int) -> Tensor:
            plan = self.plans.plan(window, batch.sides)
            family = family if plan.grid == family.grid else family.on(plan.grid.sides)
            return target_hidden_states(family, plan, batch.codes, condition, self.plans.mask(plan, self.device))

        def head(hidden: Tensor) -> Tensor:
            with original_weights(self.family, self.teacher) as family:
                return family.head(hidden)

        other = None
        if with_teacher:
            with torch.no_grad(), original_weights(self.family, self.teacher) as family:
                other = (head, states(family, self.family.grid.row_length))
        hidden, size = states(self.family, window), self.family.codebook_size
        return losses(self.family.head, hidden, batch.codes, size=size, teacher=other)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        epoch, (step, places) = self.current_epoch, self.places(batch_idx, len(batch.codes))
        self.window = self.sample_window(epoch, step)
        drop = self.sample_dropout(epoch, step, places).to(self.device)
        # dropout of adapters uses torch's global generator: reproducible after a resume, different on each rank
        torch.manual_seed(
            int(np.random.default_rng([self.seed, epoch, batch_idx, self.global_rank, 1]).integers(2**63))
        )
        family = self.plans.family(batch.sides)
        condition = family.drop(family.check(batch.condition), drop)
        loss, divergence = self.losses(batch, condition, self.window, with_teacher=self.distill > 0)
        parts = [loss]
        if divergence is not None:
            loss = (1 - self.distill) * loss + self.distill * divergence
            parts = [loss, parts[0], divergence]
        self.parts.append(torch.stack([part.detach() for part in parts]))
        self.keys += batch.keys
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass with the same attention kernels, because activation checkpointing recomputes layers."""
        with attention_kernels(self.device):
            super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the step's metrics over all devices, and let the guard stop the run or skip the step."""
        mean = self.trainer.strategy.reduce(torch.stack(self.parts).mean(dim=0), reduce_op="mean")
        if getattr(optimizer, "_step_supports_amp_scaling", False) and (scaler := self._scaler()):
            scaler.unscale_(optimizer)  # Lightning leaves this to fused optimizers, which unscale after clipping
        total = gradient_norm(parameters_of(optimizer))
        self.norm = total.full_tensor() if isinstance(total, DTensor) else total
        self.loss, *others, norm = [float(value) for value in torch.cat([mean.flatten(), self.norm.flatten()])]
        keys, self.parts, self.keys = self.keys, [], []
        metrics = {
            "loss": self.loss,
            **dict(zip(("cross_entropy", "kl"), others, strict=False)),
            "grad_norm": norm,
            "window": float(self.window),
            "lr": optimizer.param_groups[0]["lr"],
        }
        self.metrics = {f"train/{name}": value for name, value in metrics.items()}
        if self.guard is not None:
            self._guarded(self.guard, norm, keys)
            self.metrics["train/skipped"] = float(self.guard.skipped)
        for name, value in self.metrics.items():
            self.log(name, value, prog_bar=name == "train/loss", logger=not self.metered and bool(self.trainer.loggers))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients by the Trainer's arguments, with the norm computed in `on_before_optimizer_step`.

        Lightning's own clipping computes the norm again, and rejects fused optimizers under mixed precision.
        """
        algorithm: Any = gradient_clip_algorithm or "norm"
        clip_gradients(parameters_of(optimizer), self.norm, gradient_clip_val, algorithm)

    def _scaler(self) -> torch.amp.GradScaler | None:
        """Return the loss scaler of 16-mixed precision, or None."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _guarded(self, guard: Guard, norm: float, keys: list[str]) -> None:
        """Let the guard stop the run or skip the step.

        Raises:
            ValueError: If the guard stops the run; names the reason and the samples.
        """
        if isfinite(self.loss) and not isfinite(norm) and (scaler := self._scaler()) and scaler.get_scale() > 1:
            return  # the scaler skips the step and lowers its scale; at a scale of 1 that is not the reason
        if (verdict := guard.verdict(self.loss, norm)) is None:
            return
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, keys)
            keys = [key for part in gathered for key in part]
        policy, message = verdict[0], f"step {self.global_step + 1}: {verdict[1]}. Its images: {format_keys(keys)}"
        if policy == "stop":
            raise ValueError(f"{message}. {STOP_REMEDY}")
        for parameter in self.model.parameters():
            parameter.grad = None  # the optimizer skips these parameters, including averages and decay
        rank_zero_print(f"skipped: {message} ({guard.skipped:,} steps so far)", file=sys.stderr)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        condition = self.plans.family(batch.sides).check(batch.condition)
        for window in self.val_windows:
            bits = self.losses(batch, condition, window)[0] / log(2)
            self.log(f"val/bits_w{window}", bits, batch_size=len(batch.codes), sync_dist=True, prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["base"] = self.base
        checkpoint["guard"] = self.guard.state_dict() if self.guard else None
        omit_frozen(checkpoint, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("base") != self.base:
            raise ValueError(
                "the run was trained on other weights than model.weights holds now: their fingerprint is "
                f"{checkpoint.get('base')}, here it is {self.base}. Put those weights back"
            )
        if self.guard and checkpoint.get("guard"):
            self.guard.load_state_dict(checkpoint["guard"])
        add_frozen(checkpoint, self)

    def optimizer(self) -> torch.optim.AdamW:
        return build_optimizer(self.model, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)

    def configure_optimizers(self) -> Any:
        optimizer, steps = self.optimizer(), self.trainer.estimated_stepping_batches
        if steps == inf:
            raise ValueError("trainer: the schedule needs an end. Set trainer.max_epochs or trainer.max_steps")
        schedule = build_schedule(optimizer, self.schedule, steps=int(steps), warmup=self.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

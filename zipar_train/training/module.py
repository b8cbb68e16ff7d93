"""The training step: next-token cross-entropy under the plan of one of a mix of windows."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf, isfinite, log, nan, sqrt
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from zipar_train.data.loader import Batch
from zipar_train.models import lora
from zipar_train.models.attention import attention_kernels
from zipar_train.models.family import Family, target_hidden_states
from zipar_train.plan.masks import block, dense
from zipar_train.plan.table import Plan
from zipar_train.training.guard import Guard, format_keys
from zipar_train.training.loss import losses
from zipar_train.training.optimizer import build_optimizer, clip_gradients, gradient_norm, parameters_of

GOLDEN = (sqrt(5) - 1) / 2


@rank_zero_only
def rank_zero_tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


class Teacher:
    """A frozen family beside the module: neither saved, nor trained, nor copied with it (weight averaging copies)."""

    def __init__(self, family: Family):
        family.model.requires_grad_(False)
        self.family = family

    def __deepcopy__(self, memo: Any) -> "Teacher":
        return self


def fsdp_units(model: PreTrainedModel) -> list[nn.Module]:
    """What FSDP shares as one: the layers of the body and the other parts that have weights.

    Not the body, as embeddings are taken from it before it is called.
    """
    body: Any = model.base_model
    parts = [*body.layers, *(part for part in body.children() if part is not body.layers)]
    parts += [part for part in model.children() if part is not body]
    return [part for part in parts if any(True for _ in part.parameters())]


class ZipARModule(L.LightningModule):
    """Fine-tunes a family, all its weights or its adapters, under ZipAR masks.

    Usable with any Lightning Trainer and any loader of `Batch`es.

    Each step trains one window of the mix. The sequence of windows is a golden-ratio walk over the weights, so that
    even a short run sees them in their shares; it and label dropout depend on (seed, epoch, step) alone, so that a
    resumed run repeats an uninterrupted one, and several devices one.

    Args:
        family: the generator; its `model` is trained.
        windows: weight of each window in the mix; the grid's row length means next-token.
        val_windows: that validation tells bits a code at; None: those of the mix, and next-token.
        rule: what plans are made by beside their windows, see `Plan.zipar`.
        teacher: the untouched model, for distillation: it is neither trained nor saved. None for adapters, as without
            them the family is its own.
        distill: share of the loss that is KL(teacher's next-token distribution || ours), 0 .. 1; the rest is the
            cross-entropy with the codes.
        label_dropout: share of conditions replaced by the null condition.
        warmup: share of all steps over which the learning rate rises.
        schedule: "cosine" (to zero) or "constant" after that.
        attention: the mask's form: dense for "sdpa", a BlockMask for "flex_attention" (GPU only).
        guard: looks at each step before it is taken; None: nobody does.

    Raises:
        ValueError: if a window does not fit the grid, or a choice is unknown.
    """

    def __init__(
        self,
        family: Family,
        *,
        windows: Mapping[int, float],
        val_windows: Sequence[int] | None = None,
        rule: Mapping[str, Any] | None = None,
        teacher: Family | None = None,
        distill: float = 0.0,
        label_dropout: float = 0.1,
        seed: int = 0,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.05,
        warmup: float = 0.02,
        schedule: Literal["cosine", "constant"] = "cosine",
        attention: Literal["sdpa", "flex_attention"] = "sdpa",
        guard: Guard | None = None,
    ):
        super().__init__()
        if schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule {schedule!r} is unknown: use 'cosine' or 'constant'")
        if distill and teacher is None and not any(lora.MARK in name for name, _ in family.model.named_parameters()):
            raise ValueError("distill needs a teacher: the family with the weights that training starts from")
        self.family, self.model = family, family.model
        self.plans = {
            window: Plan.zipar(family.grid, window=window, prompt=family.prompt_length, **(rule or {}))
            for window in sorted({*windows, *(val_windows or ()), family.grid.row_length}, reverse=True)
        }
        self.val_windows = (
            list(val_windows) if val_windows else [*sorted({*windows, family.grid.row_length}, reverse=True)]
        )
        self.windows = dict(windows)
        self.teacher, self.distill = Teacher(teacher) if teacher and distill else None, distill
        self.label_dropout, self.seed = label_dropout, seed
        self.lr, self.betas, self.weight_decay, self.warmup, self.schedule = lr, betas, weight_decay, warmup, schedule
        self.attention, self.guard = attention, guard
        self.parts: list[Tensor] = []  # losses of the batches of a step
        self.keys: list[str] = []  # of their images
        self.window, self.loss = 0, nan  # of the last step, over all devices
        self.norm = torch.tensor(0.0)  # of its gradient
        self.told: dict[str, float] = {}  # of it, for logs
        self.metered = False  # a `ThroughputLogger` writes it into them
        self.masks: dict[tuple[int, torch.device], Any] = {}
        self.sharded = False
        self.base: str | None = None  # fingerprint of the weights that adapters or distillation started from

    def mask(self, window: int) -> Any:
        """The window's mask on the model's device, made once."""
        key = (window, self.device)
        if key not in self.masks:
            make = block if self.attention == "flex_attention" else dense
            self.masks[key] = make(self.plans[window], device=self.device)
        return self.masks[key]

    def configure_model(self) -> None:
        """Under FSDP, share the weights among devices: each part that is called as one is a unit."""
        if self._trainer is None or not isinstance(self._trainer.strategy, ModelParallelStrategy) or self.sharded:
            return
        from torch.distributed.fsdp import fully_shard, share_comm_ctx

        assert self.device_mesh is not None
        shared = fsdp_units(self.model)
        for unit in shared:
            fully_shard(unit, mesh=self.device_mesh["data_parallel"], reshard_after_forward=True)
        share_comm_ctx(shared)  # type: ignore[arg-type]  # one unit's gradients whole at a time, not all of them
        self.strict_loading = all(p.requires_grad for p in self.model.parameters())  # see `frozen`; `fit` checks names
        self.sharded = True

    def on_fit_start(self) -> None:
        if self.teacher:
            self.teacher.family.model.to(device=self.device)  # type: ignore[call-arg]
        if self.attention == "flex_attention" and self.device.type != "cuda":
            raise ValueError(f"tune.attention = flex_attention has no backward pass on {self.device}: use sdpa there")

    def sample_window(self, epoch: int, step: int) -> int:
        """The window that a training step uses."""
        start = np.random.default_rng([self.seed, epoch]).random()
        shares = np.cumsum(list(self.windows.values()))
        return list(self.windows)[int(np.searchsorted(shares, (start + step * GOLDEN) % 1 * shares[-1], side="right"))]

    def draw_dropout(self, epoch: int, step: int, places: range) -> Tensor:
        """Which images of a step lose their condition, by their places in it, bool (B,)."""
        rng = np.random.default_rng([self.seed, epoch, step])
        return torch.from_numpy(rng.random(places.stop)[places.start :] < self.label_dropout)

    def places(self, batch_idx: int, images: int) -> tuple[int, range]:
        """The step of its epoch that a batch belongs to, and the places that its images have there.

        So the same image is treated alike, whatever the number of devices and of batches a step.
        """
        step, part = divmod(batch_idx, self.trainer.accumulate_grad_batches)
        start = (self.global_rank * self.trainer.accumulate_grad_batches + part) * images
        return step, range(start, start + images)

    @contextmanager
    def teacher_model(self) -> Iterator[Family]:
        """The family that training starts from, for distillation."""
        if self.teacher:
            yield self.teacher.family
        else:
            with lora.without(self.model):
                yield self.family

    def losses(
        self, batch: Batch, condition: Any, window: int, *, taught: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Means over the codes of B images under a window's plan, nats, see `loss.losses`; None if not taught.

        Args:
            condition: of the images, checked.
            taught: by the untouched family, which predicts next tokens, whatever the window.
        """

        def states(family: Family, window: int) -> Tensor:
            return target_hidden_states(family, self.plans[window], batch.codes, condition, self.mask(window))

        def head(hidden: Tensor) -> Tensor:
            with self.teacher_model() as family:
                return family.head(hidden)

        other = None
        if taught:
            with torch.no_grad(), self.teacher_model() as family:
                other = (head, states(family, self.family.grid.row_length))
        return losses(self.family.head, states(self.family, window), batch.codes, size=self.family.codes, teacher=other)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        epoch, (step, places) = self.current_epoch, self.places(batch_idx, len(batch.codes))
        self.window = self.sample_window(epoch, step)
        drop = self.draw_dropout(epoch, step, places).to(self.device)
        # the dropout of adapters draws from torch's own generator: the same after a resume, another on each rank
        torch.manual_seed(
            int(np.random.default_rng([self.seed, epoch, batch_idx, self.global_rank, 1]).integers(2**63))
        )
        condition = self.family.drop(self.family.check(batch.condition), drop)
        loss, divergence = self.losses(batch, condition, self.window, taught=self.distill > 0)
        parts = [loss]
        if divergence is not None:
            loss = (1 - self.distill) * loss + self.distill * divergence
            parts = [loss, parts[0], divergence]
        self.parts.append(torch.stack([part.detach() for part in parts]))
        self.keys += batch.keys
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Activation checkpointing runs layers again here, and attention chooses its kernel in each forward pass."""
        with attention_kernels(self.device):
            super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Tell of the step over all devices; let the guard keep it from the weights."""
        mean = self.trainer.strategy.reduce(torch.stack(self.parts).mean(dim=0), reduce_op="mean")
        if getattr(optimizer, "_step_supports_amp_scaling", False) and (scaler := self._scaler()):
            scaler.unscale_(optimizer)  # Lightning leaves it to fused optimizers, whose step would come after clipping
        total = gradient_norm(parameters_of(optimizer))
        self.norm = total.full_tensor() if isinstance(total, DTensor) else total
        self.loss, *others, norm = [float(value) for value in torch.cat([mean.flatten(), self.norm.flatten()])]
        keys, self.parts, self.keys = self.keys, [], []
        told = {"loss": self.loss, **dict(zip(("cross_entropy", "divergence"), others, strict=False)), "gradient": norm,
                "window": float(self.window), "lr": optimizer.param_groups[0]["lr"]}  # fmt: skip
        self.told = {f"train/{name}": value for name, value in told.items()}
        if self.guard is not None:
            self._guarded(self.guard, norm, keys)
            self.told["train/skipped"] = float(self.guard.skipped)
        for name, value in self.told.items():
            self.log(name, value, prog_bar=name == "train/loss", logger=not self.metered and bool(self.trainer.loggers))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer's arguments say, by the norm that `on_before_optimizer_step` has computed.

        Lightning's own clipping computes the norm again, and refuses fused optimizers under mixed precision.
        """
        algorithm: Any = gradient_clip_algorithm or "norm"
        clip_gradients(parameters_of(optimizer), self.norm, gradient_clip_val, algorithm)

    def _scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler of 16-mixed precision."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _guarded(self, guard: Guard, norm: float, keys: list[str]) -> None:
        if isfinite(self.loss) and not isfinite(norm) and (scaler := self._scaler()) and scaler.get_scale() > 1:
            return  # the scaler skips the step and lowers its scale; at a scale of 1 that is not the reason
        verdict = guard.verdict(self.loss, norm)
        if verdict is None:
            return
        what, why = verdict
        if self.trainer.world_size > 1:
            everyones: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(everyones, keys)
            keys = [key for one in everyones for key in one]
        words = f"step {self.global_step + 1}: {why}. Its images: {format_keys(keys)}"
        if what == "stop":
            raise ValueError(
                f"{words}. The weights have not taken it, and the last checkpoint is older. Lower optim.lr, mend the "
                "data, or let such steps be left out: health.on_nonfinite, health.on_spike = skip"
            )
        for parameter in self.model.parameters():
            parameter.grad = None  # which the optimizer passes over, its averages and decay too
        rank_zero_tell(f"skipped: {words} ({guard.skipped:,} steps so far)")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        condition = self.family.check(batch.condition)
        for window in self.val_windows:
            bits = self.losses(batch, condition, window)[0] / log(2)
            self.log(f"val/bits_w{window}", bits, batch_size=len(batch.codes), sync_dist=True, prog_bar=True)

    @property
    def frozen(self) -> dict[str, Tensor]:
        """Tensors that adapters leave as they are; checkpoints do without them."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        adapted = any(not parameter.requires_grad for parameter in self.parameters())
        return {name: t for name, t in self.state_dict().items() if name not in trained} if adapted else {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        frozen, checkpoint["base"] = self.frozen, self.base
        checkpoint["guard"] = self.guard.state_dict() if self.guard else None
        for part in {"state_dict", "current_model_state"} & checkpoint.keys():  # averaged weights, and today's
            checkpoint[part] = {name: tensor for name, tensor in checkpoint[part].items() if name not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("base") != self.base:
            raise ValueError(
                "the run was trained on other weights than model.weights holds now: their fingerprint is "
                f"{checkpoint.get('base')}, here it is {self.base}. Put those weights back"
            )
        if self.guard and checkpoint.get("guard"):
            self.guard.load_state_dict(checkpoint["guard"])
        frozen = self.frozen
        for part in {"state_dict", "current_model_state"} & checkpoint.keys():
            checkpoint[part] = frozen | checkpoint[part]

    def optimizer(self) -> torch.optim.AdamW:
        return build_optimizer(self.model, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)

    def configure_optimizers(self) -> Any:
        optimizer, steps = self.optimizer(), self.trainer.estimated_stepping_batches
        if steps == inf:
            raise ValueError("trainer: the schedule needs an end. Set trainer.max_epochs or trainer.max_steps")
        warmup = round(self.warmup * steps)
        if self.schedule == "cosine":
            schedule = get_cosine_schedule_with_warmup(optimizer, warmup, int(steps))
        else:
            schedule = get_constant_schedule_with_warmup(optimizer, warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

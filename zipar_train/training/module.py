"""The training step: next-token cross-entropy under the plan of one of a mix of windows."""

from collections.abc import Mapping, Sequence
from math import inf, log, sqrt
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from transformers import PreTrainedModel, get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from zipar_train.loader import Batch
from zipar_train.masks import block, dense
from zipar_train.models.family import Family, predictors
from zipar_train.plan import Plan, StandIn
from zipar_train.training.loss import losses

GOLDEN = (sqrt(5) - 1) / 2


class Teacher:
    """A frozen family beside the module: neither saved, nor trained, nor copied with it (weight averaging copies)."""

    def __init__(self, family: Family):
        family.model.requires_grad_(False)
        self.family = family

    def __deepcopy__(self, memo: Any) -> "Teacher":
        return self


def units(model: PreTrainedModel) -> list[nn.Module]:
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
    even a short run sees them in their shares; it and label dropout depend on (seed, epoch, batch) alone, so that a
    resumed run repeats an uninterrupted one.

    Args:
        family: the generator; its `model` is trained.
        windows: weight of each window in the mix; the grid's row length means next-token.
        val_windows: that validation tells bits a code at; None: those of the mix, and next-token.
        teacher: the untouched model, for distillation: it is neither trained nor saved.
        distill: share of the loss that is KL(teacher's next-token distribution || ours), 0 .. 1; the rest is the
            cross-entropy with the codes.
        label_dropout: share of conditions replaced by the null condition.
        warmup: share of all steps over which the learning rate rises.
        schedule: "cosine" (to zero) or "constant" after that.
        attention: the mask's form: dense for "sdpa", a BlockMask for "flex_attention" (GPU only).

    Raises:
        ValueError: if a window does not fit the grid, or a choice is unknown.
    """

    def __init__(
        self,
        family: Family,
        *,
        windows: Mapping[int, float],
        val_windows: Sequence[int] | None = None,
        stand_in: StandIn = "nearest",
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
    ):
        super().__init__()
        if schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule {schedule!r} is unknown: use 'cosine' or 'constant'")
        if distill and teacher is None:
            raise ValueError("distill needs a teacher: the family with the weights that training starts from")
        self.family, self.model = family, family.model
        self.plans = {
            window: Plan.zipar(family.grid, window=window, stand_in=stand_in, prompt=family.prompt_length)
            for window in sorted({*windows, *(val_windows or ()), family.grid.row_length}, reverse=True)
        }
        self.val_windows = (
            list(val_windows) if val_windows else [*sorted({*windows, family.grid.row_length}, reverse=True)]
        )
        self.windows = dict(windows)
        self.teacher, self.distill = Teacher(teacher) if teacher and distill else None, distill
        self.label_dropout, self.seed = label_dropout, seed
        self.lr, self.betas, self.weight_decay, self.warmup, self.schedule = lr, betas, weight_decay, warmup, schedule
        self.attention = attention
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
        shared = units(self.model)
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

    def draw_window(self, epoch: int, batch: int) -> int:
        """The window that a training step uses."""
        start = np.random.default_rng([self.seed, epoch]).random()
        shares = np.cumsum(list(self.windows.values()))
        return list(self.windows)[int(np.searchsorted(shares, (start + batch * GOLDEN) % 1 * shares[-1], side="right"))]

    def draw_dropout(self, epoch: int, batch: int, images: int) -> Tensor:
        """Which images of a batch lose their condition, bool (B,)."""
        rng = np.random.default_rng([self.seed, epoch, batch, self.global_rank])
        return torch.from_numpy(rng.random(images) < self.label_dropout)

    def losses(
        self, batch: Batch, condition: Any, window: int, *, teacher: Family | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Means over the codes of B images under a window's plan, nats, see `loss.losses`; None without a teacher.

        Args:
            condition: of the images, checked.
            teacher: predicts next tokens, whatever the window.
        """

        def states(family: Family, window: int) -> Tensor:
            return predictors(family, self.plans[window], batch.codes, condition, self.mask(window))

        other = None
        if teacher:
            with torch.no_grad():
                other = (teacher.head, states(teacher, self.family.grid.row_length))
        return losses(self.family.head, states(self.family, window), batch.codes, size=self.family.codes, teacher=other)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        window = self.draw_window(self.current_epoch, batch_idx)
        drop = self.draw_dropout(self.current_epoch, batch_idx, len(batch.codes)).to(self.device)
        # the dropout of adapters draws from torch's own generator: the same after a resume, another on each rank
        torch.manual_seed(
            int(np.random.default_rng([self.seed, self.current_epoch, batch_idx, self.global_rank, 1]).integers(2**63))
        )
        condition = self.family.drop(self.family.check(batch.condition), drop)
        teacher = self.teacher.family if self.teacher else None
        loss, divergence = self.losses(batch, condition, window, teacher=teacher)
        if divergence is not None:
            self.log("train/cross_entropy", loss)
            self.log("train/divergence", divergence)
            loss = (1 - self.distill) * loss + self.distill * divergence
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/window", float(window))
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

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
        for part in {"state_dict", "current_model_state"} & checkpoint.keys():  # averaged weights, and today's
            checkpoint[part] = {name: tensor for name, tensor in checkpoint[part].items() if name not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("base") != self.base:
            raise ValueError(
                "the run was trained on other weights than model.weights holds now: their fingerprint is "
                f"{checkpoint.get('base')}, here it is {self.base}. Put those weights back"
            )
        frozen = self.frozen
        for part in {"state_dict", "current_model_state"} & checkpoint.keys():
            checkpoint[part] = frozen | checkpoint[part]

    def optimizer(self) -> torch.optim.AdamW:
        """AdamW, which decays matrices alone: not biases, nor norms, of which some have a row for each head."""
        matrices = {part.weight for part in self.model.modules() if isinstance(part, nn.Linear | nn.Embedding)}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p in matrices], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p not in matrices], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas)

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

"""Callback that logs steps, throughput and the loss of each window, every `log_every_n_steps` steps.

Lightning writes a step's metrics only after its last hook, in which checkpoints are saved. A kill in between would lose
the log line of a step that the checkpoint contains, so this callback writes the lines earlier.
"""

from collections import defaultdict
from statistics import fmean
from time import perf_counter
from typing import Any

import lightning as L
import psutil
import torch
from torch import nn

from zipar_train.models.family import Family
from zipar_train.plan.table import Plan
from zipar_train.run.peak_flops import peak_flops

GIB = 2**30


def forward(family: Family, plan: Plan) -> tuple[float, float]:
    """Return the FLOPs of a forward pass over one image: of weight products, and of attention over all S x S pairs."""
    body, head = (
        sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
        for module in (family.model.base_model, family.model.get_output_embeddings())
    )
    products = 2 * body * len(plan) + 2 * head * family.grid.num_codes
    config = family.model.config.get_text_config()
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    attention = 4 * len(plan) ** 2 * width * config.num_hidden_layers
    return products, attention


def flops(family: Family, plan: Plan, *, trained: float = 1.0, teacher: Plan | None = None) -> float:
    """Return the FLOPs of a training step on one image, without recomputed activations.

    Args:
        family: The generator.
        plan: The plan of the training step.
        trained: Share of the weights that get gradients.
        teacher: The plan of the teacher's forward pass, if there is a teacher.
    """
    products, attention = forward(family, plan)
    return (2 + trained) * products + 3 * attention + (sum(forward(family, teacher)) if teacher else 0)


class ThroughputLogger(L.Callback):
    """Logger of step metrics, images per second, MFU, memory (GiB), waiting share, and each window's mean loss."""

    def __init__(self) -> None:
        self.images, self.since, self.waited, self.paused = 0, 0.0, 0.0, 0.0
        self.work = 0.0  # FLOPs since the last line, over all devices
        self.step = 0
        self.losses: dict[int, list[float]] = defaultdict(list)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.step, self.since, pl_module.metered = trainer.global_step, perf_counter(), True
        learnt = [p.numel() for p in pl_module.model.parameters() if p.requires_grad]
        trained = sum(learnt) / sum(p.numel() for p in pl_module.model.parameters())
        plans, widest, smallest = pl_module.plans, pl_module.family.grid.row_length, min(pl_module.windows)
        self.flops = {  # of an image, by rows and columns of its grid
            sides: flops(
                family,
                plans.plan(smallest, sides),
                trained=trained,
                teacher=plans.plan(widest, sides) if pl_module.distill else None,
            )
            for sides, family in plans.families.items()
        }
        dtype = torch.bfloat16 if "16" in str(trainer.precision) else torch.float32
        self.peak = peak_flops(trainer.strategy.root_device, dtype)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.paused = perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.since += perf_counter() - self.paused

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        images = len(batch.codes) * trainer.world_size
        self.images += images
        self.work += images * self.flops[batch.sides or pl_module.plans.own]
        if trainer.global_step == self.step:
            return  # gradients are being accumulated
        self.step = trainer.global_step
        self.losses[pl_module.window].append(pl_module.loss)
        if self.step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        metrics = pl_module.metrics | {f"train/{name}": float(value) for name, value in self._metrics(trainer).items()}
        metrics |= {f"train/loss_w{window}": fmean(found) for window, found in self.losses.items()}
        self.losses.clear()
        for logger in trainer.loggers:
            logger.log_metrics(metrics | {"epoch": trainer.current_epoch}, step=self.step - 1)  # as Lightning counts

    def _metrics(self, trainer: L.Trainer) -> dict[str, float]:
        now, device = perf_counter(), trainer.strategy.root_device
        seconds, images, work = max(now - self.since, 1e-9), self.images, self.work
        self.since, self.images, self.work = now, 0, 0.0
        metrics = {"images_per_second": images / seconds}
        if self.peak is not None:
            metrics["mfu"] = work / seconds / (self.peak * trainer.world_size)
        if device.type == "cuda":
            metrics["memory_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        else:
            metrics["memory_gib"] = psutil.Process().memory_info().rss / GIB
        loader = getattr(getattr(trainer, "datamodule", None), "loader", None)
        if loader is not None:
            metrics["data_wait"] = (
                loader.waited - self.waited
            ) / seconds  # share of the time spent waiting for a batch
            metrics["damaged"] = sum(loader.damaged.values())
            self.waited = loader.waited
        return metrics

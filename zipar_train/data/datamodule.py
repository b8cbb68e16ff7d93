"""A LightningDataModule over shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from zipar_train.data.epoch import Damaged
from zipar_train.data.epoch_order import Share
from zipar_train.data.loader import ShardLoader
from zipar_train.data.shards import Misfit, read_manifest, same_classes
from zipar_train.plan.grid import Grid


class ShardDataModule(L.LightningDataModule):
    """A data module that splits batches of codes and conditions from two shard sets among ranks.

    Args:
        train, val: Manifests, see `zipar_train.data.shards`.
        batch_size: Images per batch and device.
        step: Images per optimizer step over all devices; None: one batch per device.
        damaged, misfit: See `ShardLoader`.
        stalled: See `ShardLoader`; for the training shards only.
        grids, codes, classes, captions: Properties that the model requires of the shards.

    Raises:
        ValueError: If a shard set is missing or does not fit, if the two sets number classes differently, or if a step
            has more images than the training set has of a grid.
    """

    def __init__(
        self,
        train: str | Path,
        val: str | Path,
        *,
        batch_size: int,
        step: int | None = None,
        workers: int = 0,
        shuffle: int = 10000,
        seed: int = 0,
        damaged: Damaged = "stop",
        misfit: Misfit | None = None,
        stalled: float | None = None,
        grids: Sequence[Grid] = (),
        codes: int | None = None,
        classes: int | None = None,
        captions: bool = False,
    ):
        super().__init__()
        self.train, self.val = train, val
        self.batch_size, self.workers, self.shuffle, self.seed = batch_size, workers, shuffle, seed
        self.step, self.damaged, self.misfit, self.stalled = step, damaged, misfit, stalled
        self.loader: ShardLoader | None = None
        self.position: dict[str, int] | None = None
        expected: dict[str, Any] = {"grids": grids, "codes": codes, "classes": classes, "captions": captions}
        self.manifests = (read_manifest(train, **expected), read_manifest(val, **expected))
        same_classes(train, val, self.manifests)
        several = len(split := self.manifests[0].split()) > 1
        for grid, shards in split if step else []:
            if step and step <= (images := sum(shard.samples for shard in shards)):
                continue
            of = f" of {grid} codes" if several else ""
            raise ValueError(
                f"{train} has {images:,} images{of}, and a step takes {step:,}: lower "
                "optim.global_batch_size, or data.micro_batch_size, trainer.accumulate_grad_batches or the number of "
                "devices, whose product it is"
                + ("; or tokenize without this grid in model.other_grids" if several else "")
            )

    def train_dataloader(self) -> ShardLoader:
        self.loader = self._loader(self.train, shuffle=self.shuffle, step=self.step, stalled=self.stalled)
        if self.position is not None:
            self.loader.load_state_dict(self.position)
        return self.loader

    def val_dataloader(self) -> ShardLoader:
        return self._loader(self.val)

    # Lightning 2.6 also saves the loader's own state, but does not restore it if the learning-rate schedule has asked
    # the Trainer for its number of steps, which sets up the loaders early. A data module's state is restored in time.

    def state_dict(self) -> dict[str, int]:
        assert self.loader is not None and self.trainer is not None
        if self.loader.batches >= self.trainer.num_training_batches:  # an epoch shortened by limit_train_batches
            return {"epoch": self.loader.epoch + 1, "steps": 0}
        return self.loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.position = state_dict
        if self.loader is not None:  # under FSDP, checkpoints are read after the loaders are set up
            self.loader.load_state_dict(state_dict)

    def _loader(self, manifest: str | Path, **more: Any) -> ShardLoader:
        share = Share(self.trainer.global_rank, self.trainer.world_size) if self.trainer else Share()
        return ShardLoader(
            manifest,
            batch_size=self.batch_size,
            seed=self.seed,
            workers=self.workers,
            share=share,
            damaged=self.damaged,
            misfit=self.misfit,
            **more,
        )

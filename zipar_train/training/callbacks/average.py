"""Callback for averaged weights."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging


class Average(EMAWeightAveraging):
    """Exponential moving average of the weights, kept on the training device.

    Lightning creates the average in `setup`, before the strategy moves the model to its device, so it would stay on the
    CPU, and every step would copy all weights there.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str, **kwargs: Any) -> None:
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage, **kwargs)

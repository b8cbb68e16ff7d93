"""The average of the weights that a run keeps beside them."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging


class Average(EMAWeightAveraging):
    """An exponential moving average of the weights, on the device that trains them.

    Lightning makes the average in `setup`, before the strategy moves the model to its device, and where the model is
    then: on the CPU. Every step would copy all weights there and average them there.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str, **kwargs: Any) -> None:
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage, **kwargs)

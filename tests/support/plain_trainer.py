"""A plain Trainer on random images."""

import warnings

import lightning as L
import torch
from small import a_batch
from torch.utils.data import DataLoader

CUDA = torch.device("cuda")


def trainer(**arguments):
    quietly = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "max_steps": 3,
        "max_epochs": 1,
    }
    return L.Trainer(**quietly | arguments)


def fitted(trainer, module, kind="llamagen", images=3):
    """Train in a plain Trainer on random images; the batches."""
    torch.manual_seed(1)
    batches = [a_batch(kind, module.family) for _ in range(images)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(batches, batch_size=None), DataLoader(batches[:1], batch_size=None))
    return batches

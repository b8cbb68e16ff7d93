"""Fine-tune autoregressive image generators under a ZipAR mask, and decode their rows in parallel.

from zipar_train import load
images = load("runs/digits").draw([3, 5], window=4, seed=0)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zipar_train.decoding.generator import Generator, load
    from zipar_train.grid import Grid
    from zipar_train.plan import Plan
    from zipar_train.sections import Recipe
    from zipar_train.training.datamodule import ShardDataModule
    from zipar_train.training.module import ZipARModule

__version__ = "0.1.0"

_HOMES = {  # imported on first use, so that `zipar-train --help` needs no torch
    "Generator": "decoding.generator",
    "Grid": "grid",
    "Plan": "plan",
    "Recipe": "sections",
    "ShardDataModule": "training.datamodule",
    "ZipARModule": "training.module",
    "load": "decoding.generator",
}
__all__ = ["Generator", "Grid", "Plan", "Recipe", "ShardDataModule", "ZipARModule", "load"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"zipar_train.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'zipar_train' has no attribute {name!r}")

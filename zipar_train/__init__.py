"""Fine-tuning of autoregressive image generators under ZipAR masks, and parallel decoding of image rows.

Example:
    from zipar_train import load
    images = load("runs/digits").generate([3, 5], window=4, seed=0)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zipar_train.data.datamodule import ShardDataModule
    from zipar_train.data.loader import ShardLoader
    from zipar_train.data.tokenize import tokenize
    from zipar_train.decoding.adaptive.decoder import AdaptiveDecoder
    from zipar_train.decoding.decoder import Decoder
    from zipar_train.decoding.generator import Generator, load
    from zipar_train.decoding.images import Images
    from zipar_train.decoding.sampling import code_seeds
    from zipar_train.evaluation.evaluate import evaluate
    from zipar_train.models.family import Family, teacher_forced
    from zipar_train.plan.grid import Grid
    from zipar_train.plan.masks import block, dense
    from zipar_train.plan.table import ROW_END, Plan
    from zipar_train.recipe.load import load_recipe
    from zipar_train.recipe.schema import Recipe, SamplingParams
    from zipar_train.training.fit import fit
    from zipar_train.training.module import ZipARModule

__version__ = "0.2.0"

_HOMES = {  # imported on first use, so that `zipar-train --help` needs no torch
    "AdaptiveDecoder": "decoding.adaptive.decoder",
    "Decoder": "decoding.decoder",
    "SamplingParams": "recipe.schema",
    "Family": "models.family",
    "Generator": "decoding.generator",
    "Grid": "plan.grid",
    "Images": "decoding.images",
    "Plan": "plan.table",
    "ROW_END": "plan.table",
    "Recipe": "recipe.schema",
    "ShardDataModule": "data.datamodule",
    "ShardLoader": "data.loader",
    "ZipARModule": "training.module",
    "block": "plan.masks",
    "code_seeds": "decoding.sampling",
    "dense": "plan.masks",
    "evaluate": "evaluation.evaluate",
    "fit": "training.fit",
    "load": "decoding.generator",
    "load_recipe": "recipe.load",
    "teacher_forced": "models.family",
    "tokenize": "data.tokenize",
}
__all__ = [
    "AdaptiveDecoder",
    "Decoder",
    "SamplingParams",
    "Family",
    "Generator",
    "Grid",
    "Images",
    "Plan",
    "ROW_END",
    "Recipe",
    "ShardDataModule",
    "ShardLoader",
    "ZipARModule",
    "block",
    "code_seeds",
    "dense",
    "evaluate",
    "fit",
    "load",
    "load_recipe",
    "teacher_forced",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"zipar_train.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'zipar_train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]

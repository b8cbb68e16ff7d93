"""Callback that generates the same images from the current weights at every validation."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor

from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.generator import Images
from zipar_train.decoding.memory import BatchTooLarge, is_oom
from zipar_train.decoding.sampling import uniforms
from zipar_train.models.family import Family
from zipar_train.plan.table import Plan
from zipar_train.recipe.schema import Recipe
from zipar_train.training.module import ZipARModule

Show = Callable[[str, list[Image.Image], list[str], int], None]  # (name, pictures, captions, log step)
LEAST = 96  # pixels; smaller pictures are enlarged to about this size


class Samples(L.Callback):
    """Callback that generates `log.images` images, at the smallest trained window and next-token, for `show`.

    They equal those of `zipar-train generate --seed 0`, for evenly spaced classes or the first held-out captions. They
    use averaged weights if there are any; the callback must precede the averaging one. Random states are preserved. If
    memory runs out, no more images are generated.

    Only one process may have this callback; the others wait for it at the next step. It does not support FSDP, where
    no process has all weights.

    Args:
        recipe: The recipe of the run; its `log.images` must be set.
        show: Called with a name, pictures, their captions and the log step.
    """

    def __init__(self, recipe: Recipe, show: Show):
        assert recipe.log.images
        self.recipe, self.show, self.images = recipe, show, recipe.log.images
        self.captions: list[Any] = []
        self.given_up = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with isolate_rng():
            _ = _family(pl_module).tokenizer  # fail early if its file is missing

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.recipe.model.captions and len(self.captions) < self.images:
            self.captions += batch.condition[: self.images - len(self.captions)]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or self.given_up:
            return
        family = _family(pl_module)
        # eager: compiled layers would recompile for each pass, and CUDA graphs do not tolerate a loader's threads
        with isolate_rng(), torch.compiler.set_stance("force_eager"):
            try:
                for window in sorted({min(self.recipe.zipar.windows), family.grid.row_length}):
                    pictures, captions = self._generate(family, window)
                    self.show(f"images/w{window}", pictures, captions, trainer.global_step - 1)  # as Lightning counts
            except (BatchTooLarge, RuntimeError, MemoryError) as error:
                if not isinstance(error, BatchTooLarge) and not is_oom(error):
                    raise
                self.given_up = True
                print(
                    f"log.images: generating no more images, which do not fit into memory: {error}",
                    flush=True,
                )

    def _generate(self, family: Family, window: int) -> tuple[list[Image.Image], list[str]]:
        recipe = self.recipe
        wanted = self.captions or _spread(self.images, recipe.model.num_classes or 1)
        plan = Plan.zipar(family.grid, window=window, prompt=family.prompt_length, **recipe.zipar.rule)
        decoder = Decoder(family, plan, capture=False)
        size, codes, pixels = min(recipe.data.micro_batch_size, recipe.evaluate.batch_size), [], []
        for start in range(0, len(wanted), size):
            chunk = wanted[start : start + size]
            numbers = uniforms([start + k for k in range(len(chunk))], family.grid.codes, seed=0)
            codes.append(decoder(chunk, numbers, recipe.sampling))
            assert family.tokenizer
            pixels.append(family.tokenizer.decode(codes[-1]).cpu())
        images = Images(torch.cat(codes).cpu(), torch.full((len(wanted),), plan.passes), torch.cat(pixels))
        return [_enlarged(images[k]) for k in range(len(images))], [_caption(each) for each in wanted]


def _family(module: L.LightningModule) -> Family:
    assert isinstance(module, ZipARModule)
    return module.family


def _spread(images: int, classes: int) -> list[int]:
    return [k * classes // images for k in range(images)]


def _caption(wanted: Any) -> str:
    return "features of a caption" if isinstance(wanted, Tensor) else str(wanted)


def _enlarged(picture: Image.Image) -> Image.Image:
    scale = max(1, LEAST // max(picture.size))
    return picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)

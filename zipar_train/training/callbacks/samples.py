"""Images drawn at every validation from the weights as they are: the same draws each time, and nothing disturbed."""

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

Show = Callable[[str, list[Image.Image], list[str], int], None]  # a name, pictures, their captions, the step of the log
LEAST = 96  # pixels each way that small pictures are enlarged to


class Samples(L.Callback):
    """Draws the recipe's `log.images` at its smallest trained window and next-token, and hands them to `show`.

    They are those that `zipar-train generate --seed 0` would draw: of classes in even steps, or of the first held-out
    captions. They come from averaged weights if there are some, which needs the callback to stand before the one that
    averages. Random states are left as they were, and a GPU that has no room for it draws none.

    For one process: the others wait for it at the next step. Under FSDP no process has the weights.
    """

    def __init__(self, recipe: Recipe, show: Show):
        assert recipe.log.images
        self.recipe, self.show, self.images = recipe, show, recipe.log.images
        self.captions: list[Any] = []
        self.given_up = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with isolate_rng():
            _ = _family(pl_module).tokenizer  # its file may be missing: now is the time to say so

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.recipe.model.captions and len(self.captions) < self.images:
            self.captions += batch.condition[: self.images - len(self.captions)]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or self.given_up:
            return
        family = _family(pl_module)
        # compiled layers would be compiled once more for each pass, and CUDA graphs do not bear a loader's threads
        with isolate_rng(), torch.compiler.set_stance("force_eager"):
            try:
                for window in sorted({min(self.recipe.zipar.windows), family.grid.row_length}):
                    pictures, captions = self._drawn(family, window)
                    self.show(f"images/w{window}", pictures, captions, trainer.global_step - 1)  # as Lightning counts
            except (BatchTooLarge, RuntimeError, MemoryError) as error:
                if not isinstance(error, BatchTooLarge) and not is_oom(error):
                    raise
                self.given_up = True
                print(f"log.images: no more are drawn, as memory has no room for it: {error}", flush=True)

    def _drawn(self, family: Family, window: int) -> tuple[list[Image.Image], list[str]]:
        recipe = self.recipe
        wanted = self.captions or _spread(self.images, recipe.model.num_classes or 1)
        plan = Plan.zipar(family.grid, window=window, prompt=family.prompt_length, **recipe.zipar.rule)
        decoder = Decoder(family, plan, capture=False)
        size, codes, pixels = min(recipe.data.micro_batch_size, recipe.evaluate.batch_size), [], []
        for start in range(0, len(wanted), size):
            chunk = wanted[start : start + size]
            numbers = uniforms([start + k for k in range(len(chunk))], family.grid.codes, seed=0)
            codes.append(decoder(chunk, numbers, recipe.draw))
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

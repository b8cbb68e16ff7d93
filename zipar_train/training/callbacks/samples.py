"""Callback that generates the same images from the current weights at every validation."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor

from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.images import Images
from zipar_train.decoding.memory import BatchTooLarge, is_oom
from zipar_train.decoding.sampling import code_seeds
from zipar_train.models.family import Family
from zipar_train.plan.table import Plan
from zipar_train.recipe.schema import SamplingParams
from zipar_train.training.module import ZipARModule

Show = Callable[[str, list[Image.Image], list[str], int], None]  # (name, pictures, captions, log step)
MIN_PICTURE_SIDE = 96  # pixels; smaller pictures are enlarged to about this size


class Samples(L.Callback):
    """Callback that generates images for `show`, at one window and next-token.

    They equal those of `zipar-train generate --seed 0`, for evenly spaced classes or the first held-out captions. They
    use averaged weights if there are any; the callback must precede the averaging one. Random states are preserved. If
    memory runs out, no more images are generated.

    Only one process may have this callback; the others wait for it at the next step. It does not support FSDP, where
    no process has all weights.

    Args:
        show: Called with a name, pictures, their captions and the log step.
        images: Number of images.
        window: The window.
        rule: Arguments of `Plan.zipar` other than the window.
        sampling: How codes are sampled.
        classes: Number of classes; None if the model is prompted by captions.
        batch_size: Images generated together.
    """

    def __init__(
        self,
        show: Show,
        *,
        images: int,
        window: int,
        rule: Mapping[str, Any],
        sampling: SamplingParams,
        classes: int | None,
        batch_size: int,
    ):
        self.show, self.images, self.window, self.rule = show, images, window, rule
        self.sampling, self.classes, self.batch_size = sampling, classes, batch_size
        self.captions: list[Any] = []
        self.given_up = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with isolate_rng():
            _ = _family(pl_module).tokenizer  # fail early if its file is missing

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.classes is None and len(self.captions) < self.images:
            self.captions += batch.condition[: self.images - len(self.captions)]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or self.given_up:
            return
        family = _family(pl_module)
        # eager: compiled layers would recompile for each pass, and CUDA graphs do not tolerate a loader's threads
        with isolate_rng(), torch.compiler.set_stance("force_eager"):
            try:
                for window in sorted({self.window, family.grid.row_length}):
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
        wanted = self.captions or _spread(self.images, self.classes or 1)
        plan = Plan.zipar(family.grid, window=window, prompt=family.prompt_length, **self.rule)
        decoder = Decoder(family, plan, capture=False)
        codes, pixels, passes = [], [], list[int]()
        for start in range(0, len(wanted), self.batch_size):
            chunk = wanted[start : start + self.batch_size]
            numbers = code_seeds([start + k for k in range(len(chunk))], family.grid.num_codes, seed=0)
            codes.append(family.grid.images(decoder(chunk, numbers, self.sampling))[-1])
            passes += decoder.passes(len(chunk))
            assert family.tokenizer
            pixels.append(family.tokenizer.decode(codes[-1]).cpu())
        images = Images(torch.cat(codes).cpu(), torch.tensor(passes), torch.cat(pixels))
        return [_enlarged(images[k]) for k in range(len(images))], [_caption(each) for each in wanted]


def _family(module: L.LightningModule) -> Family:
    assert isinstance(module, ZipARModule)
    return module.family


def _spread(images: int, classes: int) -> list[int]:
    return [k * classes // images for k in range(images)]


def _caption(wanted: Any) -> str:
    return "features of a caption" if isinstance(wanted, Tensor) else str(wanted)


def _enlarged(picture: Image.Image) -> Image.Image:
    scale = max(1, MIN_PICTURE_SIDE // max(picture.size))
    return picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)

"""Images on their way to codes: read and cropped by loader processes, encoded in batches, in their order."""

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from math import log
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import InterpolationMode, resize
from tqdm import tqdm

from zipar_train.data.crops import Views, views
from zipar_train.data.image_sources import Source
from zipar_train.data.labels import Classes, LabelError, caption
from zipar_train.data.manifest import Layout
from zipar_train.models.family import Fits
from zipar_train.models.t5_features import TextEncoder
from zipar_train.models.tokenizers.base import Tokenizer
from zipar_train.plan.grid import Grid
from zipar_train.run.signals import Heard, held

LABEL = "label error: "  # prefix of reasons that concern labels or captions, not images


class EncodedImage(NamedTuple):
    """An image in the pipeline: with `pixels` from the loader, then `codes`; with neither if it could not be read."""

    number: int
    key: str
    condition: Any = None
    pixels: Tensor | None = None  # uint8 (A, 3, px, px)
    codes: Any = None  # (A, H, W)
    preview: Any = None  # (A, H', W')
    features: Any = None
    reason: str = ""


class Work(Dataset):
    """The cropped images of one process; errors of reading are stored in the row, not raised.

    Of several grids, an image gets the one whose aspect ratio is the closest to its own.
    """

    def __init__(
        self, source: Source, numbers: list[int], stride: int, kind: Views, layout: Layout, classes: Classes | None
    ):
        self.source, self.numbers, self.kind, self.layout, self.classes = source, numbers, kind, layout, classes
        self.sizes = [(rows * stride, columns * stride) for rows, columns in (layout.grid, *(layout.other_grids or ()))]
        self.views = {"one": 1, "flip": 2, "ten": 20}[kind]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> EncodedImage:
        number = self.numbers[index]
        key = self.source.keys[number]
        try:
            image, label = self.source.read(number)
            condition = self._condition(label)
            ratio = image.height / image.width
            height, width = min(self.sizes, key=lambda size: abs(log(size[0] / size[1] / ratio)))
            return EncodedImage(number, key, condition, views(image, height, width, self.kind))
        except LabelError as error:
            return EncodedImage(number, key, reason=f"{LABEL}{error}")
        except Exception as error:  # decoders raise many kinds of errors, and one image must not stop the rest
            return EncodedImage(number, key, reason=f"{type(error).__name__}: {error}")

    def _condition(self, label: Any) -> int | str:
        if self.classes is None or self.layout.classes is None:
            return caption(label)
        found = self.classes.number(label)
        if not 0 <= found < self.layout.classes:
            raise LabelError(f"label {found} is outside 0 .. {self.layout.classes - 1}")
        return found


class Waiting:
    """An iterable over the batches of a loader that measures the seconds spent waiting for them."""

    def __init__(self, loader: DataLoader):
        self.loader, self.seconds = loader, 0.0

    def __iter__(self) -> Iterator[list[EncodedImage]]:
        with held():
            batches = iter(self.loader)
        try:
            while True:
                start = perf_counter()
                batch = next(batches, None)
                self.seconds += perf_counter() - start
                if batch is None:
                    return
                yield batch
        finally:
            del batches  # ends the loader processes, which a traceback would keep alive


def fitting_rows(batches: Iterable[list[EncodedImage]], fitting: Fits | None) -> Iterator[list[EncodedImage]]:
    """Yield the batches without the pixels of images whose captions do not fit the model's prompt."""
    for batch in batches:
        reasons = [fitting.misfit(row.condition) if fitting and row.pixels is not None else "" for row in batch]
        yield [
            row._replace(pixels=None, reason=LABEL + reason) if reason else row
            for row, reason in zip(batch, reasons, strict=True)
        ]


def encoded(
    batches: Iterable[list[EncodedImage]],
    tokenizer: Tokenizer,
    grids: Sequence[Grid],
    encoder: TextEncoder | None,
    device: torch.device,
    bar: tqdm,
    heard: Heard,
) -> Iterator[EncodedImage]:
    """Yield the rows in order, with pixels encoded to codes and, if there is an encoder, captions to features.

    Codes of a preview are those of the image resized to the preview's size.

    Args:
        grids: Grids of different sides; an image's is known by the size of its pixels.

    Raises:
        Stopped: Between two batches, if a signal has been received.
    """
    for batch in batches:
        heard.check()
        good = [row for row in batch if row.pixels is not None]
        codes: dict[int, list[Any]] = {}  # by number: those of the preview and of the image
        for grid in grids:
            size = (grid.height * tokenizer.stride, grid.width * tokenizer.stride)
            some = [row for row in good if row.pixels is not None and row.pixels.shape[-2:] == size]
            if some:
                pixels = torch.cat([row.pixels for row in some if row.pixels is not None]).to(device)
                each = [_encode(pixels, one, tokenizer).unflatten(0, (len(some), -1)) for one in grid.grids]
                codes |= {row.number: [one[k].cpu().numpy() for one in each] for k, row in enumerate(some)}
        features = iter(encoder([row.condition for row in good], device)) if encoder and good else None
        for row in batch:
            if row.pixels is not None:
                feature = next(features).half().cpu().numpy() if features else None
                *previews, image = (each.astype(np.uint16) for each in codes[row.number])
                preview = previews[-1] if previews else None
                row = row._replace(pixels=None, codes=image, preview=preview, features=feature)
            yield row
        bar.update(len(batch))


def _encode(pixels: Tensor, grid: Grid, tokenizer: Tokenizer) -> Tensor:
    """Return the codes (B, H, W) of images resized to the size of a grid."""
    size = [grid.height * tokenizer.stride, grid.width * tokenizer.stride]
    if list(pixels.shape[-2:]) != size:
        pixels = resize(pixels, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return tokenizer.encode(pixels)


def loader_context(workers: int) -> str | None:
    """Return "fork" if loader processes can be forked, which does not require sources to be picklable; else None."""
    return "fork" if workers and "fork" in multiprocessing.get_all_start_methods() else None

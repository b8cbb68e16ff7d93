"""Sample sets: images generated once, by any number of processes, and resumed after an interruption.

The images of a sample set are numbered and split into batches. Process r of R generates batches r, r + R, ... and
writes the codes of each finished batch. The noise and the class or caption of image k depend only on the
seed and k. The folder's name is a hash of everything else that the codes depend on, so a finished batch is never
generated again or confused with another's.
"""

import hashlib
import io
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from zipar_train.decoding.generator import DecodeMode, Generator
from zipar_train.evaluation.report.protocol import INT8
from zipar_train.evaluation.scores.adm_npz import write_images
from zipar_train.evaluation.scores.features import Pictures
from zipar_train.io.files import make_folder, write_atomic
from zipar_train.recipe.schema import SamplingParams


def classes_of(images: int, classes: int, *, seed: int, balanced: bool) -> list[int]:
    """Return the class of each image: 0 .. classes - 1 in turn, or at random, depending only on (seed, k)."""
    if balanced:
        return [k % classes for k in range(images)]
    streams = (np.random.Philox(key=[seed, k], counter=[0, 0, 0, 1]) for k in range(images))  # not the codes' streams
    return [int(np.random.Generator(stream).integers(classes)) for stream in streams]


@dataclass(frozen=True)
class SampleSet:
    """Images of one generator at one window from one seed.

    Attributes:
        root: Folder of all sample sets.
        weights: SHA-256 of the checkpoint.
        conditions: A class or caption for each image.
        origin: Description of their source; a longer list from the same source begins with the shorter one.
        sampling: How codes are sampled.
        mode: See `Generator.generate`.
        size: Height and width in pixels to resize to. None: no resizing.
    """

    root: Path
    generator: Generator = field(repr=False)
    weights: str
    conditions: list[Any] = field(repr=False)
    origin: str
    window: int
    seed: int
    batch_size: int
    sampling: SamplingParams
    mode: DecodeMode = "planned"
    size: tuple[int, int] | None = None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that the codes depend on, except the number of images, which may grow."""
        model, dtype = self.generator.recipe.model, str(self.generator.dtype).removeprefix("torch.")
        return {
            "weights": self.weights,
            "model": model.model_dump(exclude={"weights", "weights_entry", "tokenizer", "tokenizer_weights"}),
            "window": self.window,
            "rule": {} if self.mode == "released" else self.generator.recipe.zipar.rule,
            "mode": self.mode,
            "seed": self.seed,
            "sampling": self.sampling.model_dump(),
            "noise": "SplitMix64",
            "batch_size": self.batch_size,
            "conditions": self.origin,
            "dtype": f"{INT8}, {dtype}" if self.generator.int8 else dtype,
            "device": self.generator.device.type,
        }

    @cached_property
    def folder(self) -> Path:
        how = "" if self.mode == "planned" else f"-{self.mode}"
        how += f"-lookahead-{self.sampling.lookahead}" if self.sampling.lookahead else ""
        how += "-int8" if self.generator.int8 else ""
        name = f"window-{self.window}{how}-seed-{self.seed}"
        return self.root / f"{name}-{_digest(self.settings)[:10]}"

    @cached_property
    def batches(self) -> list[range]:
        """Image numbers of each batch."""
        images = len(self.conditions)
        return [range(start, min(start + self.batch_size, images)) for start in range(0, images, self.batch_size)]

    def path(self, batch: range) -> Path:
        return self.folder / f"{batch.start:06d}-{batch.stop:06d}.npz"

    def make(self, *, rank: int = 0, world: int = 1, progress: bool = True, words: str = "") -> None:
        """Generate the missing batches of this process.

        Raises:
            OSError: If a batch cannot be written.
            ValueError: If a batch does not fit into memory.
        """
        make_folder(self.folder)
        write_atomic(self.folder / "settings.json", (json.dumps(self.settings, indent=1) + "\n").encode())
        mine = self.batches[rank::world]
        left = [batch for batch in mine if self._read(batch) is None]
        times = []
        bar = tqdm(
            total=sum(map(len, mine)),
            initial=sum(map(len, mine)) - sum(map(len, left)),
            unit="images",
            desc=words,
            disable=not progress,
            mininterval=0.1 if sys.stderr.isatty() else 20,
        )
        with bar:
            for batch in left:
                start = perf_counter()
                conditions = self.conditions[batch.start : batch.stop]
                images = self.generator.generate(
                    conditions,
                    window=self.window,
                    seed=self.seed,
                    first=batch.start,
                    mode=self.mode,
                    batch_size=len(batch),
                    pixels=False,
                    **self.sampling.model_dump(),
                )
                if len(batch) == self.batch_size:
                    times.append((perf_counter() - start) / len(batch))
                buffer = io.BytesIO()
                np.savez(buffer, codes=images.codes.numpy().astype(np.uint16), passes=images.passes.numpy())
                write_atomic(self.path(batch), buffer.getvalue())
                bar.update(len(batch))
        if len(times) > 1 and rank == 0:  # the first batch warms up
            speed = {"images_per_second": 1 / median(times[1:]), "batch": self.batch_size}
            write_atomic(self.folder / "speed.json", json.dumps(speed).encode())

    def wait(self, *, every: float = 2.0) -> None:
        """Wait until other processes have generated their batches, checking every `every` seconds."""
        missing = [path for path in map(self.path, self.batches) if not path.is_file()]
        if missing:
            print(f"{self.folder}: waiting for {len(missing)} batches of other processes", file=sys.stderr, flush=True)
        while missing:
            time.sleep(every)
            missing = [path for path in missing if not path.is_file()]

    @property
    def speed(self) -> float | None:
        """Images per second, as measured by this process or an earlier one; None: not measured."""
        try:
            speed = float(json.loads((self.folder / "speed.json").read_bytes())["images_per_second"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return speed if 0 < speed < float("inf") else None

    def codes(self) -> Iterator[Tensor]:
        """Yield batches of codes, int64 (B, H, W).

        Raises:
            ValueError: If a batch is missing or damaged.
        """
        for codes, _ in self._whole():
            yield codes

    def passes(self) -> Tensor:
        """Return the forward passes of each image, int64 (N,).

        Raises:
            ValueError: If a batch is missing or damaged.
        """
        return torch.cat([passes for _, passes in self._whole()])

    def _whole(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            found = self._read(batch)
            if found is None:
                raise ValueError(f"{self.path(batch)} is missing or damaged: run the same command again to generate it")
            yield found

    def pixels(self) -> Iterator[Tensor]:
        """Yield blocks of pixels, uint8 (B, 3, height, width), on the CPU."""
        tokenizer = self.generator.inference_family.tokenizer
        assert tokenizer is not None
        for codes in self.codes():
            yield tokenizer.decode(codes.to(self.generator.device), size=self.size).cpu()

    def pictures(self, words: str = "") -> Pictures:
        return Pictures(self.pixels, len(self.conditions), words=words)

    def write_npz(self) -> Path:
        """Write all images as one file for ADM's evaluator, beside the folder, and return its path."""
        size = self._size()
        path = self.folder.with_name(f"{self.folder.name}-{_named(size)}.npz")
        write_images(path, self.pixels(), count=len(self.conditions), size=size)
        return path

    def write_png(self) -> Path:
        """Write all images as PNG files, `000000.png` and so on, into a new folder beside the set's, and return it."""
        folder = self.folder.with_name(f"{self.folder.name}-{_named(self._size())}")
        make_folder(folder)
        for older in folder.glob("*.png"):
            older.unlink()
        number = 0
        for block in tqdm(
            self.pixels(), total=len(self.batches), desc=folder.name, unit="batch", leave=False, disable=None
        ):
            for image in block.permute(0, 2, 3, 1).numpy():
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "png")
                write_atomic(folder / f"{number:06d}.png", buffer.getvalue())
                number += 1
        return folder

    def _size(self) -> tuple[int, int]:
        """Return the height and width of the images in pixels."""
        height, width = next(self.pixels()).shape[-2:]
        return height, width

    def _read(self, batch: range) -> tuple[Tensor, Tensor] | None:
        """Return the codes and passes of a batch, or None if it is missing or damaged (the archive has checksums)."""
        grid = self.generator.inference_family.grid
        try:
            with np.load(self.path(batch), allow_pickle=False) as file:
                codes, passes = file["codes"], file["passes"]
        except Exception:  # damaged files raise many kinds of errors, all with the same remedy
            return None
        if codes.dtype != np.uint16 or codes.shape != (len(batch), grid.height, grid.width):
            return None
        right = passes.dtype == np.int64 and passes.shape == (len(batch),)
        if not right or passes.min() < 1 or passes.max() > grid.num_codes:
            return None
        found = torch.from_numpy(codes.astype(np.int64))
        known = int(found.max()) < self.generator.inference_family.codebook_size
        return (found, torch.from_numpy(passes)) if known else None


def _named(size: tuple[int, int]) -> str:
    height, width = size
    return f"{width}px" if height == width else f"{height}x{width}px"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

"""Shards of codes: written whole or not at all, read once an epoch in a seeded order that can be resumed.

A shard set is a manifest, `train.json` say, beside its tar files. A sample is `{key}.codes.npy`, uint16 (A, H, W) with
A views of one image, and `{key}.cls`, its class in decimal: plain webdataset. The manifest holds the grid, the
codebook's size, the number of classes, and every shard's count and checksum.
"""

import hashlib
import io
import os
import random
import signal
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from zipar_train.grid import Grid


class Sample(NamedTuple):
    key: str
    codes: NDArray[np.uint16]  # (A, H, W)
    label: int


class Shard(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    samples: int
    sha256: str


class Manifest(BaseModel):
    """What is in a shard set. `grid` is rows and columns of codes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str
    grid: tuple[int, int]
    codes: int
    classes: int
    shards: tuple[Shard, ...]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_shards(
    samples: Iterable[Sample],
    manifest: str | Path,
    *,
    grid: tuple[int, int],
    codes: int,
    classes: int,
    source: str,
    per_shard: int = 5000,
) -> Manifest:
    """Write samples as shards beside a manifest; the manifest comes last, so that a set is whole or absent.

    Args:
        manifest: the file to write, `data/digits/train.json`; shards become `data/digits/train-000000.tar` and so on.
        source: what the images were, in words.
        per_shard: samples a shard.

    Raises:
        ValueError: for a sample off the grid, the codebook or the classes, or no sample at all.
        OSError: if a file cannot be written.
    """
    import webdataset as wds

    manifest = Path(manifest)
    manifest.parent.mkdir(parents=True, exist_ok=True)
    stream = iter(samples)
    shards: list[Shard] = []
    while chunk := list(islice(stream, per_shard)):
        name = f"{manifest.stem}-{len(shards):06d}.tar"
        buffer = io.BytesIO()
        with wds.TarWriter(buffer, encoder=False, mtime=0) as tar:
            for sample in chunk:
                _check(sample, grid, codes, classes, where=f"sample {sample.key}")
                npy = io.BytesIO()
                np.save(npy, sample.codes.astype(np.uint16), allow_pickle=False)
                tar.write({"__key__": sample.key, "codes.npy": npy.getvalue(), "cls": str(sample.label).encode()})
        data = buffer.getvalue()
        write_whole(manifest.parent / name, data)
        shards.append(Shard(name=name, samples=len(chunk), sha256=hashlib.sha256(data).hexdigest()))
    if not shards:
        raise ValueError(f"{manifest}: no samples to write")
    written = Manifest(source=source, grid=grid, codes=codes, classes=classes, shards=tuple(shards))
    write_whole(manifest, (written.model_dump_json(indent=1) + "\n").encode())
    return written


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place and rename it there: it appears whole or not at all.

    Raises:
        OSError: naming the file; nothing is left behind.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def _check(sample: Sample, grid: tuple[int, int], codes: int, classes: int, *, where: str) -> None:
    if sample.codes.ndim != 3 or not len(sample.codes) or sample.codes.shape[1:] != tuple(grid):
        raise ValueError(f"{where}: codes of shape {sample.codes.shape}, not (views, {grid[0]}, {grid[1]})")
    if not np.issubdtype(sample.codes.dtype, np.integer):
        raise ValueError(f"{where}: codes of type {sample.codes.dtype}, not integers")
    if (largest := int(sample.codes.max())) >= codes or int(sample.codes.min()) < 0:
        raise ValueError(f"{where}: code {largest} is outside a codebook of {codes} codes (0 .. {codes - 1})")
    if not 0 <= sample.label < classes:
        raise ValueError(f"{where}: class {sample.label} is outside 0 .. {classes - 1}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_manifest(
    path: str | Path, *, grid: Grid | None = None, codes: int | None = None, classes: int | None = None
) -> Manifest:
    """The manifest of a shard set, checked against what the model expects, its shards' presence included.

    Raises:
        ValueError: naming the file, what is wrong, and the remedy.
    """
    path = Path(path)
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"no shards at {path}: make them with `zipar-train tokenize`, "
            "or set data.train and data.val to the manifests (.json) you have"
        ) from None
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a manifest of shards: {error}") from error
    if not manifest.samples:
        raise ValueError(f"{path} lists no samples: make the shards again with `zipar-train tokenize`")
    for what, has, wants in (
        ("grid", "x".join(map(str, manifest.grid)), f"{grid.height}x{grid.width}" if grid else None),
        ("codebook of", manifest.codes, codes),
        ("number of classes", manifest.classes, classes),
    ):
        if wants is not None and has != wants:
            raise ValueError(
                f"{path}: {what} {has}, but the recipe's model has {wants}. "
                "Use shards made by `zipar-train tokenize` with this recipe, or mend the recipe's model section"
            )
    for shard in manifest.shards:
        if Path(shard.name).name != shard.name:
            raise ValueError(f"{path} names the shard {shard.name!r}: shards lie beside their manifest")
        if not (path.parent / shard.name).is_file():
            raise ValueError(
                f"{path.parent / shard.name} is missing, though {path.name} lists it: copy or make it again"
            )
    return manifest


def read_shard(path: Path, shard: Shard, manifest: Manifest) -> Iterator[Sample]:
    """The samples of one shard, in their order on disk.

    Raises:
        ValueError: if the file is not the one the manifest lists, or a sample is not what it should be; names both.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}. Copy or make it again") from error
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise ValueError(f"{path} is damaged: its checksum is not the manifest's. Copy or make it again")
    try:
        for raw in group_by_keys(tar_file_expander([{"url": str(path), "stream": io.BytesIO(data)}])):
            where = f"{path}, sample {raw['__key__']}"
            try:
                codes = np.load(io.BytesIO(raw["codes.npy"]), allow_pickle=False)
                sample = Sample(raw["__key__"], codes, int(raw["cls"]))
            except (KeyError, ValueError, EOFError) as error:
                raise ValueError(f"{where}: not readable ({error}). Make the shard again") from error
            _check(sample, manifest.grid, manifest.codes, manifest.classes, where=where)
            yield sample
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a readable tar file ({error}). Copy or make it again") from error


class Batch(NamedTuple):
    codes: torch.Tensor  # int64 (B, N), raster order
    labels: torch.Tensor  # int64 (B,)


@dataclass
class Share:
    """One process's part of the readers: rank `index` of `of`."""

    index: int = 0
    of: int = 1


class _Epoch(IterableDataset):
    """The samples of one rank in one epoch, in order, as batches; loader workers split them evenly."""

    def __init__(self, path: Path, manifest: Manifest, *, seed: int, epoch: int, shuffle: int, share: Share, size: int):
        self.path, self.manifest, self.seed, self.epoch, self.shuffle = path, manifest, seed, epoch, shuffle
        self.share, self.size = share, size

    def __iter__(self) -> Iterator[Batch]:
        total, worker = self.manifest.samples, get_worker_info()
        mine = ceil(total / self.share.of)  # the same on every rank; the last wraps round to the first samples
        start = self.share.index * mine
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        start, stop = start + mine * part // parts, start + mine * (part + 1) // parts
        samples = self._range(start, min(stop, total), total)
        if stop > total:
            samples = (
                s for stream in (samples, self._range(max(start - total, 0), stop - total, total)) for s in stream
            )
        if self.shuffle > 1:
            samples = _shuffled(samples, self.shuffle, random.Random(f"{self.seed}-{self.epoch}-{start}"))
        while chunk := list(islice(samples, self.size)):
            yield _collate(chunk)

    def _range(self, start: int, stop: int, total: int) -> Iterator[tuple[NDArray[Any], int]]:
        """Samples start .. stop of the epoch's sequence: the shards in a seeded order, one after another."""
        shards = list(self.manifest.shards)
        if self.shuffle > 1:
            random.Random(f"{self.seed}-{self.epoch}").shuffle(shards)
        at = 0
        for shard in shards:
            low, high = max(start - at, 0), min(stop - at, shard.samples)
            if low < high:
                file = self.path.parent / shard.name
                for number, sample in enumerate(islice(read_shard(file, shard, self.manifest), low, high), at + low):
                    views = len(sample.codes)
                    view = random.Random(f"{self.seed}-{self.epoch}-{number}").randrange(views) if views > 1 else 0
                    yield sample.codes[view].reshape(-1), sample.label
            at += shard.samples


class ShardLoader:
    """A train or validation loader: one epoch an iteration, every sample once, with a position to save and restore.

    With R ranks the samples are dealt in equal parts; if R does not divide them, up to R - 1 are seen twice.

    Args:
        manifest: path of the shard set.
        batch_size: images a batch, on this rank.
        shuffle: samples in the shuffle buffer; 1 keeps the order on disk.
        workers: loader processes.
    """

    def __init__(
        self,
        manifest: str | Path,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: int = 1,
        workers: int = 0,
        share: Share | None = None,
    ):
        self.path, self.manifest = Path(manifest), read_manifest(manifest)
        self.batch_size, self.seed, self.shuffle, self.workers = batch_size, seed, shuffle, workers
        self.share = share or Share()
        self.epoch = self.batches = 0  # the position: batches already given out of this epoch
        self.resumed = False

    def __len__(self) -> int:
        return ceil(ceil(self.manifest.samples / self.share.of) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self.batches and not self.resumed:  # the last iteration was left early
            self._next_epoch()
        self.resumed = False
        samples = _Epoch(
            self.path,
            self.manifest,
            seed=self.seed,
            epoch=self.epoch,
            shuffle=self.shuffle,
            share=self.share,
            size=self.batch_size,
        )
        stream = DataLoader(samples, batch_size=None, num_workers=self.workers, worker_init_fn=_deaf)
        for batch in islice(_rebatched(stream, self.batch_size), self.batches, None):
            self.batches += 1
            if self.batches == len(self):  # before the last batch leaves: no one may ask for a next one
                self._next_epoch()
            yield batch

    def _next_epoch(self) -> None:
        self.epoch, self.batches = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batches, self.resumed = state["epoch"], state["batches"], True


def _deaf(worker: int) -> None:
    """Loader processes leave Ctrl-C to the process that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _shuffled(samples: Iterator[Any], size: int, rng: random.Random) -> Iterator[Any]:
    buffer = list(islice(samples, size))
    for sample in samples:
        i = rng.randrange(size)
        buffer[i], out = sample, buffer[i]
        yield out
    rng.shuffle(buffer)
    yield from buffer


def _collate(chunk: list[tuple[NDArray[Any], int]]) -> Batch:
    codes, labels = zip(*chunk, strict=True)
    return Batch(torch.from_numpy(np.stack(codes).astype(np.int64)), torch.tensor(labels))


def _rebatched(stream: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Batches of one size from workers whose own last batches are short."""
    rest: Batch | None = None
    for batch in stream:
        if rest is not None:
            batch = Batch(torch.cat([rest.codes, batch.codes]), torch.cat([rest.labels, batch.labels]))
        rest = None
        while len(batch.labels) >= size:
            yield Batch(batch.codes[:size], batch.labels[:size])
            batch = Batch(batch.codes[size:], batch.labels[size:])
        if len(batch.labels):
            rest = batch
    if rest is not None:
        yield rest

"""Shards to batches: one epoch an iteration, every sample once, in a seeded order that can be resumed."""

import random
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from zipar_train.shards import Manifest, read_manifest, read_shard


class Batch(NamedTuple):
    codes: torch.Tensor  # int64 (B, N), raster order
    condition: Any  # classes int64 (B,), or B captions: str, or their features (n, F)


@dataclass
class Share:
    """One process's part of the readers: rank `index` of `of`."""

    index: int = 0
    of: int = 1


@dataclass
class _Epoch(IterableDataset):
    """The samples of one rank in one epoch, in order, as batches of `size`; loader workers split them evenly."""

    path: str | Path
    manifest: Manifest
    seed: int
    epoch: int
    shuffle: int
    share: Share
    size: int

    def __iter__(self) -> Iterator[Batch | ValueError]:
        try:
            yield from self._batches()
        except ValueError as error:  # handed over as it is: a loader process would wrap it in its traceback
            yield error

    def _batches(self) -> Iterator[Batch]:
        total, worker = self.manifest.samples, get_worker_info()
        mine = ceil(total / self.share.of)  # the same on every rank; the last wraps round to the first samples
        start = self.share.index * mine
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        start, stop = start + mine * part // parts, start + mine * (part + 1) // parts
        samples: Iterator[Any] = chain(self._range(start, stop), self._range(start - total, stop - total))
        if self.shuffle > 1:
            samples = _shuffled(
                samples, max(1, self.shuffle // parts), random.Random(f"{self.seed}-{self.epoch}-{start}")
            )
        while chunk := list(islice(samples, self.size)):
            yield _collate(chunk)

    def _range(self, start: int, stop: int) -> Iterator[tuple[NDArray[Any], Any]]:
        """What there is of samples start .. stop of the epoch's sequence: the shards in a seeded order, in a row."""
        shards = list(self.manifest.shards)
        if self.shuffle > 1:
            random.Random(f"{self.seed}-{self.epoch}").shuffle(shards)
        at = 0
        for shard in shards:
            low, high = max(start - at, 0), min(stop - at, shard.samples)
            if low < high:
                samples = read_shard(self.path, shard, self.manifest)
                for number, sample in enumerate(islice(samples, low, high), at + low):
                    views = len(sample.codes)
                    view = 0
                    if views > 1 and self.shuffle > 1:
                        view = random.Random(f"{self.seed}-{self.epoch}-{number}").randrange(views)
                    yield (
                        sample.codes[view].reshape(-1).copy(),
                        sample.condition if sample.features is None else sample.features,
                    )
            at += shard.samples


class ShardLoader:
    """A train or validation loader: one epoch an iteration, every sample once, with a position to save and restore.

    With R ranks the samples are dealt in equal parts; if R does not divide them, up to R - 1 are seen twice.

    Args:
        manifest: path or URL of the shard set.
        batch_size: images a batch, on this rank.
        shuffle: samples in the shuffle buffers of all workers together; 1 keeps the order on disk, and each image's
            first view.
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
        self.path, self.manifest = manifest, read_manifest(manifest)
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
            self.path, self.manifest, self.seed, self.epoch, self.shuffle, self.share, size=self.batch_size
        )
        stream = DataLoader(samples, batch_size=None, num_workers=self.workers, worker_init_fn=deaf)
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


def deaf(worker: int) -> None:
    """Loader processes leave signals to the process that trains: Ctrl-C always, SIGTERM the first time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.signal(signum, signal.SIG_DFL))


def _shuffled(samples: Iterator[Any], size: int, rng: random.Random) -> Iterator[Any]:
    buffer = list(islice(samples, size))
    for sample in samples:
        i = rng.randrange(size)
        buffer[i], out = sample, buffer[i]
        yield out
    rng.shuffle(buffer)
    yield from buffer


def _collate(chunk: list[tuple[NDArray[Any], Any]]) -> Batch:
    codes, conditions = zip(*chunk, strict=True)
    condition: Any = list(conditions)
    if isinstance(conditions[0], int):
        condition = torch.tensor(conditions)
    elif all(isinstance(each, np.ndarray) for each in conditions):
        condition = [torch.from_numpy(features) for features in conditions]
    return Batch(torch.from_numpy(np.stack(codes).astype(np.int64)), condition)


def _rebatched(stream: Iterable[Batch | ValueError], size: int) -> Iterator[Batch]:
    """Batches of one size from workers whose own last batches are short; raises the errors they met."""
    rest: Batch | None = None
    for batch in stream:
        if isinstance(batch, ValueError):
            raise batch
        if rest is not None:
            batch = _joined(rest, batch)
        rest = None
        while len(batch.codes) >= size:
            yield Batch(batch.codes[:size], batch.condition[:size])
            batch = Batch(batch.codes[size:], batch.condition[size:])
        if len(batch.codes):
            rest = batch
    if rest is not None:
        yield rest


def _joined(a: Batch, b: Batch) -> Batch:
    lists = isinstance(a.condition, list)
    condition = a.condition + b.condition if lists else torch.cat([a.condition, b.condition])
    return Batch(torch.cat([a.codes, b.codes]), condition)

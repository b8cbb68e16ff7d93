"""The loader from shards to batches: one epoch per iteration, in an `Order` that any number of processes can resume."""

import random
import sys
import threading
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from zipar_train.data.batch import Batch, collate, joined
from zipar_train.data.epoch_order import Order, Share
from zipar_train.data.manifest import Manifest, Shard
from zipar_train.data.sample import Sample
from zipar_train.data.shards import Misfit, read_manifest, read_shard
from zipar_train.io.remote import conceal, is_url
from zipar_train.run.signals import held, ignore_signals

Damaged = Literal["stop", "skip"]


class _Part(NamedTuple):
    """A reader's part of a step: its batch, None if it has no images, and the damage found since the last step."""

    batch: Batch | None
    damaged: dict[str, int]  # description: number of samples


@dataclass
class _Epoch(IterableDataset):
    """One rank's part of each step of an epoch over shards of one grid, split evenly among its loader processes."""

    path: str | Path
    manifest: Manifest
    shards: list[Shard]
    seed: int
    epoch: int
    shuffle: int
    step: int  # images per step
    share: Share
    first: int  # first step
    damaged: Damaged
    misfit: Misfit | None = None

    def __post_init__(self) -> None:
        self.found: dict[str, int] = {}
        if self.shuffle > 1:
            random.Random(f"{self.seed}-{self.epoch}").shuffle(self.shards)
        self.starts = [0, *accumulate(shard.samples for shard in self.shards)]
        self.order = Order(self.starts[-1], len(self.shards), self.step, self.shuffle, f"{self.seed}-{self.epoch}")

    def __iter__(self) -> Iterator[_Part | ValueError]:
        worker = get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        try:
            numbers = self.order.numbers(self.first, self.share, part, parts)
            lanes = {lane: self._read(mine) for lane, mine in numbers.items()}
            for step in range(self.first, self.order.steps):
                low, high = self.order.places(step, self.share, part, parts)
                chunk = [next(lanes[place // self.order.width]) for place in range(low, high)]
                found, self.found = self.found, {}
                yield _Part(collate(chunk) if chunk else None, found)
        except ValueError as error:  # passed on as a value: a loader process would wrap it in its traceback
            yield error

    def _read(self, numbers: list[int]) -> Iterator[tuple[Any, Any, str]]:
        """Yield codes, condition and key of samples given by number in the epoch's sequence; read each shard once."""
        held: dict[int, Any] = {}
        ahead = iter(sorted(set(numbers)))
        left = Counter(numbers)
        shard, samples = -1, []  # type: ignore[var-annotated]
        for number in numbers:
            while number not in held:
                read = next(ahead)
                if read >= self.starts[shard + 1] or shard < 0:
                    shard = bisect(self.starts, read) - 1
                    samples = self._samples(shard)
                held[read] = samples[(read - self.starts[shard]) % len(samples)]
            yield held[number]
            left[number] -= 1
            if not left[number]:
                del held[number]

    def _samples(self, index: int) -> list[tuple[Any, Any, str]]:
        """Return one view of each sample of a shard; if damage is skipped, of the next shard that can be read."""
        for shard in self.shards[index:] + self.shards[:index]:
            bad: list[ValueError] | None = [] if self.damaged == "skip" else None
            try:
                read = read_shard(self.path, shard, self.manifest, bad=bad, misfit=self.misfit)
                numbered = enumerate(read, self.starts[index])
                found = [self._view(number, sample, f"{shard.name}/{sample.key}") for number, sample in numbered]
            except ValueError as error:
                if bad is None:
                    raise
                self.found[str(error)] = shard.samples
                continue
            self.found |= {str(error): 1 for error in bad or ()}
            if found:
                return found
        raise ValueError(f"{self.path}: none of its shards can be read. Copy or make them again")

    def _view(self, number: int, sample: Sample, key: str) -> tuple[Any, Any, str]:
        views, view = len(sample.codes), 0
        if views > 1 and self.shuffle > 1:
            view = random.Random(f"{self.seed}-{self.epoch}-{number}").randrange(views)
        condition = sample.condition if sample.features is None else sample.features
        grids = [sample.codes] if sample.preview is None else [sample.preview, sample.codes]
        return np.concatenate([codes[view].ravel() for codes in grids]), condition, key


class ShardLoader:
    """A training or validation loader: one epoch per iteration, each sample once, with a position to save and restore.

    All images of a step have the same grid. Steps of different grids follow in random order, or one grid after the
    other without shuffling.

    The last step of a shuffled epoch is filled up, so that all steps have the same size: up to `step` - 1 samples occur
    twice. Without shuffling, the last batch is short, and is divided among the ranks as evenly as possible.

    Args:
        manifest: Path or URL of the shard set.
        batch_size: Images per batch on this rank.
        step: Images per optimizer step over all ranks, divided into batches; None: one batch per rank.
        shuffle: Samples in the shuffle buffers of all lanes together; 1 keeps the order on disk, and each image's
            first view.
        workers: Number of loader processes.
        share: This rank's part of each step; None: all of it.
        damaged: Action for shards and samples that cannot be read: stop, or skip and count them in `self.damaged`.
        misfit: Returns why a caption does not fit the model, which counts as damage; see `read_shard`.
        sides: Rows and columns of codes of the images to read, if the set has several grids; None: all images.
        stalled: Seconds without a batch before a warning on standard error; None: no warning.
    """

    def __init__(
        self,
        manifest: str | Path,
        *,
        batch_size: int,
        step: int | None = None,
        seed: int = 0,
        shuffle: int = 1,
        workers: int = 0,
        share: Share | None = None,
        damaged: Damaged = "stop",
        misfit: Misfit | None = None,
        sides: Sequence[int] | None = None,
        stalled: float | None = None,
    ):
        self.path = conceal(str(manifest)) if is_url(manifest) else manifest
        whole = read_manifest(manifest)
        self.manifest = whole.only(sides) if sides else whole
        self.share, self.grids = share or Share(), self.manifest.split()
        self.batch_size, self.step = batch_size, step or batch_size * self.share.of
        assert self.step % (batch_size * self.share.of) == 0
        self.seed, self.shuffle, self.workers, self.stalled = seed, shuffle, workers, stalled
        self.skip: Damaged = damaged
        self.misfit = misfit
        self.epoch = self.batches = 0  # the position: batches of this epoch already yielded
        self.resumed = False
        self.waited = 0.0  # seconds spent waiting for batches
        self.damaged: dict[str, int] = {}  # skipped on this rank, description: number of samples

    @property
    def batches_a_step(self) -> int:
        return self.step // self.share.of // self.batch_size

    def __len__(self) -> int:
        return len(self._turns()) * self.batches_a_step

    def _turns(self) -> list[int]:
        """Return the number of the grid of every step of the epoch."""
        steps = [ceil(sum(shard.samples for shard in shards) / self.step) for _, shards in self.grids]
        turns = [number for number, count in enumerate(steps) for _ in range(count)]
        if self.shuffle > 1:
            random.Random(f"{self.seed}-{self.epoch}-grids").shuffle(turns)
        return turns

    def __iter__(self) -> Iterator[Batch]:
        if self.batches and not self.resumed:  # the last iteration ended early
            self._next_epoch()
        self.resumed = False
        for batch in self._cut(self.batches // self.batches_a_step):
            self.batches += 1
            if self.batches == len(self):  # before the last batch is yielded, since the caller may not ask for more
                self._next_epoch()
            yield batch

    def _cut(self, first: int) -> Iterator[Batch]:
        """Yield batches from step `first` on."""
        turns = self._turns()
        readers = min(self.workers, self.step // self.share.of)
        readers = max(readers // len(self.grids), min(1, readers))  # of each grid
        streams: dict[int, Iterator[Batch | None]] = {}
        for turn in turns[first:]:
            grid, shards = self.grids[turn]
            if turn not in streams:
                streams[turn] = self._parts(self._epoch(list(shards), turns[:first].count(turn)), readers)
            parts = [part for part in islice(streams[turn], max(1, readers)) if part]
            whole = parts[0] if len(parts) == 1 else joined(parts)
            for start in range(0, len(whole.codes), self.batch_size):
                cut = slice(start, start + self.batch_size)
                sides = (grid.height, grid.width)
                yield Batch(whole.codes[cut], whole.condition[cut], whole.keys[cut], sides)

    def _epoch(self, shards: list[Shard], first: int) -> _Epoch:
        """Return the epoch over shards of one grid, from its step `first` on."""
        return _Epoch(
            self.path,
            self.manifest,
            shards,
            self.seed,
            self.epoch,
            self.shuffle,
            self.step,
            self.share,
            first,
            self.skip,
            self.misfit,
        )

    def _parts(self, epoch: _Epoch, readers: int) -> Iterator[Batch | None]:
        """Yield the batches of the readers in turn, and raise their errors."""
        with held():
            batches: Any = iter(DataLoader(epoch, batch_size=None, num_workers=readers, worker_init_fn=ignore_signals))
        since, timer = perf_counter(), self._watched()
        try:
            for part in batches:
                timer.cancel()
                self.waited += perf_counter() - since
                if isinstance(part, ValueError):
                    raise part
                for words, samples in part.damaged.items():
                    if words not in self.damaged:
                        print(f"skipped: {words} ({samples:,} samples)", file=sys.stderr, flush=True)
                self.damaged |= part.damaged
                yield part.batch
                since, timer = perf_counter(), self._watched()
        except RuntimeError as error:  # raised by DataLoader when a loader process died
            raise ValueError(
                f"{self.path}: a loader process died ({str(error).splitlines()[0]}). Where memory ran out, lower "
                "data.workers or data.shuffle"
            ) from error
        finally:
            timer.cancel()
            del batches  # ends the loader processes, which a traceback would keep alive

    def _watched(self) -> threading.Timer:
        """Start a timer that prints a warning if no batch arrives before it is cancelled."""

        def tell() -> None:
            print(
                f"{self.path}: no batch for {self.stalled:g} s (epoch {self.epoch}, batch {self.batches}). A slow disk "
                f"or network, or too few loader processes: data.workers = {self.workers}",
                file=sys.stderr,
                flush=True,
            )

        timer = threading.Timer(self.stalled or 0, tell)
        timer.daemon = True
        if self.stalled is not None:
            timer.start()
        return timer

    def _next_epoch(self) -> None:
        self.epoch, self.batches = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Return the position in steps, which does not depend on the number of ranks."""
        return {"epoch": self.epoch, "steps": self.batches // self.batches_a_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batches, self.resumed = state["epoch"], state["steps"] * self.batches_a_step, True

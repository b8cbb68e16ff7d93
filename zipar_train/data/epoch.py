"""An epoch as one rank reads it: the shards of each grid in their `Order`, and the grids in turn."""

import random
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from zipar_train.data.batch import Batch, collate
from zipar_train.data.epoch_order import Order, Share
from zipar_train.data.manifest import Manifest, Shard
from zipar_train.data.sample import Sample
from zipar_train.data.shards import Misfit, read_shard

Damaged = Literal["stop", "skip"]
Image = tuple[Any, Any, str]  # codes (N,), condition and key


class Part(NamedTuple):
    """A loader process's part of a step: its batch, None if it has no images, and the damage found since its last."""

    batch: Batch | None
    damaged: dict[str, int]  # description: number of samples


@dataclass(kw_only=True)
class GridEpoch:
    """The images of one grid in an epoch.

    Args:
        path, manifest: The shard set.
        shards: Its shards with this grid; shuffled in place.
        seed: Seed of the epoch.
        shuffle, damaged, misfit: See `ShardLoader`.
        step: Images per step over all ranks.
    """

    path: str | Path
    manifest: Manifest
    shards: list[Shard]
    seed: str
    shuffle: int
    step: int
    damaged: Damaged
    misfit: Misfit | None = None

    def __post_init__(self) -> None:
        self.found: dict[str, int] = {}  # damage, description: number of samples
        if self.shuffle > 1:
            random.Random(self.seed).shuffle(self.shards)
        self.starts = [0, *accumulate(shard.samples for shard in self.shards)]
        self.order = Order(self.starts[-1], len(self.shards), self.step, self.shuffle, self.seed)

    def parts(self, first: int, share: Share, part: int, parts: int) -> Iterator[Part]:
        """Yield the images of loader process `part` of `parts` of a rank in each step of this grid from `first` on.

        Raises:
            ValueError: If a shard is damaged, unless damage is skipped and another one can be read.
        """
        numbers = self.order.numbers(first, share, part, parts)
        lanes = {lane: self._read(mine) for lane, mine in numbers.items()}
        for step in range(first, self.order.steps):
            low, high = self.order.places(step, share, part, parts)
            chunk = [next(lanes[place // self.order.width]) for place in range(low, high)]
            found, self.found = self.found, {}
            yield Part(collate(chunk) if chunk else None, found)

    def _read(self, numbers: list[int]) -> Iterator[Image]:
        """Yield samples given by number in the epoch's sequence; read each shard once."""
        held: dict[int, Image] = {}
        ahead = iter(sorted(set(numbers)))
        left = Counter(numbers)
        shard, samples = -1, list[Image]()
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

    def _samples(self, index: int) -> list[Image]:
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
        grid = self.manifest.grid_of(self.shards[index])
        raise ValueError(f"{self.path}: none of its shards of {grid} codes can be read. Copy or make them again")

    def _view(self, number: int, sample: Sample, key: str) -> Image:
        views, view = len(sample.codes), 0
        if views > 1 and self.shuffle > 1:
            view = random.Random(f"{self.seed}-{number}").randrange(views)
        condition = sample.condition if sample.features is None else sample.features
        grids = [sample.codes] if sample.preview is None else [sample.preview, sample.codes]
        return np.concatenate([codes[view].ravel() for codes in grids]), condition, key


class Epoch(IterableDataset):
    """One rank's part of each step of an epoch, split evenly among its loader processes.

    Args:
        grids: The images of each grid.
        turns: For each step of the epoch, the number of its grid.
        first: The first step to read.
        share: The rank's part of each step.
    """

    def __init__(self, grids: Sequence[GridEpoch], turns: Sequence[int], *, first: int, share: Share):
        self.grids, self.turns, self.first, self.share = grids, turns, first, share

    def __iter__(self) -> Iterator[Part | ValueError]:
        worker = get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        before = Counter(self.turns[: self.first])
        streams = [grid.parts(before[k], self.share, part, parts) for k, grid in enumerate(self.grids)]
        try:
            for turn in self.turns[self.first :]:
                yield next(streams[turn])
        except ValueError as error:  # passed on as a value: a loader process would wrap it in its traceback
            yield error

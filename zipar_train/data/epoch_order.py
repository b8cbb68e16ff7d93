"""The order of samples in an epoch, computed before any shard is read and independent of the number of processes.

An epoch is a sequence of steps of B images. Rank r of R takes the r-th of R parts of every step, and each loader
process takes a part of that. The samples, numbered in the order in which shards are read, are divided into lanes. Each
lane is shuffled separately and fills the same places of every step. Therefore a process reads only the shards of its
own places, and a resumed process does not read shards again that it has finished.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil

LANES = 64  # most lanes; each keeps one shard in memory


@dataclass
class Share:
    """The part of each step that one rank takes: part `index` of `of`."""

    index: int = 0
    of: int = 1


@dataclass
class Order:
    """The assignment of samples to places in the steps of an epoch.

    Args:
        samples: Number of samples in all shards.
        shards: Number of shards.
        step: Images per optimizer step over all ranks.
        shuffle: Samples in the shuffle buffers of all lanes together; 1 keeps the order on disk, in one lane.
        seed: Seed of the random generators, combined with the first sample of each lane.
    """

    samples: int
    shards: int
    step: int
    shuffle: int
    seed: str

    def __post_init__(self) -> None:
        self.steps = ceil(self.samples / self.step)
        most = min(max(1, self.shards // 4), LANES)  # a few shards per lane: those at its ends are read twice
        most = most if self.shuffle > 1 else 1
        self.lanes = next(lanes for lanes in range(most, 0, -1) if self.step % lanes == 0)
        self.width = self.step // self.lanes  # places per step that a lane fills

    def places(self, step: int, share: Share, part: int, parts: int) -> tuple[int, int]:
        """Return the range of places in a step that loader process `part` of `parts` of a rank fills."""
        images = self.step if self.shuffle > 1 else min(self.step, self.samples - step * self.step)
        low = min(images * share.index // share.of, images - 1)
        high = max(images * (share.index + 1) // share.of, low + 1)  # a rank without images would hang
        return low + (high - low) * part // parts, low + (high - low) * (part + 1) // parts

    def numbers(self, first: int, share: Share, part: int, parts: int) -> dict[int, list[int]]:
        """Return the samples for a loader process's places from step `first` on, in order, grouped by lane."""
        width, wanted = self.width, dict[int, list[int]]()
        for lane in range(self.lanes):
            low, high = self.places(0, share, part, parts)
            if self.shuffle > 1 and not (lane * width < high and low < (lane + 1) * width):
                continue
            start, stop = (self.samples * at // self.lanes for at in (lane, lane + 1))
            order = range(start, start + self.steps * width if self.shuffle > 1 else stop)  # beyond stop: repeated
            rng = random.Random(f"{self.seed}-{start}")
            buffer = max(1, self.shuffle // self.lanes)
            numbers = enumerate(_shuffled(order, buffer, rng) if self.shuffle > 1 else order)
            mine = wanted[lane] = []
            for step in range(self.steps):
                low, high = self.places(step, share, part, parts)
                for at, number in islice(numbers, width):
                    if step >= first and low <= lane * width + at - step * width < high:
                        mine.append(start + (number - start) % (stop - start))
        return wanted


def _shuffled(samples: range, size: int, rng: random.Random) -> Iterator[int]:
    """Yield the samples in the order in which a shuffle buffer of `size` samples emits them."""
    buffer = list(samples[:size])
    for sample in samples[size:]:
        i = rng.randrange(size)
        buffer[i], out = sample, buffer[i]
        yield out
    rng.shuffle(buffer)
    yield from buffer

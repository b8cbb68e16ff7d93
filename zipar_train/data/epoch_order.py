"""The order of an epoch's samples: numbers alone, before anything is read, the same whoever reads them.

An epoch is a sequence of steps of B images: rank r of R takes its R-th part of every step, and of that part each loader
process its own. The samples, numbered as their shards are read, are cut into lanes that are shuffled apart and fill the
same places of every step. So a process reads the shards of its own places, and a resumed one none that it has passed.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil

LANES = 64  # at most: each keeps a shard open


@dataclass
class Share:
    """One process's part of the readers: rank `index` of `of`."""

    index: int = 0
    of: int = 1


@dataclass
class Order:
    """Which samples fill which places of an epoch's steps.

    Args:
        samples: of all shards together.
        step: images of an optimizer step, over all ranks.
        shuffle: samples in the shuffle buffers of all lanes together; 1 keeps the order on disk, in one lane.
        seed: of a random generator, with the first number of a lane.
    """

    samples: int
    shards: int
    step: int
    shuffle: int
    seed: str

    def __post_init__(self) -> None:
        self.steps = ceil(self.samples / self.step)
        most = min(max(1, self.shards // 4), LANES)  # lanes of a few shards: those at their ends are read twice
        most = most if self.shuffle > 1 else 1
        self.lanes = next(lanes for lanes in range(most, 0, -1) if self.step % lanes == 0)
        self.width = self.step // self.lanes  # places of a step that a lane fills

    def places(self, step: int, share: Share, part: int, parts: int) -> tuple[int, int]:
        """Of a step, those that loader process `part` of `parts` of a rank fills."""
        images = self.step if self.shuffle > 1 else min(self.step, self.samples - step * self.step)
        low = min(images * share.index // share.of, images - 1)
        high = max(images * (share.index + 1) // share.of, low + 1)  # a rank without images would wait
        return low + (high - low) * part // parts, low + (high - low) * (part + 1) // parts

    def numbers(self, first: int, share: Share, part: int, parts: int) -> dict[int, list[int]]:
        """The samples for a loader process's places from step `first` on, in their order, by the lane they are of."""
        width, wanted = self.width, dict[int, list[int]]()
        for lane in range(self.lanes):
            low, high = self.places(0, share, part, parts)
            if self.shuffle > 1 and not (lane * width < high and low < (lane + 1) * width):
                continue
            start, stop = (self.samples * at // self.lanes for at in (lane, lane + 1))
            order = range(start, start + self.steps * width if self.shuffle > 1 else stop)  # beyond stop: once more
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
    """As a buffer of `size` shuffles a stream."""
    buffer = list(samples[:size])
    for sample in samples[size:]:
        i = rng.randrange(size)
        buffer[i], out = sample, buffer[i]
        yield out
    rng.shuffle(buffer)
    yield from buffer

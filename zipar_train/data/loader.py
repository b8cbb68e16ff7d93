"""The loader from shards to batches: one epoch per iteration, in an `Order` that any number of processes can resume."""

import random
import sys
import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import Any

from torch.utils.data import DataLoader

from zipar_train.data.batch import Batch, joined
from zipar_train.data.epoch import Damaged, Epoch, GridEpoch
from zipar_train.data.epoch_order import Share
from zipar_train.data.shards import Misfit, read_manifest
from zipar_train.io.remote import conceal, is_url
from zipar_train.run.signals import held, ignore_signals


class ShardLoader:
    """A training or validation loader: one epoch per iteration, each sample once, with a position to save and restore.

    All images of a step have the same grid. Steps of different grids follow in random order, or one grid after the
    other without shuffling.

    The last step of each grid in a shuffled epoch is filled up, so that all steps have the same size: up to `step` - 1
    samples of a grid occur twice. Without shuffling, the last step of each grid is short, and is divided among the
    ranks and their batches as evenly as possible; a batch without images of its own repeats one.

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
        self.manifest = read_manifest(manifest, sides=sides)
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
        stream = self._parts(self._epoch(turns, first), readers)
        for turn in turns[first:]:
            grid = self.grids[turn][0]
            parts = [part for part in islice(stream, max(1, readers)) if part]
            whole = parts[0] if len(parts) == 1 else joined(parts)
            images, batches = len(whole.codes), self.batches_a_step
            for k in range(batches):  # a short step has as many batches as the others, if need be with an image twice
                low = min(images * k // batches, images - 1)
                cut = slice(low, max(images * (k + 1) // batches, low + 1))
                yield Batch(whole.codes[cut], whole.condition[cut], whole.keys[cut], grid.sides)

    def _epoch(self, turns: list[int], first: int) -> Epoch:
        """Return the epoch whose steps have these grids, from step `first` on."""
        grids = [
            GridEpoch(
                path=self.path,
                manifest=self.manifest,
                shards=list(shards),
                seed=f"{self.seed}-{self.epoch}",
                shuffle=self.shuffle,
                step=self.step,
                damaged=self.skip,
                misfit=self.misfit,
            )
            for _, shards in self.grids
        ]
        return Epoch(grids, turns, first=first, share=self.share)

    def _parts(self, epoch: Epoch, readers: int) -> Iterator[Batch | None]:
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

"""Generation that reports its progress while it runs, and can be stopped."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import Queue
from typing import Any

import torch
from torch import Tensor

from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.generator import Generator
from zipar_train.decoding.images import Images
from zipar_train.decoding.pass_record import PassRecord

PAUSE = 0.1  # seconds between two reports, at least


@dataclass(frozen=True)
class Progress:
    """State of a batch while it is generated.

    Attributes:
        passes: Forward passes so far.
        seconds: Time that they took, without the waits of slow motion.
        codes: int64 (B, H, W), on the CPU; valid where `known`.
        known: Codes that are generated, bool (B, H, W), on the CPU.
        images: The complete images; None before the end.
    """

    passes: int
    seconds: float
    codes: Tensor
    known: Tensor
    images: Images | None = None


class Stop(Exception):
    """Raised inside generation, once nobody waits for its images."""


class LiveGenerator:
    """Generator that reports its progress; one batch at a time, as decoders keep the state of a batch.

    Args:
        generator: The model.
    """

    def __init__(self, generator: Generator):
        self.generator, self.busy = generator, threading.Lock()

    def grow(
        self,
        labels: Sequence[int] | Sequence[str],
        *,
        window: int,
        lookahead: int = 0,
        slow: float = 0,
        **sampling: Any,
    ) -> Iterator[Progress]:
        """Generate images in one batch, and yield their progress about ten times per second and at the end.

        Generation runs in its own thread. It stops in the next pass after the iterator is closed.

        Args:
            labels: Class numbers or captions.
            window: As in `Generator.generate`.
            lookahead: As in `Generator.generate`.
            slow: Seconds per pass, at least, so that people can watch small models.
            sampling: Other arguments of `Generator.generate`.

        Raises:
            ValueError: As `Generator.generate` does.
        """
        reports: Queue[Progress | BaseException] = Queue()
        stopped = threading.Event()

        def work() -> None:
            try:
                with self.busy:
                    watch = Watch(self.generator, window, lookahead, slow, reports, stopped)
                    size, how = len(labels), {"window": window, "lookahead": lookahead, **sampling}
                    images = self.generator.generate(labels, batch_size=size, observe=watch, **how)
                    reports.put(watch.progress(images))
            except BaseException as error:  # raised again where people see it
                reports.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while True:
                report = reports.get()
                while not reports.empty():  # who shows progress slowly gets the latest
                    report = reports.get()
                if isinstance(report, BaseException):
                    raise report
                yield report
                if report.images is not None:
                    return
        finally:
            stopped.set()


class Watch:
    """Observer of a decoder that puts a batch's progress into a queue, slows it down, and stops it.

    Args:
        generator: The model.
        window: As in `Generator.generate`.
        lookahead: As in `Generator.generate`.
        slow: Seconds per pass, at least.
        reports: Takes the progress.
        stopped: Set when nobody waits for the images any longer.
    """

    def __init__(
        self,
        generator: Generator,
        window: int,
        lookahead: int,
        slow: float,
        reports: "Queue[Progress | BaseException]",
        stopped: threading.Event,
    ):
        decoder = generator.decoder(window, lookahead=lookahead)
        assert isinstance(decoder, Decoder)
        self.decoder, self.grid, self.slow = decoder, decoder.family.grid, slow
        self.reports, self.stopped = reports, stopped
        self.record, self.waited = PassRecord(self.grid.num_codes), 0.0
        self.began = self.last = self.shown = time.monotonic()  # of the batch, the last pass and the last report

    def __call__(self, targets: Tensor, logits: Tensor) -> None:
        """Take note of a pass; arguments as in `Decoder`."""
        if self.stopped.is_set():
            raise Stop
        self.record(targets, logits)
        if self.slow:
            self._wait(targets.device)
        if time.monotonic() - self.shown >= PAUSE:
            assert self.decoder.state is not None
            codes = self.decoder.state.tokens[:, : self.grid.num_codes].cpu().clone()
            codes, known = (self.grid.images(each)[-1] for each in (codes, self.record.passes() >= 0))
            self.shown = time.monotonic()
            self.reports.put(Progress(self.record.step, self.shown - self.began - self.waited, codes, known))

    def progress(self, images: Images) -> Progress:
        """Return the last report."""
        seconds = time.monotonic() - self.began - self.waited
        return Progress(int(images.passes.max()), seconds, images.codes, torch.ones_like(images.codes).bool(), images)

    def _wait(self, device: torch.device) -> None:
        """Wait until the pass has taken `slow` seconds."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # else the pass would run during the wait, unmeasured
        now = time.monotonic()
        stopped = self.stopped.wait(max(0.0, self.slow - (now - self.last)))
        self.last = time.monotonic()
        self.waited += self.last - now
        if stopped:
            raise Stop

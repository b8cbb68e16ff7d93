"""Interleaved timing of several ways to do the same work, after warm-up runs; a failure does not affect the others."""

import gc
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor
from tqdm import tqdm

from zipar_train.decoding.memory import Peak
from zipar_train.decoding.place import wait
from zipar_train.models.compiled import never_silently_eager

MOST_WARM_UPS = 6  # runs; a shape is seen, captured and replayed after 2, and compiled for another length after 3
Key = TypeVar("Key", bound=Hashable)


@contextmanager
def turns_bar(turns: int, *, title: str, progress: bool) -> Iterator[Callable[[str], None]]:
    """Show a progress bar; call what it gives with the name of each run.

    Args:
        turns: Expected number of runs. There may be more, if there are several warm-up rounds.
        title: Name of the bar.
        progress: False: show none.
    """
    refresh = 0.1 if sys.stderr.isatty() else 20  # seconds
    with tqdm(total=turns, desc=title, disable=not progress, mininterval=refresh) as bar:

        def tell(run: str) -> None:
            bar.total = max(bar.total, bar.n + 1)
            bar.set_postfix_str(run)
            bar.update()

        yield tell


@dataclass(frozen=True)
class Way:
    """One way to do the work.

    Attributes:
        run: Does the work once; returns its result if results are compared.
        settled: Returns True, after a run, if the next run needs no setup (every CUDA graph is captured).
        release: Frees the memory kept between runs.
    """

    run: Callable[[], Tensor | None]
    settled: Callable[[], bool] = lambda: True
    release: Callable[[], None] = lambda: None


@dataclass
class Timed:
    """Measurements of one way.

    Attributes:
        times: Seconds of each counted run.
        peaks: Peak bytes of each run above those at its start, warm-ups first; None if the system does not report it.
        warm_ups: Number of runs before the counted ones.
        made: Result of the first run, on the CPU.
        failure: Error that stopped the runs, or None.
    """

    times: list[float] = field(default_factory=list)
    peaks: list[int | None] = field(default_factory=list)
    warm_ups: int = 0
    made: Tensor | None = None
    failure: "Trouble | None" = None

    @property
    def middle(self) -> float:
        """Median time of a run, in seconds."""
        return median(self.times)

    @property
    def spread(self) -> float:
        """Difference between the slowest and the fastest run, relative to the median."""
        return (max(self.times) - min(self.times)) / self.middle


@dataclass(frozen=True)
class Trouble:
    """Error message and traceback of a failed run."""

    error: str
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> "Trouble":
        words = (str(error).strip().splitlines() or ["no message"])[0]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return cls(kind + words, "".join(traceback.format_exception(error)))


class Failure(BaseModel):
    """Case that could not be measured, with the error."""

    method: str
    grid: list[int]
    window: int
    batch: int
    error: str
    trace: str  # Python traceback


def take_turns(
    ways: Mapping[Key, Way],
    *,
    rounds: int,
    device: torch.device,
    before: Callable[[Key], Any] = lambda key: None,
    after: Callable[[dict[Key, Timed]], Any] = lambda timed: None,
) -> dict[Key, Timed]:
    """Time several ways, interleaved in every round, so that slowdowns of the machine affect all equally.

    Warm-up rounds come first. A way is warm after a run that compiled nothing and left it settled. A way that raises an
    error is not run again; the others continue.

    Args:
        ways: The ways, by key.
        rounds: Number of counted rounds.
        device: Device to synchronize.
        before: Called with the way's key before each run.
        after: Called with all measurements so far after each counted round.
    """
    timed = {key: Timed() for key in ways}
    cold = set(ways)
    while cold:
        for key in [key for key in ways if key in cold]:
            before(key)
            compiled = compilations()
            went = _run(ways[key], timed[key], device, counted=False)
            if not went or (compilations() == compiled and ways[key].settled()):
                cold.discard(key)
            elif timed[key].warm_ups == MOST_WARM_UPS:
                cold.discard(key)
                words = f"still compiling or capturing after {MOST_WARM_UPS} runs: not a steady state"
                timed[key].failure = Trouble(words, "")
    for _ in range(rounds):
        for key, way in ways.items():
            if timed[key].failure is None:
                before(key)
                _run(way, timed[key], device, counted=True)
        after(timed)
    return timed


def _run(way: Way, timed: Timed, device: torch.device, *, counted: bool) -> bool:
    """Run a way once, record the measurement or the failure, and return True on success."""
    try:
        wait(device)
        with Peak(device) as peak:
            start = perf_counter()
            made = way.run()
            wait(device)
            taken = perf_counter() - start
    except Exception as error:  # memory, kernels, compilers: keep the other rows in any case
        timed.failure = Trouble.of(error)
    else:
        timed.peaks.append(peak.bytes)
        if counted:
            timed.times.append(taken)
        else:
            if not timed.warm_ups and made is not None:
                timed.made = made.cpu()
            timed.warm_ups += 1
        return True
    release([way], device)
    return False


def release(ways: Iterable[Way], device: torch.device) -> None:
    """Free the memory that ways keep between runs."""
    for way in ways:
        way.release()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def compilations() -> int:
    """Return the number of graphs that torch.compile has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@contextmanager
def whole_graphs() -> Iterator[None]:
    """Raise an error if torch.compile leaves code uncompiled within the `with` block.

    Raises:
        RuntimeError: If there is a graph break, or a function reaches PyTorch's recompile limit; names the reasons.
    """
    breaks: Counter[str] = torch._dynamo.utils.counters["graph_break"]
    before = breaks.copy()
    with never_silently_eager():
        yield
    if found := breaks - before:
        raise RuntimeError(f"torch.compile left parts uncompiled: {'; '.join(found)}")

"""Ways of doing the same work, timed in turns, after runs that set them up; one that fails leaves the others alone."""

import gc
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

from zipar_train.benchmark.roofline import wait
from zipar_train.decoding.memory import Peak
from zipar_train.models.compiled import never_silently_eager

MOST_WARM_UPS = 6  # runs; a shape is seen, captured and replayed after 2, and compiled for another length after 3
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Way:
    """One way of doing the work.

    run: does it once; returns what it made, if that is compared.
    settled: whether the next run sets nothing up: every graph is captured. Asked after a run.
    release: gives back the memory that it holds between runs.
    """

    run: Callable[[], Tensor | None]
    settled: Callable[[], bool] = lambda: True
    release: Callable[[], None] = lambda: None


@dataclass
class Timed:
    """What the runs of a way took.

    times: seconds of each counted run.
    peaks: bytes at most beyond those at the start of each run, warm-ups first; None where the system does not tell.
    warm_ups: runs before the counted ones.
    made: what the first run returned, on the CPU.
    failure: why it ran no further.
    """

    times: list[float] = field(default_factory=list)
    peaks: list[int | None] = field(default_factory=list)
    warm_ups: int = 0
    made: Tensor | None = None
    failure: "Trouble | None" = None

    @property
    def middle(self) -> float:
        """Median seconds of a run."""
        return median(self.times)

    @property
    def spread(self) -> float:
        """Slowest less fastest run, over the median."""
        return (max(self.times) - min(self.times)) / self.middle


@dataclass(frozen=True)
class Trouble:
    """An error in words, and where it was raised."""

    error: str
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> "Trouble":
        words = (str(error).strip().splitlines() or ["no message"])[0]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return cls(kind + words, "".join(traceback.format_exception(error)))


class Failure(BaseModel):
    """A measurement that there is no row of, and why."""

    method: str
    grid: list[int]
    window: int
    batch: int
    error: str
    trace: str  # Python's


def take_turns(
    ways: Mapping[Key, Way],
    *,
    rounds: int,
    device: torch.device,
    before: Callable[[Key], Any] = lambda key: None,
    after: Callable[[dict[Key, Timed]], Any] = lambda timed: None,
) -> dict[Key, Timed]:
    """Time several ways: each has its turn in every round, so that a machine that slows down does so for all alike.

    Warm-up rounds come first. A way is warm as soon as a run of it compiled nothing and left it settled. A way that
    raises is not run again, and the others go on.

    Args:
        rounds: that are counted.
        before: called before each run, with the way's key.
        after: called after each counted round, with all that is known by then.
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
    """One run; whether it succeeded."""
    try:
        wait(device)
        with Peak(device) as peak:
            start = perf_counter()
            made = way.run()
            wait(device)
            taken = perf_counter() - start
    except Exception as error:  # memory, kernels, compilers: whatever it is, other rows are kept
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
    """Give back what ways hold between runs."""
    for way in ways:
        way.release()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def compilations() -> int:
    """Graphs that torch.compile has made in this process, whoever asked for them."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@contextmanager
def whole_graphs() -> Iterator[None]:
    """Fail where torch.compile leaves a part of what it compiles as it was, or stops compiling.

    Raises:
        RuntimeError: if a graph broke, or a function has as many versions as PyTorch allows; names the reasons.
    """
    breaks: Counter[str] = torch._dynamo.utils.counters["graph_break"]
    before = breaks.copy()
    with never_silently_eager():
        yield
    if found := breaks - before:
        raise RuntimeError(f"torch.compile left parts uncompiled: {'; '.join(found)}")

"""CUDA graphs of forward passes: the host launches one graph per pass instead of a thousand kernels."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class CudaGraphs:
    """Runner of repeated work: the first call runs eagerly, the second captures a CUDA graph, later calls replay it.

    The work must read and write tensors at fixed addresses and must not read values on the host. All graphs share one
    memory pool, so a result is valid until the next graph runs.

    Args:
        device: CUDA device of the work. Graphs are captured on a stream of this device. The default stream of
            `torch.cuda.graph` belongs to the device that was current at the process's first capture.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any] | None] = {}
        self.pool: Any = None  # set by the first capture
        self.stream: torch.cuda.Stream | None = None  # shared by all graphs of the pool

    @property
    def complete(self) -> bool:
        """True if all work done so far is captured, so that repeating it only replays graphs.

        Work that occurs once per image, for example the prompt's pass, is captured in the second image.
        """
        return len(self.graphs) > 0 and None not in self.graphs.values()

    def __call__(self, key: Hashable, work: Callable[[], Result]) -> Result:
        """Run the work identified by `key` and return its result."""
        if key not in self.graphs:
            self.graphs[key] = None
            return work()  # libraries initialize and torch.compile compiles
        captured = self.graphs[key]
        if captured is None:
            with torch.cuda.device(self.device):
                self.stream = self.stream or torch.cuda.Stream(self.device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    result = work()  # recorded, not executed
            self.pool = graph.pool()
            self.graphs[key] = captured = graph, result
        captured[0].replay()
        return captured[1]

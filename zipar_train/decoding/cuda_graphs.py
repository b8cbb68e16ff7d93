"""Passes as CUDA graphs: the host starts one graph a pass instead of a thousand kernels."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class CudaGraphs:
    """Runs work that is the same every time, apart from what its tensors hold: once as it is, then as a graph.

    What is captured must read and write tensors that stay where they are, and never look at a value. All graphs share
    one pool of memory, so a result holds until the next graph is run.

    Args:
        device: where the work is done. Its graphs are captured on a stream of this device: the stream that
            `torch.cuda.graph` makes otherwise lies on the device that was current at the process's first capture.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any] | None] = {}
        self.pool: Any = None  # known once something has been captured
        self.stream: torch.cuda.Stream | None = None  # the same for all graphs of the pool

    @property
    def complete(self) -> bool:
        """Whether all work that has been done is captured: the same work again only replays graphs.

        Work that an image has once, the prompt's pass for example, is captured in the second image.
        """
        return len(self.graphs) > 0 and None not in self.graphs.values()

    def __call__(self, key: Hashable, work: Callable[[], Result]) -> Result:
        """Do the work known by `key`, and return its result."""
        if key not in self.graphs:
            self.graphs[key] = None
            return work()  # libraries set themselves up, and compilers compile
        captured = self.graphs[key]
        if captured is None:
            with torch.cuda.device(self.device):
                self.stream = self.stream or torch.cuda.Stream(self.device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    result = work()  # recorded, not done
            self.pool = graph.pool()
            self.graphs[key] = captured = graph, result
        captured[0].replay()
        return captured[1]

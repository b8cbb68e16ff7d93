"""CUDA graphs without a GPU: every operator from begin to end is recorded, undone, and repeated on the same tensors.

A real graph forbids three things, which fail here too: reading a value on the host, compiling, and capturing on a
stream of another device than the work's. Python numbers that should have changed from one replay to the next stay what
they were.
"""

import contextlib

import torch
from torch._dynamo.callback import callback_handler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SYNCHRONISING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"}


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators, self.undo = [], []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """As on a GPU, torch.compile works while a graph is recorded; without this it would run uncompiled."""
        return True

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operator.name().split("::")[1].split(".")[0]
        assert name not in SYNCHRONISING, f"{operator} reads a value on the host: a CUDA graph cannot hold it"
        written = [
            value
            for place, argument in enumerate(operator._schema.arguments)
            if argument.alias_info and argument.alias_info.is_write
            for value in tree_leaves(args[place] if place < len(args) else kwargs.get(argument.name))
        ]
        self.undo += [(tensor, tensor.clone()) for tensor in written]
        result = operator(*args, **kwargs)
        self.operators.append((operator, args, kwargs, None if written else result))
        return result


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    recorded = replayed = 0

    def pool(self):
        return None

    def replay(self):
        type(self).replayed += 1
        for operator, args, kwargs, result in self.recorder.operators:
            again = operator(*args, **kwargs)
            if result is not None:
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Stream:
    """In the place of torch.cuda.Stream: on the current device if none is named."""

    def __init__(self, device=None):
        self.device = device or current[-1]


class capture:  # noqa: N801
    """In the place of torch.cuda.graph, whose own stream lies on the device that was current at the first capture."""

    default = None

    def __init__(self, graph, pool=None, stream=None):
        type(graph).recorded += 1
        if stream is None and capture.default is None:
            capture.default = Stream()
        self.stream = stream or capture.default
        graph.recorder = self.recorder = Recorder()
        self.compiled = []

    def __enter__(self):
        assert self.stream.device == current[-1], f"captured on {self.stream.device}, while {current[-1]} is current"
        callback_handler.register_start_callback(self.compiled.append)
        self.recorder.__enter__()

    def __exit__(self, kind, *error):
        self.recorder.__exit__(kind, *error)
        callback_handler.remove_start_callback(self.compiled.append)
        for tensor, before in reversed(self.recorder.undo):  # capturing does nothing
            tensor.copy_(before)
        assert kind or not self.compiled, "torch.compile has compiled inside a captured pass"


@contextlib.contextmanager
def on_device(device):
    """In the place of torch.cuda.device."""
    current.append(torch.device(device))
    try:
        yield
    finally:
        current.pop()


current = [torch.device("cuda", 0)]  # the last is the current one


def install(monkeypatch) -> type[Graph]:
    """CUDA graphs that work on the CPU, two devices; counts begin at zero."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "device", on_device)
    monkeypatch.setattr(capture, "default", None)
    monkeypatch.setattr(Graph, "recorded", 0)
    monkeypatch.setattr(Graph, "replayed", 0)
    return Graph

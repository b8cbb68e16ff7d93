"""CUDA graphs without a GPU: every operator from begin to end is recorded, undone, and repeated on the same tensors.

What a real graph forbids fails here too: reading a value on the host, and Python numbers that should have changed from
one replay to the next stay what they were.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SYNCHRONISING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"}


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators, self.undo = [], []

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
    """In the place of torch.cuda.CUDAGraph and torch.cuda.graph."""

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


class capture:  # noqa: N801
    def __init__(self, graph, pool=None):
        type(graph).recorded += 1
        graph.recorder = self.recorder = Recorder()

    def __enter__(self):
        self.recorder.__enter__()

    def __exit__(self, *error):
        self.recorder.__exit__(*error)
        for tensor, before in reversed(self.recorder.undo):  # capturing does nothing
            tensor.copy_(before)

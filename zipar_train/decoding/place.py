"""The device that a batch is drawn on, and what PyTorch must know of it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from zipar_train.models.attention import attention_kernels
from zipar_train.models.compiled import never_silently_eager

ALIGNED = 8  # keys: kernels copy a mask in every layer whose rows do not begin at multiples of so many numbers


@contextmanager
def drawing_on(device: torch.device) -> Iterator[None]:
    """Run passes on this device.

    It is the current CUDA device: a process may draw on `cuda:1` while `cuda:0` is current, and libraries and compiled
    kernels follow the current one. Attention uses kernels that need no plan for each shape. Compiled layers that reach
    PyTorch's limit of versions fail instead of going on uncompiled.
    """
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with current, attention_kernels(device), never_silently_eager():
        yield


def keys_aligned(device: torch.device) -> int:
    """What the number of keys that a pass attends to is a multiple of, seen or not.

    Memory-efficient attention pads other masks in each layer (PyTorch,
    aten/src/ATen/native/transformers/attention.cpp: `preprocess_mask`).
    """
    return ALIGNED if device.type == "cuda" else 1

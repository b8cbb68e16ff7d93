"""PyTorch settings for generation on a device."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from zipar_train.models.attention import attention_kernels
from zipar_train.models.compiled import never_silently_eager

ALIGNED = 8  # keys: kernels copy a mask in every layer unless its rows start at multiples of this many elements


@contextmanager
def inference_on(device: torch.device) -> Iterator[None]:
    """Set up a device for forward passes within the `with` block.

    The device becomes the current CUDA device, because libraries and compiled kernels use the current one even if the
    model is on another. Attention uses kernels that need no plan per shape. Compiled layers that reach PyTorch's
    recompile limit raise an error instead of falling back to eager mode.
    """
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with current, attention_kernels(device), never_silently_eager():
        yield


def keys_aligned(device: torch.device) -> int:
    """Return the number that a pass's key count, masked keys included, must be a multiple of.

    Memory-efficient attention pads other masks in every layer (PyTorch,
    aten/src/ATen/native/transformers/attention.cpp: `preprocess_mask`).
    """
    return ALIGNED if device.type == "cuda" else 1


def wait(device: torch.device) -> None:
    """Wait until a GPU has done all work given to it; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

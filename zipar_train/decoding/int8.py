"""Linear layer with int8 weights: a quarter of float32's bytes, half of bfloat16's."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

LARGEST = 127  # of symmetric int8
AT_ONCE = 2**22  # elements that are rounded at once, so that their float32 copy is small


class Int8Linear(nn.Module):
    """Linear layer with a frozen int8 weight and no bias.

    The weight is symmetric and has a scale for each output. On a CPU the input is rounded to int8 too, with a scale for
    each row, because PyTorch's products with int8 weights alone are slower there than float32 (docs/performance.md).
    The sums are then exact integers, so a row's output does not depend on the other rows. On other devices the input
    keeps its dtype, and every call converts the weight to that dtype. The Triton kernels do so too, tile by tile.

    Args:
        weight: (N, D), of any floating dtype.

    Attributes:
        weight: int8 (N, D), row-major.
        scale: float32 (N,), also after the module is converted to another dtype. Row n of the original weight is about
            `scale[n] * weight[n]`.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        weight = weight.detach()
        rounded = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(len(weight), 1, device=weight.device)
        rows = max(AT_ONCE // weight.shape[1], 1)
        for first in range(0, len(weight), rows):
            part = slice(first, first + rows)
            rounded[part], scale[part] = to_int8(weight[part])
        self.register_buffer("weight", rounded, persistent=False)
        self.register_buffer("scale", scale[:, 0], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.with_rounded_input(x) if x.device.type == "cpu" else self.with_exact_input(x)

    def with_exact_input(self, x: Tensor) -> Tensor:
        return (linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)

    def with_rounded_input(self, x: Tensor) -> Tensor:
        rows, row_scale = to_int8(x.flatten(0, -2))
        product = torch._int_mm(rows, self.weight.t()).float().mul_(row_scale).mul_(self.scale)
        return product.to(x.dtype).unflatten(0, x.shape[:-1])

    def work_bytes(self, rows: int, size: int) -> int:
        """Return the bytes that a call needs beside its input and output.

        Args:
            rows: Rows of the input.
            size: Bytes per element of the input.
        """
        outputs, inputs = self.weight.shape
        if self.weight.device.type == "cpu":  # the sums in int32 and float32, the input in float32 and int8
            return rows * (outputs * 8 + inputs * 9)
        return outputs * inputs * size + rows * outputs * 4

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.weight.device)  # a model's `to(dtype)` converts all floating buffers
        return self


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix (N, D) to symmetric int8 with a scale for each row, float32 (N, 1)."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny) / LARGEST
    return (x / scale).round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scale


def int8_layers(model: nn.Module) -> list[Int8Linear]:
    return [module for module in model.modules() if isinstance(module, Int8Linear)]


def saved_bytes(model: nn.Module, *, size: int) -> int:
    """Return by how many bytes a model's int8 layers are smaller than with elements of `size` bytes."""
    return sum(layer.weight.numel() * (size - 1) - layer.scale.nbytes for layer in int8_layers(model))

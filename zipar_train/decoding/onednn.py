"""Linear layers for the few rows of a pass on a CPU: frozen weights in oneDNN's own order.

BLAS libraries lay a matrix out anew in every call, which costs more than the product when it has a handful of rows.
oneDNN can be given the matrix laid out once; torch.compile does the same when it freezes a model. A call of it costs
some 30 us, so small layers stay as they are.
"""

import torch
from torch import Tensor, nn

LEAST = 2**17  # numbers of a weight from which on it pays: docs/performance.md


class Packed(nn.Module):
    """A float32 linear layer that can only be applied: its weight has no readable order any more."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, None, "none", [], "")


class Plain(nn.Module):
    """A linear layer of a frozen weight."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.get_buffer("weight"))


def packed(weight: Tensor, *, least: int = LEAST) -> nn.Module:
    """The layer that is fastest for a frozen weight, (out, in): packed if it is large, in float32, on a CPU."""
    fits = weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() >= least
    return Packed(weight) if fits and torch.backends.mkldnn.is_available() else Plain(weight)

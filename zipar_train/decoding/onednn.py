"""Linear layers for passes with few rows on a CPU: frozen weights in oneDNN's blocked layout.

BLAS libraries repack the matrix in every call, which costs more than the product if there are only a few rows. oneDNN
accepts a matrix that is packed once; torch.compile does the same when it freezes a model. A call costs about 30 us, so
small layers are left unchanged.
"""

import torch
from torch import Tensor, nn

MIN_PACKED_ELEMENTS = 2**17  # elements of the smallest weight for which packing pays off: docs/performance.md


class Packed(nn.Module):
    """Float32 linear layer in oneDNN's layout; it can be applied, but its weight can no longer be read."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, None, "none", [], "")


class Plain(nn.Module):
    """Linear layer with a frozen weight and no bias."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.get_buffer("weight"))


def packed(weight: Tensor, *, least: int = MIN_PACKED_ELEMENTS) -> nn.Module:
    """Return the fastest linear layer for a frozen weight (out, in): packed if it is large, float32 and on a CPU.

    Args:
        weight: (out, in).
        least: Smallest weight to pack, in elements.
    """
    fits = weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() >= least
    return Packed(weight) if fits and torch.backends.mkldnn.is_available() else Plain(weight)

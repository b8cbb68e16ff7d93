"""Linear layers for passes with few rows on a CPU: frozen weights in oneDNN's blocked layout.

BLAS libraries repack the matrix in every call, which costs more than the product if there are only a few rows. oneDNN
accepts a matrix that is packed once; torch.compile does the same when it freezes a model. A call costs about 30 us, so
small layers are left unchanged.
"""

import torch
from torch import Tensor, nn

MIN_PACKED_ELEMENTS = 2**17  # elements of the smallest weight for which packing pays off: docs/performance.md


class Packed(nn.Module):
    """Linear layer in oneDNN's layout; it can be applied, but its weight can no longer be read."""

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
    """Return the fastest linear layer for a frozen weight (out, in): packed if it is large and on a CPU.

    Float32 is packed, and bfloat16 if the CPU has instructions for it.

    Args:
        weight: (out, in).
        least: Smallest weight to pack, in elements.
    """
    fits = weight.device.type == "cpu" and weight.numel() >= least and torch.backends.mkldnn.is_available()
    if weight.dtype == torch.bfloat16:
        fits = fits and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return Packed(weight) if fits and weight.dtype in (torch.float32, torch.bfloat16) else Plain(weight)

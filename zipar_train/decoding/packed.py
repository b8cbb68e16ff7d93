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

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack(model: nn.Module, *, least: int = LEAST) -> None:
    """Replace a model's large float32 linear layers on a CPU by packed ones, one by one; leave all others alone.

    The model draws as before, up to rounding, and can be neither trained nor saved any more.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is not nn.Linear or child.weight.numel() < least:
                continue
            if child.weight.dtype == torch.float32 and child.weight.device.type == "cpu":
                setattr(parent, name, Packed(child))

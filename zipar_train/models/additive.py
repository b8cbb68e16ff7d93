"""Attention masks as numbers, converted once for all layers of a model."""

from typing import Any

import torch
from torch import Tensor


def additive(mask: Any, dtype: torch.dtype) -> Any:
    """A bool mask as the numbers that attention adds to its scores: 0 where a query sees a key, -infinity elsewhere.

    `scaled_dot_product_attention` converts a bool mask in every call, and autograd keeps each copy until the backward
    pass: 137 MB in each of Emu3's 32 layers (aten/src/ATen/native/transformers/attention.cpp,
    `convert_boolean_attn_mask`). One conversion serves all layers, and the sums are the same. Rows are stored at a
    stride that is a multiple of 8 numbers; with any other, the memory-efficient CUDA kernel copies the mask in every
    call (`pad_bias` in the same file).

    Args:
        mask: bool (..., Q, K); anything else, a BlockMask say, is returned as it is.
        dtype: of the queries when they reach attention.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return mask
    keys = mask.shape[-1]
    found = torch.zeros(*mask.shape[:-1], -(-keys // 8) * 8, dtype=dtype, device=mask.device)[..., :keys]
    return found.masked_fill_(~mask, -torch.inf)


def computed_in(x: Tensor) -> torch.dtype:
    """The type that attention computes in: autocast's where it is on and applies, otherwise that of the numbers."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype

"""Conversion of bool attention masks to additive ones, once for all layers of a model."""

import torch
from torch import Tensor

from zipar_train.plan.masks import Mask


def additive(mask: Mask, dtype: torch.dtype) -> Mask:
    """Return a bool mask as an additive mask: 0 where a query attends to a key, -infinity elsewhere.

    `scaled_dot_product_attention` converts a bool mask in every call, and autograd keeps each copy until the backward
    pass: 137 MB in each of Emu3's 32 layers (aten/src/ATen/native/transformers/attention.cpp,
    `convert_boolean_attn_mask`). One conversion serves all layers and gives the same scores. Rows are stored with a
    stride that is a multiple of 8 elements; otherwise, the memory-efficient CUDA kernel copies the mask in every call
    (`pad_bias` in the same file).

    Args:
        mask: bool (..., Q, K); anything else, such as a BlockMask, is returned unchanged.
        dtype: The dtype of the queries in attention.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return mask
    keys = mask.shape[-1]
    found = torch.zeros(*mask.shape[:-1], -(-keys // 8) * 8, dtype=dtype, device=mask.device)[..., :keys]
    return found.masked_fill_(~mask, -torch.inf)


def computed_in(x: Tensor) -> torch.dtype:
    """Return the dtype that attention computes in: autocast's if it is enabled and applies, otherwise that of `x`."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype

"""Attention masks of a plan: a mask_mod, a dense bool mask for sdpa, a BlockMask for FlexAttention.

Example: 3 x 3 codes at window 1, row = query, column = key, in decode order (P prompt, S stand-in for code 5):

        P 0 1 2 3 S 4 6 5 7
    P   #
    0   # #
    1   # # #
    2   # # # #
    3   # # # # #
    S   # # # # # #
    4   # # # # # . #
    6   # # # # # # # #
    5   # # # # # . # . #
    7   # # # # # . # # # #

`zipar-train plan --recipe digits --png mask.png` plots larger ones.
"""

from collections.abc import Callable
from typing import overload

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import pad

from zipar_train.plan.table import NEVER, Plan, sees

Device = torch.device | str
Mask = Tensor | BlockMask  # dense: bool, or 0 and -infinity, (1 or B, 1, queries, keys)


def mask_mod(plan: Plan, *, device: Device = "cpu") -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return FlexAttention's `mask_mod(b, h, q, k) -> bool` over the plan's slots."""
    step, position, expires = (torch.tensor(v, device=device) for v in (plan.step, plan.position, plan.expires))

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees(step, position, expires, q, k)

    return visible


def dense(plan: Plan, *, device: Device = "cpu") -> Tensor:
    """Return the mask as bool (1, 1, S, S), True where a query attends to a key.

    Pass it as `attention_mask=` to any transformers model under sdpa; eager attention would *add* it (transformers 5).
    """
    return torch.tensor(plan.visible(), device=device)[None, None]


def block(plan: Plan, *, device: Device = "cpu") -> BlockMask:
    """Return FlexAttention's BlockMask (S, S), `attention_mask=` under attn_implementation "flex_attention"."""
    return create_block_mask(mask_mod(plan, device=device), None, None, len(plan), len(plan), device=str(device))


def unwritten_slots_mask(plan: Plan, *, device: Device = "cpu") -> Tensor:
    """Return bool (1, 1, S, N): raster codes before a query's position that are not yet fed in the query's pass.

    A plan's masks hide them. The released decoder attends to them, as zero keys and values in its cache.
    """
    first = np.full(plan.grid.num_codes, NEVER)
    image = plan.position >= 0
    np.minimum.at(first, plan.position[image], plan.step[image])
    before = np.arange(plan.grid.num_codes)[None] <= plan.position[:, None]
    return torch.tensor(before & (first[None] > plan.step[:, None]), device=device)[None, None]


@overload
def mask_padding(mask: Tensor, padding: Tensor, *, slots: Tensor | None = None) -> Tensor: ...
@overload
def mask_padding(mask: BlockMask, padding: Tensor, *, slots: Tensor | None = None) -> BlockMask: ...
def mask_padding(mask: Mask, padding: Tensor, *, slots: Tensor | None = None) -> Mask:
    """Return a plan's mask for B images with padded prompts: padding is hidden from all slots but itself.

    Args:
        mask: (1, 1, queries, keys) or a BlockMask, over slots that begin with the prompt.
        padding: bool (B, P), True at padding tokens.
        slots: Slot index of each query of a dense mask, int64 (1 or B, queries); None if queries and keys are the same.
    """
    if isinstance(mask, BlockMask):
        queries, keys = mask.seq_lengths
        is_padding, visible = pad(padding, (0, keys - padding.shape[1])), mask.mask_mod

        def unpadded(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return visible(b, h, q, k) & (~is_padding[b, k] | (q == k))

        return create_block_mask(unpadded, len(padding), None, queries, keys, device=str(padding.device))
    is_padding = pad(padding, (0, mask.shape[-1] - padding.shape[1]))
    columns = torch.arange(mask.shape[-1], device=mask.device)
    itself = (columns[None] if slots is None else slots)[:, None, :, None] == columns
    return mask & (~is_padding[:, None, None] | itself)

"""A plan's visibility as attention masks: a mask_mod, a dense bool for sdpa, a BlockMask for FlexAttention.

3 x 3 codes at window 1, row = query, column = key, in decode order (P prompt, S stand-in for code 5):

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

`zipar-train plan --recipe digits --png mask.png` draws larger ones.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from zipar_train.plan import Plan, sees

Device = torch.device | str


def mask_mod(plan: Plan, *, device: Device = "cpu") -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's `mask_mod(b, h, q, k) -> bool` over the plan's slots."""
    step, position, expires = (torch.tensor(v, device=device) for v in (plan.step, plan.position, plan.expires))

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees(step, position, expires, q, k)

    return visible


def dense(plan: Plan, *, device: Device = "cpu") -> Tensor:
    """Bool (1, 1, S, S), True where a query sees a key: `attention_mask=` of any transformers model under sdpa.

    Eager attention would *add* a bool mask (transformers 5); use sdpa.
    """
    return torch.tensor(plan.visible(), device=device)[None, None]


def block(plan: Plan, *, device: Device = "cpu") -> BlockMask:
    """FlexAttention's BlockMask of (S, S): `attention_mask=` under attn_implementation "flex_attention"."""
    return create_block_mask(mask_mod(plan, device=device), None, None, len(plan), len(plan), device=str(device))

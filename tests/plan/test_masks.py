"""The three forms of the mask are one mask."""

import numpy as np
import torch
from hypothesis import given, settings
from plans import plans
from torch.nn.attention.flex_attention import create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from zipar_train import Grid, Plan
from zipar_train.plan.masks import block, dense, mask_mod


@given(plans())
@settings(max_examples=40)
def test_dense_is_the_rule_written_out(plan):
    slots = range(len(plan))
    rule = [
        [bool(plan.step[k] <= plan.step[q] < plan.expires[k] and plan.position[k] <= plan.position[q]) for k in slots]
        for q in slots
    ]
    assert np.array_equal(plan.visible(), rule)
    assert torch.equal(dense(plan)[0, 0], torch.tensor(rule))
    assert torch.equal(create_mask(mask_mod(plan), 1, 1, len(plan), len(plan), device="cpu"), dense(plan))


def test_block_mask_attends_as_dense_does():
    for window in (24, 8, 1):
        plan = Plan.zipar(Grid(24, 24), window=window)
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 1, 2, len(plan), 16, dtype=torch.float64)
        flex = flex_attention(q, k, v, block_mask=block(plan))
        sdpa = scaled_dot_product_attention(q, k, v, attn_mask=dense(plan))
        assert (flex - sdpa).abs().max() < 1e-12


def test_the_mask_of_a_small_grid_as_a_picture():
    """3 x 3, window 1, by hand. Slots in decode order: prompt, row 0, then rows as they open; S: stand-in."""
    plan = Plan.zipar(Grid(3, 3), window=1)
    picture = ["".join("#" if seen else "." for seen in row) for row in plan.visible()]
    names = [
        "P" if s < 0 else ("S" if e < 99 else "x") + str(s) for s, e in zip(plan.source, plan.expires, strict=True)
    ]
    assert names == ["P", "x0", "x1", "x2", "x3", "S2", "x4", "x6", "x5", "x7"]
    assert picture == [
        "#.........",
        "##........",
        "###.......",
        "####......",
        "#####.....",
        "######....",
        "#####.#...",
        "########..",
        "#####.#.#.",
        "#####.####",
    ]

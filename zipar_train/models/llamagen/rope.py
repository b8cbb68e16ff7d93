"""Rotary embedding on a grid: half of a head's frequencies rotate with the row, half with the column."""

import torch
from torch import Tensor, nn


class Rope2D(nn.Module):
    """LlamaGen's 2-D rotary embedding (autoregressive/models/gpt.py, precompute_freqs_cis_2d) in transformers' layout.

    At prompt tokens cos = sin = 0 (not the identity rotation), so their queries and keys are zero. The module has no
    buffers, so nothing is lost on the meta device or in a cast.

    Args:
        head: Dimension of an attention head, a multiple of 4.
        columns: Codes per row.
        prompt: Tokens before the first code, which position_ids include.
        base: Base of the rotary frequencies.
    """

    def __init__(self, head: int, columns: int, prompt: int, base: float = 10000.0):
        super().__init__()
        assert head % 4 == 0, head
        self.head, self.columns, self.prompt, self.base = head, columns, prompt, base

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each (B, S, head) in x's dtype, for position_ids (B, S) that start at the prompt."""
        # computed in float32, or in float64 for a float64 model
        dtype = torch.promote_types(x.dtype, torch.float32)
        exponents = torch.arange(0, self.head // 2, 2, device=x.device, dtype=dtype) / (self.head // 2)
        place = position_ids - self.prompt
        row, column = (place // self.columns)[..., None], (place % self.columns)[..., None]
        angles = torch.cat([row / self.base**exponents, column / self.base**exponents], dim=-1)
        angles = torch.cat([angles, angles], dim=-1)
        image = (place >= 0)[..., None]
        return (angles.cos() * image).to(x.dtype), (angles.sin() * image).to(x.dtype)

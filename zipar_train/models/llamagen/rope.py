"""Rotary positions on a grid: half of a head's frequencies turn with the row, half with the column."""

import torch
from torch import Tensor, nn


class Rope2D(nn.Module):
    """LlamaGen's 2-D rotary embedding (autoregressive/models/gpt.py, precompute_freqs_cis_2d) in transformers' layout.

    Prompt tokens rotate by *zero*, not by identity: cos = sin = 0, so their queries and keys vanish. No buffers, so
    nothing is lost on the meta device or in a cast.

    Args:
        head: width of an attention head, a multiple of 4.
        columns: codes in a row.
        prompt: tokens before the first code; position_ids count them.
    """

    def __init__(self, head: int, columns: int, prompt: int, base: float = 10000.0):
        super().__init__()
        assert head % 4 == 0, head
        self.head, self.columns, self.prompt, self.base = head, columns, prompt, base

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each (B, S, head) in x's dtype, for position_ids (B, S) that start at the prompt."""
        # a float32 reference, except that a float64 model keeps float64
        dtype = torch.promote_types(x.dtype, torch.float32)
        exponents = torch.arange(0, self.head // 2, 2, device=x.device, dtype=dtype) / (self.head // 2)
        place = position_ids - self.prompt
        row, column = (place // self.columns)[..., None], (place % self.columns)[..., None]
        angles = torch.cat([row / self.base**exponents, column / self.base**exponents], dim=-1)
        angles = torch.cat([angles, angles], dim=-1)
        image = (place >= 0)[..., None]
        return (angles.cos() * image).to(x.dtype), (angles.sin() * image).to(x.dtype)

"""What a batch of images is drawn on: its codes, its cache and its counters, allocated once for a batch size."""

from typing import Any

import torch
from torch import Tensor

from zipar_train.decoding.cache import SlotCache
from zipar_train.decoding.memory import check_memory
from zipar_train.models.family import Family
from zipar_train.plan.table import ROW_END, Plan


class DecodeState:
    """Tensors that stay where they are from pass to pass and from batch to batch.

    Args:
        images: B.
        prompt: (R, P, D), R = B, or 2 B under guidance.
        padding: bool (R, P), or None.
        slots: of the cache.

    Raises:
        BatchTooLarge: if memory cannot hold it; names the batch that fits.
    """

    def __init__(self, family: Family, plan: Plan, images: int, prompt: Tensor, padding: Tensor | None, *, slots: int):
        check_memory(family, plan, images, rows=len(prompt), slots=slots)
        device, codes = family.model.device, plan.grid.codes
        self.prompt = prompt.new_empty(prompt.shape)
        self.padding = None if padding is None else padding.new_empty(padding.shape)
        self.tokens = torch.empty(images, codes + 1, dtype=torch.long, device=device)
        self.uniforms = torch.empty(images, codes, device=device)
        self.slot = torch.zeros((), dtype=torch.long, device=device)  # the next to be fed
        self.code = torch.zeros((), dtype=torch.long, device=device)  # how many have been drawn
        self.cache = SlotCache(family.model, rows=len(prompt), slots=slots)

    def fits(self, images: int, prompt: Tensor) -> bool:
        return len(self.tokens) == images and self.prompt.shape == prompt.shape and self.prompt.dtype == prompt.dtype

    def begin(self, prompt: Tensor, padding: Tensor | None, uniforms: Tensor) -> None:
        """A new batch: nothing of the last one is left to be seen, finished or not."""
        self.prompt.copy_(prompt)
        if self.padding is not None and padding is not None:
            self.padding.copy_(padding)
        self.uniforms.copy_(uniforms)
        self.tokens.fill_(ROW_END)
        self.slot.zero_()
        self.code.zero_()


def prompts(family: Family, condition: Any, *, guided: bool) -> tuple[Tensor, Tensor | None]:
    """Embeddings (R, P, D) of B images' prompts, and which of their tokens are padding, bool (R, P), or None.

    R = B; guided 2 B: those of the same images made unconditional stand below.

    Args:
        condition: of B images, checked.
    """
    prompt, padding = family.prompt(condition), family.padding(condition)
    if not guided:
        return prompt, padding
    null = family.drop(condition, torch.ones(len(prompt), dtype=torch.bool, device=prompt.device))
    below = family.padding(null)
    both = None if padding is None or below is None else torch.cat([padding, below])
    return torch.cat([prompt, family.prompt(null)]), both

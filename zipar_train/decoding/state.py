"""Decoding state of a batch: codes, cache and counters, allocated once per batch size."""

import torch
from torch import Tensor

from zipar_train.decoding.cache import SlotCache
from zipar_train.decoding.memory import check_memory
from zipar_train.models.conditions import Condition
from zipar_train.models.family import Family
from zipar_train.plan.table import ROW_END, Plan


class DecodeState:
    """Tensors of a batch, at fixed addresses from pass to pass and from batch to batch.

    Args:
        family: The generator.
        plan: A plan on the family's grid.
        images: B.
        prompt: (R, P, D), R = B, or 2 B under guidance.
        padding: bool (R, P), True where a token is padding; None: no padding.
        slots: Number of slots of the cache.
        lookahead: Slots that a pass feeds of each image; 0: those of a step.

    Raises:
        BatchTooLarge: If the batch does not fit into memory; names the largest that does.
    """

    def __init__(
        self,
        family: Family,
        plan: Plan,
        images: int,
        prompt: Tensor,
        padding: Tensor | None,
        *,
        slots: int,
        lookahead: int,
    ):
        check_memory(family, plan, images, rows=len(prompt), slots=slots, lookahead=lookahead)
        self.lookahead = lookahead
        device, codes = family.model.device, plan.grid.num_codes
        self.prompt = prompt.new_empty(prompt.shape)
        self.padding = None if padding is None else padding.new_empty(padding.shape)
        # codes, the token of row ends, and a column for slots that predict no code
        self.tokens = torch.empty(images, codes + 2, dtype=torch.long, device=device)
        self.seeds = torch.zeros(images, codes + 2, dtype=torch.long, device=device)
        self.slot = torch.zeros(images, dtype=torch.long, device=device)  # next slot to feed
        self.passes = torch.zeros(images, dtype=torch.long, device=device)  # forward passes so far
        self.cache = SlotCache(family.model, rows=len(prompt), slots=slots)

    def fits(self, images: int, prompt: Tensor, lookahead: int) -> bool:
        same = self.prompt.shape == prompt.shape and self.prompt.dtype == prompt.dtype
        return same and len(self.tokens) == images and self.lookahead == lookahead

    def begin(self, prompt: Tensor, padding: Tensor | None, seeds: Tensor) -> None:
        """Reset the state for a new batch, so that nothing of the last one is visible."""
        self.prompt.copy_(prompt)
        if self.padding is not None and padding is not None:
            self.padding.copy_(padding)
        self.seeds[:, :-2].copy_(seeds)
        self.tokens.zero_()
        self.tokens[:, -2] = ROW_END
        self.slot.zero_()
        self.passes.zero_()


def prompts(family: Family, condition: Condition, *, guided: bool) -> tuple[Tensor, Tensor | None]:
    """Return prompt embeddings (R, P, D) of B images, and their padding mask, bool (R, P), or None.

    Args:
        family: The generator.
        condition: Checked conditions of B images.
        guided: R = 2 B instead of B: the unconditional prompts of the same images are appended.
    """
    prompt, padding = family.prompt(condition), family.padding(condition)
    if not guided:
        return prompt, padding
    null = family.drop(condition, torch.ones(len(prompt), dtype=torch.bool, device=prompt.device))
    below = family.padding(null)
    both = None if padding is None or below is None else torch.cat([padding, below])
    return torch.cat([prompt, family.prompt(null)]), both

"""A record of the pass that generates each code."""

import torch
from torch import Tensor

from zipar_train.decoding.adaptive.decoder import AdaptiveDecoder
from zipar_train.decoding.decoder import Decoder, Observer


class PassRecord:
    """Observer of a `Decoder` that notes the pass in which each code became final, needed with lookahead.

    Args:
        codes: The number of codes of an image, N.
    """

    def __init__(self, codes: int):
        self.codes, self.step = codes, 0
        self.at: Tensor | None = None  # (B, N + 2), as the decoder's token buffer

    def __call__(self, targets: Tensor, logits: Tensor) -> None:
        """Note a pass; `targets` (B, K) are the codes that it made final, or N + 1."""
        if self.at is None:
            self.at = torch.full((len(targets), self.codes + 2), -1, device=targets.device)
        self.at.scatter_(1, targets, self.step)
        self.step += 1

    def passes(self) -> Tensor:
        """Return the pass of each code, from 0, int64 (B, N), on the CPU."""
        assert self.at is not None
        return self.at[:, : self.codes].cpu()


def planned_passes(decoder: Decoder | AdaptiveDecoder, images: int) -> Tensor:
    """Return the pass that generated each code of the last batch without lookahead, int64 (B, N), by its plans."""
    plans = decoder.plans(images) if isinstance(decoder, AdaptiveDecoder) else [decoder.plan] * images
    return torch.stack([torch.from_numpy(plan.generated_at()) for plan in plans])


def both(first: Observer | None, second: Observer | None) -> Observer | None:
    """Return an observer that calls two, or the only one."""
    if first is None or second is None:
        return first or second

    def call(targets: Tensor, logits: Tensor) -> None:
        first(targets, logits)
        second(targets, logits)

    return call

"""What predictions of codes are worth, some at a time: all codes' logits at once would be gigabytes.

A 720 px image of Emu3 has 8,100 codes out of 32,768: their log-probabilities are 1 GB in float32, and training keeps
several such tensors. So the head is applied to parts, each once more in the backward pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss
from torch.utils.checkpoint import checkpoint

AT_ONCE = 2**27  # logits: 512 MB in float32

Head = Callable[[Tensor], Tensor]


def losses(
    head: Head,
    hidden: Tensor,
    codes: Tensor,
    *,
    size: int,
    teacher: tuple[Head, Tensor] | None = None,
    at_once: int = AT_ONCE,
) -> tuple[Tensor, Tensor | None]:
    """Means over codes, in nats: the negative log-likelihood; and KL(teacher || ours) if there is a teacher.

    Args:
        head: hidden states (M, D) to logits (M, V).
        hidden: that predict the codes, (B, N, D).
        codes: int64 (B, N).
        size: of the codebook, V.
        teacher: its head and its hidden states, (B, N, D').
        at_once: most logits made at a time.
    """
    codes, most = codes.flatten(), max(1, at_once // size)
    states = (hidden.flatten(0, 1), teacher[1].flatten(0, 1) if teacher else None)
    other = teacher[0] if teacher else None
    if len(codes) <= most:
        return _part(head, other, codes, *states)
    nlls, divergences = [], []
    for start in range(0, len(codes), most):
        part = [None if x is None else x[start : start + most] for x in (codes, *states)]
        nll, divergence = checkpoint(_part, head, other, *part, use_reentrant=False)
        share = len(codes[start : start + most]) / len(codes)
        nlls.append(share * nll)
        if divergence is not None:
            divergences.append(share * divergence)
    return torch.stack(nlls).sum(), torch.stack(divergences).sum() if divergences else None


def _part(
    head: Head, other: Head | None, codes: Tensor, hidden: Tensor, theirs: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    predicted = _log_probabilities(head(hidden))
    nll = nll_loss(predicted, codes)
    if other is None or theirs is None:
        return nll, None
    with torch.no_grad():
        wanted = _log_probabilities(other(theirs))
    return nll, kl_div(predicted, wanted, log_target=True, reduction="batchmean")


def _log_probabilities(logits: Tensor) -> Tensor:
    """Float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

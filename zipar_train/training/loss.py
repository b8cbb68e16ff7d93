"""Losses of predicted codes, computed in chunks: the logits of all codes at once would take gigabytes.

A 720 px image of Emu3 has 8,100 codes from a codebook of 32,768. Their log-probabilities take 1 GB in float32, and
training keeps several such tensors. The head is therefore applied in chunks, which the backward pass recomputes.
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
    """Return the mean negative log-likelihood of codes, and the mean KL(teacher || model) or None, in nats per code.

    Args:
        head: Maps hidden states (M, D) to logits (M, V).
        hidden: Hidden states that predict the codes, (B, N, D).
        codes: int64 (B, N).
        size: Codebook size, V.
        teacher: The teacher's head and hidden states, (B, N, D').
        at_once: Largest number of logits computed at a time.
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
    """Return log-probabilities in float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

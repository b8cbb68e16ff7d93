"""The loss a part of the codes at a time, against all at once."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from zipar_train.training.loss import losses


@pytest.mark.parametrize("at_once", [7, 30, 75, 1000])
@pytest.mark.parametrize("taught", [False, True])
def test_parts_are_the_whole_and_no_larger_than_asked(at_once, taught):
    torch.manual_seed(0)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    other = torch.randn(5, 4, dtype=torch.float64)
    hidden = torch.randn(2, 8, 3, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(2, 8, 4, dtype=torch.float64)
    codes = torch.randint(5, (2, 8))
    made = []

    def head(states):
        logits = states @ weight.T
        made.append(logits.numel())
        return logits

    teacher = ((lambda states: states @ other.T), theirs) if taught else None
    nll, divergence = losses(head, hidden, codes, size=5, teacher=teacher, at_once=at_once)
    loss = nll + (divergence if taught else 0)
    found = torch.autograd.grad(loss, (weight, hidden))
    assert max(made) <= max(at_once, 5)
    assert len(made) == (1 if at_once == 1000 else 2 * -(-16 // (at_once // 5)))  # each once more, going back

    logits = (hidden @ weight.T).flatten(0, 1)
    whole = cross_entropy(logits, codes.flatten())
    assert abs(nll - whole) < 1e-12
    if taught:
        wanted = (theirs @ other.T).flatten(0, 1).softmax(-1)
        kl = kl_div(logits.log_softmax(-1), wanted, reduction="batchmean")
        assert abs(divergence - kl) < 1e-12
        whole = whole + kl
    else:
        assert divergence is None
    for ours, exact in zip(found, torch.autograd.grad(whole, (weight, hidden)), strict=True):
        assert (ours - exact).abs().max() < 1e-12

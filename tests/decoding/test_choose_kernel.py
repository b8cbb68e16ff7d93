"""The Triton kernel that samples codes, in Triton's interpreter, against the decoder's own sampler."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zipar_train.decoding.sampling import guide, sample

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is for machines without a GPU"
)


@st.composite
def logits(draw):
    """Logits (2, V), some of them equal, and how to sample from them."""
    entries = draw(st.integers(2, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(2, entries, generator=generator) * draw(st.sampled_from([0.3, 3.0, 30.0]))
    if draw(st.booleans()):
        values = values.round()
    return values, {
        "temperature": draw(st.sampled_from([0.0, 0.7, 1.0])),
        "top_k": draw(st.integers(0, entries)),
        "top_p": draw(st.sampled_from([1.0, 0.9, 0.3])),
    }, draw(st.sampled_from([1.0, 3.0])), draw(st.integers(-(2**63), 2**63 - 1))  # fmt: skip


@given(logits())
@settings(max_examples=60)
def test_codes_are_sampled_as_the_decoder_samples_them(drawn):
    """Top-p of equal logits differs: the kernel keeps or discards them together, transformers by their order."""
    from zipar_train.decoding.kernels import ends

    values, how, guidance, seed = drawn
    entries = values.shape[1]
    if how["top_p"] < 1 and len(values[0].unique()) < entries:
        how["top_p"] = 1.0
    tokens, seeds = torch.full((1, 3), -9), torch.tensor([[0, seed, 0]])
    wide = 1 << (entries - 1).bit_length()
    ends.choose[(1, 1)](
        values, torch.zeros(wide, dtype=torch.int32), seeds, tokens, torch.tensor([1, 2]), torch.tensor([0, 1]),
        torch.tensor([0]), torch.tensor([1, 0]), 1, 1, 3, 1, 2, guidance, how["temperature"] or 1.0,
        min(how["top_k"] or entries, entries), how["top_p"], V=entries, BV=wide, BC=min(wide, 16),
        GUIDED=guidance != 1, GREEDY=how["temperature"] == 0, FILTERED=how["top_k"] > 0 or how["top_p"] < 1, PDL=False,
    )  # fmt: skip
    guided = guide(values, guidance) if guidance != 1 else values[:1]
    assert tokens.tolist() == [[-9, int(sample(guided, torch.tensor([seed]), **how)), -9]]

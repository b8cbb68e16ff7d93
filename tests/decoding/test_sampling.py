"""Sampling against transformers' own distributions, and uniforms against their promise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from zipar_train.decoding.sampling import sample, uniforms

SETTINGS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.6), (1.3, 5, 0.8)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_frequencies_are_the_distribution(temperature, top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(1, 9) * 2
    grid = (torch.arange(20000) + 0.5) / 20000  # an even walk over [0, 1): no sampling noise
    codes = sample(logits.expand(20000, -1), grid, temperature=temperature, top_k=top_k, top_p=top_p)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(None, logits).softmax(-1)[0]
    assert (torch.bincount(codes, minlength=9) / 20000 - expected).abs().max() < 2e-4


@given(st.floats(0, 1, exclude_max=True), st.lists(st.floats(-30, 30), min_size=2, max_size=20), st.integers(1, 20))
@settings(max_examples=300)
def test_a_code_of_probability_zero_is_never_drawn(uniform, logits, keep):
    row = torch.tensor(logits)[None]
    rounded = torch.tensor([np.floor(uniform * 2**24) / 2**24], dtype=torch.float32)
    code = sample(row, rounded, temperature=1.0, top_k=keep, top_p=1.0)
    threshold = row.topk(min(keep, row.shape[1])).values[0, -1]
    assert row[0, code] >= threshold


def test_temperature_zero_is_the_most_probable():
    logits = torch.randn(50, 9)
    assert torch.equal(sample(logits, torch.rand(50), temperature=0, top_k=0, top_p=1.0), logits.argmax(-1))


def test_an_images_uniforms_are_its_own():
    whole = uniforms(list(range(10)), 64, seed=3)
    assert torch.equal(uniforms([7, 2], 64, seed=3), whole[[7, 2]])
    assert torch.equal(uniforms([7], 16, seed=3)[0], whole[7, :16])
    assert not torch.equal(uniforms([7], 64, seed=4)[0], whole[7])
    assert whole.min() >= 0
    assert whole.max() < 1
    assert abs(uniforms(list(range(100)), 1000, seed=0).mean() - 0.5) < 0.005

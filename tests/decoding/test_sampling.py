"""Sampling against transformers' own distributions, and the noise against an independent generator."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from noise import pick, seed_of, splitmix64
from noise import uniform as independent
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from zipar_train.decoding.sampling import code_seeds, sample, sample_from, uniform

SETTINGS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.6), (1.3, 5, 0.8)]
MANY = 400_000
SEEDS = st.integers(-(2**63), 2**63 - 1)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_frequencies_are_the_distribution(temperature, top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(1, 9) * 2
    seeds = code_seeds([0], MANY, seed=0)[0]
    codes = sample(logits.expand(MANY, -1), seeds, temperature=temperature, top_k=top_k, top_p=top_p)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(None, logits).softmax(-1)[0].double()
    found = torch.bincount(codes, minlength=9) / MANY
    assert ((found - expected).abs() <= 4.5 * (expected * (1 - expected) / MANY).sqrt()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rare_codes_are_as_frequent_as_their_probability(dtype):
    """100 codes of probability 1e-5 beside one of 0.999: noise of 16 bits would be too coarse."""
    logits = torch.tensor([math.log(0.999), *[math.log(1e-5)] * 100], dtype=torch.float64).to(dtype)
    expected = 1 - logits.double().softmax(-1)[0].item()
    rare = sum(
        int((sample(logits.expand(len(s), -1), s, temperature=1.0, top_k=0, top_p=1.0) > 0).sum())
        for s in code_seeds([3], MANY, seed=1)[0].split(20_000)
    )
    assert abs(rare / MANY - expected) <= 4.5 * (expected / MANY) ** 0.5


@given(SEEDS, st.lists(st.floats(-30, 30), min_size=2, max_size=20), st.integers(1, 20))
@settings(max_examples=300)
def test_a_code_of_probability_zero_is_never_sampled(seed, logits, keep):
    row = torch.tensor(logits)[None]
    code = sample(row, torch.tensor([seed]), temperature=1.0, top_k=keep, top_p=1.0)
    threshold = row.topk(min(keep, row.shape[1])).values[0, -1]
    assert row[0, code] >= threshold


@given(SEEDS, st.integers(0, 4), st.sampled_from([110.0, 1e4, 1e30, 3e38]))
@settings(max_examples=100)
def test_float32_edges_sample_the_certain_code(seed, certain, gap):
    """The other probabilities round to zero; huge logits of either sign, and -infinity, change nothing."""
    for low in (-gap, -torch.inf):
        row = torch.full((1, 5), low)
        row[0, certain] = 0
        for shift in (0, min(gap, 1e4), -min(gap, 1e4)):
            assert sample(row + shift, torch.tensor([seed]), temperature=1.0, top_k=0, top_p=1.0) == certain
    assert sample_from(torch.tensor([[0.0, 1e-38, 0.0]]), torch.tensor([seed])) == 1


def test_temperature_zero_is_the_most_probable():
    logits = torch.randn(50, 9)
    seeds = code_seeds([0], 50, seed=0)[0]
    assert torch.equal(sample(logits, seeds, temperature=0, top_k=0, top_p=1.0), logits.argmax(-1))


@given(SEEDS, st.integers(1, 50))
@settings(max_examples=200)
def test_the_noise_is_splitmix64(seed, entries):
    found = uniform(torch.tensor([seed, 1]), entries)
    assert found.dtype == torch.float64
    assert np.array_equal(found[0].numpy(), independent(seed, entries))
    assert found.min() > 0 and found.max() < 1


def test_the_generator_is_the_published_one():
    """The first outputs of SplitMix64 from seed 1234567, as its reference implementation prints them (Rosetta Code)."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(1234567, 5).tolist() == expected


def test_the_lowest_and_the_highest_number_are_inside_the_interval():
    """The seeds whose outputs are the extreme integers give 2^-53 and 1 - 2^-53, whose logarithms are finite."""
    seeds = torch.tensor([seed_of(2**63), seed_of(2**63 - 1)])
    assert uniform(seeds, 1)[:, 0].tolist() == [2.0**-53, 1 - 2.0**-53]
    assert sample_from(torch.tensor([[0.0, 1.0]] * 2), seeds).tolist() == [1, 1]


@given(SEEDS, st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_a_sample_is_the_argmax_of_gumbel_noise(seed, weights):
    p = torch.tensor([*weights, 0.5], dtype=torch.float64)
    assert sample_from(p[None], torch.tensor([seed])).item() == pick(p.numpy(), seed)


def test_an_images_seeds_are_its_own():
    whole = code_seeds(list(range(10)), 64, seed=3)
    assert whole.dtype == torch.int64
    assert torch.equal(code_seeds([7, 2], 64, seed=3), whole[[7, 2]])
    assert torch.equal(code_seeds([7], 16, seed=3)[0], whole[7, :16])
    assert not torch.equal(code_seeds([7], 64, seed=4)[0], whole[7])
    assert len(whole.unique()) == 640


def test_noise_is_uniform_and_independent_between_codes_and_entries():
    u = uniform(code_seeds(list(range(100)), 100, seed=0), 100).flatten(0, 1)  # (codes, entries)
    assert abs(u.mean() - 0.5) < 1e-3
    assert abs(u.var() - 1 / 12) < 1e-3
    centred = (u - 0.5) * 12**0.5
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(100, 0)):
        assert abs((centred * other).mean()) < 4.5 / 1000


def test_the_same_noise_gives_similar_distributions_the_same_code():
    """At least (1 - TV) / (1 + TV) of the time, TV their total variation."""
    torch.manual_seed(0)
    before = torch.randn(512)
    p, q = before.softmax(-1), (before + 0.3 * torch.randn(512)).softmax(-1)
    apart = float((p - q).abs().sum() / 2)
    seeds = code_seeds([0], 20_000, seed=0)[0]
    same = (sample_from(p.expand(20_000, -1), seeds) == sample_from(q.expand(20_000, -1), seeds)).double().mean()
    assert same >= (1 - apart) / (1 + apart) - 0.02
    assert same < 1

"""Lookahead generates the same images in fewer passes: against plain decoding, the exact law, and one forward pass."""

import itertools
from functools import cache

import graphs
import pytest
import torch
from families import StockLlama, llamagen, llamagen_t2i
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import grids, windows
from pydantic import ValidationError
from theorem import check_theorem, drawn_and_seen

from zipar_train import Grid, Plan
from zipar_train.decoding import decoder as module
from zipar_train.decoding.adaptive.decoder import AdaptiveDecoder
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.fused_llama import fuse_for_inference
from zipar_train.decoding.sampling import code_seeds
from zipar_train.models.family import teacher_forced
from zipar_train.plan.masks import dense
from zipar_train.recipe.schema import SamplingParams


def both(family, plan, sampling, condition, images, *, lookahead, seed=0, **how):
    """Codes with and without lookahead, and the passes with it."""
    seeds = code_seeds(list(range(images)), plan.grid.num_codes, seed=seed)
    plain = Decoder(family, plan, **how)
    codes = plain(condition, seeds, sampling)
    assert plain.passes(images) == [plan.passes] * images
    decoder = Decoder(family, plan, **how)
    ahead = decoder(condition, seeds, sampling.model_copy(update={"lookahead": lookahead}))
    return codes, ahead, decoder.passes(images)


@pytest.mark.slow(seconds=25)
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    prompt=st.integers(1, 4),
    guidance=st.sampled_from([1.0, 2.5]),
    how=st.sampled_from([{}, {"temperature": 0.0}, {"temperature": 0.8, "top_k": 4, "top_p": 0.9}]),
    stand_in=st.sampled_from(["nearest", "completed", "released"]),
    first_row=st.sampled_from(["complete", "overlapping"]),
    lookahead=st.integers(1, 50),
    images=st.integers(1, 5),
    data=st.data(),
)
@settings(max_examples=120)
def test_every_code_is_that_of_plain_decoding(
    height, width, prompt, guidance, how, stand_in, first_row, lookahead, images, data
):
    """In float64, for all grids, windows, prompts, numbers of images and slots per pass, in no more passes."""
    if data.draw(st.booleans()):
        family = llamagen(height, width)
    else:
        family = StockLlama(data.draw(grids(height, width)), prompt=prompt)
    rule = {"stand_in": stand_in, "first_row": first_row, "prompt": family.prompt_length}
    plan = Plan.zipar(family.grid, **data.draw(windows(family.grid)), **rule)
    sampling, labels = SamplingParams(guidance=guidance, **how), [k % 3 for k in range(images)]
    codes, ahead, passes = both(family, plan, sampling, labels, images, lookahead=lookahead)
    assert torch.equal(ahead, codes)
    assert len(passes) == images
    assert max(passes) <= plan.passes
    if lookahead == 1 and plan.width == 1:
        assert passes == [plan.passes] * images


@pytest.mark.slow
@given(
    grid=grids(),
    prompt=st.integers(1, 3),
    guidance=st.sampled_from([1.0, 2.5]),
    lookahead=st.integers(1, 30),
    data=st.data(),
)
@settings(max_examples=80)
def test_the_theorem_holds_for_accepted_logits(grid, prompt, guidance, lookahead, data):
    """Every code is accepted once, from the logits that one teacher-forced pass over the image gives."""
    plan = Plan.zipar(grid, **data.draw(windows(grid)), prompt=prompt)
    sampling = SamplingParams(guidance=guidance, lookahead=lookahead)
    check_theorem(StockLlama(grid, prompt=prompt), plan, sampling, dense(plan))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("window", "guidance", "lookahead"), [(6, 1.0, 9), (3, 2.0, 16), (1, 1.0, 40)])
def test_the_theorem_of_llamagen(window, guidance, lookahead, fused):
    family = llamagen(6, 6)
    assert not fused or fuse_for_inference(family.model)
    plan = Plan.zipar(family.grid, window=window)
    check_theorem(family, plan, SamplingParams(guidance=guidance, lookahead=lookahead), dense(plan))


@pytest.mark.parametrize(("window", "guidance", "lookahead"), [(5, 1.0, 8), (3, 2.0, 3), (2, 2.0, 20), (1, 1.0, 12)])
def test_padded_captions(window, guidance, lookahead):
    family = llamagen_t2i(4, 5)
    plan = Plan.zipar(family.grid, window=window, prompt=3)
    captions = family.check([torch.randn(n, 6) for n in (3, 1, 2)])
    sampling = SamplingParams(guidance=guidance)
    codes, ahead, passes = both(family, plan, sampling, captions, 3, lookahead=lookahead)
    assert torch.equal(ahead, codes)
    assert max(passes) <= plan.passes
    sampling = sampling.model_copy(update={"lookahead": lookahead})
    codes, seen = drawn_and_seen(family, plan, sampling, captions, images=3)
    if guidance != 1:
        null = family.drop(captions, torch.ones(3, dtype=torch.bool))
        captions = type(captions)(*(torch.cat(parts) for parts in zip(captions, null, strict=True)))
        codes = torch.cat([codes, codes])
    with torch.no_grad():
        forced = teacher_forced(family, plan, codes, captions, dense(plan))
    assert (forced - seen).abs().max() <= 1e-10


@pytest.mark.parametrize("window", [6, 2])
def test_an_image_is_the_same_in_any_batch_and_at_any_lookahead(window):
    """In float64; the decoder is used again, for other numbers of images and slots, and after an interruption."""
    family = llamagen(6, 6)
    decoder, labels = Decoder(family, Plan.zipar(family.grid, window=window)), [k % 3 for k in range(12)]
    seeds = code_seeds(list(range(12)), 36, seed=5)
    whole = decoder(labels, seeds, SamplingParams(guidance=2.0))
    counts: dict[int, list[int]] = {}

    def interrupt(targets, logits):
        raise KeyboardInterrupt

    for size, lookahead in itertools.product((12, 1, 5), (1, 8, 36)):
        sampling = SamplingParams(guidance=2.0, lookahead=lookahead)
        with pytest.raises(KeyboardInterrupt):
            decoder(labels[:size], seeds[-size:], sampling, observe=interrupt)
        parts, passes = [], []
        for start in range(0, 12, size):
            parts.append(decoder(labels[start : start + size], seeds[start : start + size], sampling))
            passes += decoder.passes(len(parts[-1]))
        assert torch.equal(torch.cat(parts), whole)
        assert passes == counts.setdefault(lookahead, passes)  # an image's passes do not depend on its batch either
    assert sum(counts[36]) < sum(counts[8]) < sum(counts[1])
    assert len(set(counts[8])) > 1  # images have different progress


@pytest.mark.slow
def test_an_image_is_the_same_in_float32_in_most_batches():
    """Passes of other shapes round differently, which may change a code whose two best candidates nearly tie."""
    family = llamagen(6, 6, dtype=torch.float32)
    plan = Plan.zipar(family.grid, window=3)
    codes, ahead, _ = both(family, plan, SamplingParams(), [k % 3 for k in range(200)], 200, lookahead=16)
    assert (codes == ahead).flatten(1).all(1).double().mean() >= 0.99


@pytest.fixture
def recorder(monkeypatch):
    """CUDA graphs that work on the CPU, with small buckets."""
    monkeypatch.setattr(module, "BUCKET", 8)
    return graphs.install(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "guidance"), [(6, 1.0), (3, 2.0), (1, 1.0)])
@pytest.mark.parametrize("lookahead", [6, 20])
def test_captured_passes(recorder, window, guidance, lookahead):
    """A graph for each number of keys; the host looks every few passes, and finished images stay as they are."""
    family = llamagen(6, 6)
    plan, sampling = Plan.zipar(family.grid, window=window), SamplingParams(guidance=guidance, lookahead=lookahead)
    decoder = Decoder(family, plan, capture=True)
    for labels in ([0, 1, 2], [2, 2, 0], [1], [0, 1, 1]):
        seeds = code_seeds(list(range(len(labels))), 36, seed=len(labels))
        plain = Decoder(family, plan)(labels, seeds, sampling.model_copy(update={"lookahead": 0}))
        assert torch.equal(decoder(labels, seeds, sampling), plain)
        assert max(decoder.passes(len(labels))) <= plan.passes
    assert 0 < recorder.recorded < recorder.replayed
    assert len(decoder.captured.graphs) <= 2 + -(-len(plan) // 8)


@cache
def small(window: int) -> tuple[StockLlama, Plan]:
    """A model of 3 codes on a 2 x 3 grid whose codes depend strongly on each other."""
    family = StockLlama(Grid(2, 3), codes=3, layers=1)
    family.model.float()
    return family, Plan.zipar(family.grid, window=window, prompt=family.prompt_length)


@pytest.mark.slow(seconds=30)
@pytest.mark.parametrize(("window", "lookahead"), [(3, 6), (1, 4)])
def test_the_joint_distribution_is_exact(window, lookahead):
    """400,000 images against the product of conditionals of all 729: total variation within the noise of sampling."""
    family, plan = small(window)
    every = torch.tensor(list(itertools.product(range(3), repeat=6)))
    with torch.no_grad():
        logits = teacher_forced(family, plan, every, torch.zeros(729, dtype=torch.long), dense(plan))
    law = logits.double().log_softmax(-1).gather(-1, every[..., None])[..., 0].sum(1).exp()
    assert law.sum() == pytest.approx(1, abs=1e-6)
    decoder, counts, passes, many = Decoder(family, plan), torch.zeros(729, dtype=torch.double), [], 20_000
    place = 3 ** torch.arange(5, -1, -1)
    for start in range(0, 400_000, many):
        seeds = code_seeds(list(range(start, start + many)), 6, seed=0)
        codes = decoder(torch.zeros(many, dtype=torch.long), seeds, SamplingParams(lookahead=lookahead))
        counts += torch.bincount((codes.flatten(1) * place).sum(1), minlength=729)
        passes += decoder.passes(many)
    assert 1 < sum(passes) / len(passes) < plan.passes
    apart = (counts / counts.sum() - law).abs().sum() / 2
    noise = (law * (1 - law) / counts.sum() * 2 / torch.pi).sqrt().sum() / 2  # expected, of an exact sampler
    assert apart <= 1.15 * noise


def test_numbers_of_slots_that_make_no_sense_are_refused():
    for wrong in (-1, 1.5, True, "8", 65537):
        with pytest.raises(ValidationError, match="lookahead"):
            SamplingParams(lookahead=wrong)


def test_other_decoders_have_no_lookahead():
    family, sampling = llamagen(4, 4), SamplingParams(lookahead=8)
    plan = Plan.zipar(family.grid, window=2, stand_in="released")
    with pytest.raises(ValueError, match="the released decoder has no lookahead: set lookahead to 0"):
        Decoder(family, plan, released=True)([0], code_seeds([0], 16, seed=0), sampling)
    with pytest.raises(ValueError, match="adaptive windows have no lookahead: set lookahead to 0"):
        AdaptiveDecoder(family, window=2)([0], code_seeds([0], 48, seed=0), sampling)

"""The pass that generates each code, from `Generator.generate(trace=True)`."""

from pathlib import Path

import pytest
import torch
from families import llamagen, random_digits
from hypothesis import given, settings
from hypothesis import strategies as st

from zipar_train import Plan
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.pass_record import PassRecord
from zipar_train.decoding.sampling import code_seeds
from zipar_train.recipe.schema import SamplingParams


@given(
    window=st.integers(1, 5), lookahead=st.integers(1, 20), guidance=st.sampled_from([1.0, 2.0]), seed=st.integers(0, 9)
)
@settings(max_examples=30, deadline=None)
def test_a_record_equals_what_the_token_buffer_shows(window, lookahead, guidance, seed):
    """Independently: after each pass, the codes whose slots are behind the decoder's place are the image's, for good.

    The pass that generates a code is the first one after which its predicting slot has been passed.
    """
    family = llamagen(4, 5)
    plan = Plan.zipar(family.grid, window=window, prompt=family.prompt_length)
    decoder, record, places = Decoder(family, plan), PassRecord(20), []

    def observe(targets, logits):
        record(targets, logits)
        places.append(decoder.state.slot.clone())

    seeds = code_seeds([0, 1, 2], 20, seed=seed)
    codes = decoder([0, 1, 2], seeds, SamplingParams(guidance=guidance, lookahead=lookahead), observe=observe)
    predicting = torch.from_numpy(plan.predicting())
    passed = torch.stack(places)[:, :, None] > predicting  # (passes, B, N)
    assert torch.equal(record.passes(), (~passed).sum(0))
    assert record.passes().amax(1).add(1).tolist() == decoder.passes(3)
    assert torch.equal(codes, Decoder(family, plan)([0, 1, 2], seeds, SamplingParams(guidance=guidance)))


@pytest.fixture(scope="module")
def generator():
    return random_digits()


def test_a_trace_by_mode(generator):
    """Without lookahead by the plan; with it no later, code by code; adaptive windows by each image's own plan."""
    labels, wanted = [1, 2, 3], Plan.zipar(generator.inference_family.grid, window=2).generated_at()
    planned = generator.generate(labels, window=2, trace=True, batch_size=2)
    assert planned.generated_at.flatten(1).tolist() == [wanted.tolist()] * 3
    ahead = generator.generate(labels, window=2, trace=True, batch_size=2, lookahead=16)
    assert torch.equal(ahead.codes, planned.codes)
    assert torch.equal(ahead.generated_at.flatten(1).amax(1) + 1, ahead.passes)
    assert (ahead.generated_at >= 0).all() and (ahead.generated_at <= planned.generated_at).all()
    adaptive = generator.generate(labels, window=2, trace=True, mode="adaptive", batch_size=3)
    plans = generator.decoder(2, mode="adaptive").plans(3)
    assert adaptive.generated_at.flatten(1).tolist() == [plan.generated_at().tolist() for plan in plans]
    assert torch.equal(adaptive.generated_at.flatten(1).amax(1) + 1, adaptive.passes)
    assert generator.generate(labels, window=2).generated_at is None
    assert repr(planned) == "Images(3 of 8 x 8 codes, 28 passes on average)"


def test_images_animate_themselves(generator, tmp_path):
    shown = generator.generate([1], window=2, trace=True)
    shown.animate(tmp_path / "grow.gif", title="window 2", beside=[("next-token", generator.generate([1], trace=True))])
    assert Path(tmp_path / "grow.gif").read_bytes().startswith(b"GIF89a")

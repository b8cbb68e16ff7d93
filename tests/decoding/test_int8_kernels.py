"""Int8 weights in the Triton kernels, in Triton's interpreter: whole images of models with rounded layers."""

import os

import pytest
import small
import torch

from zipar_train import Plan
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.fused_llama import fuse_for_inference
from zipar_train.decoding.int8 import Int8Linear
from zipar_train.decoding.sampling import code_seeds
from zipar_train.recipe.schema import SamplingParams

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is for machines without a GPU"
)


@pytest.mark.slow(60)
@pytest.mark.parametrize("kind", ["llamagen", "lumina"])
def test_fused_passes_generate_the_codes_of_plain_ones(monkeypatch, kind):
    """The kernels multiply inputs in float32; so must the plain passes here, which round them on a CPU."""
    from zipar_train.decoding.kernels.fused_decoder import FusedDecoder

    family, floats = (small.family(kind, 2, head=32, grid=(2, 4)) for _ in range(2))
    for model in (family.model, floats.model):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(8)
    condition = small.a_batch(kind, family).condition
    fuse_for_inference(family.model, least=10**9, int8=True)
    fuse_for_inference(floats.model, least=10**9)
    plan = Plan.zipar(family.grid, window=2, prompt=family.prompt_length)
    seeds, sampling = code_seeds([0, 1], plan.grid.num_codes, seed=0), SamplingParams()

    def decode(make, model):
        seen = []
        codes = make(model, plan)(condition, seeds, sampling, observe=lambda target, found: seen.append(found.clone()))
        return codes, seen

    monkeypatch.setattr(Int8Linear, "forward", Int8Linear.with_exact_input)
    codes, logits = decode(Decoder, family)
    fused, same = decode(FusedDecoder, family)
    assert torch.equal(fused, codes)
    largest = max(found.abs().max() for found in logits)
    # a fused pass has room for more slots than it feeds: those of the first image are the first
    for ours, theirs in zip(logits, same, strict=True):
        assert (ours - theirs[:, : ours.shape[1]]).abs().max() < 1e-4 * largest
    exact = decode(Decoder, floats)[1][0]
    assert (exact - logits[0]).abs().max() > 1e-3 * largest  # rounding matters

"""Bits per code, against the chain rule of the decoder; of how many images they are."""

from math import log

import pytest
import torch
from families import llamagen
from transformers import DynamicCache

from zipar_train import Plan
from zipar_train.data.batch import Batch
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.sampling import code_seeds
from zipar_train.evaluation.likelihood import bits_by_decoding, bits_per_code
from zipar_train.plan.masks import dense, unwritten_slots_mask
from zipar_train.recipe.schema import SamplingParams


@pytest.mark.parametrize("window", [6, 3, 1])
def test_bits_are_the_chain_rule_of_the_decoder(window):
    """-log2 of the product of the probabilities with which the decoder itself would have drawn the image."""
    family = llamagen(6, 6)
    plan = Plan.zipar(family.grid, window=window)
    probabilities = []

    def observe(targets, logits):
        for column, target in enumerate(targets[0].tolist()):
            if target < 36:
                probabilities.append(logits[:, column].log_softmax(-1))
                order.append(target)

    order: list[int] = []
    labels = torch.tensor([2, 0])
    codes = Decoder(family, plan)(labels, code_seeds([0, 1], 36, seed=0), SamplingParams(), observe=observe).flatten(1)
    chain = -sum(p.gather(1, codes[:, [n]]).sum().item() for p, n in zip(probabilities, order, strict=True))

    class One:
        def __iter__(self):
            yield Batch(codes, labels)

    assert bits_per_code(family, plan, One()) == pytest.approx(chain / 72 / log(2), rel=1e-12)
    assert bits_by_decoding(Decoder(family, plan), One()) == pytest.approx(chain / 72 / log(2), rel=1e-12)


def test_bits_of_the_released_decoder_are_those_of_a_cache_of_zeros():
    """Unwritten slots as zero keys and values in one teacher-forced pass, and the stock layers' own attention."""
    family = llamagen(5, 5)
    plan = Plan.zipar(family.grid, window=2, stand_in="released")
    codes, labels = torch.randint(7, (3, 25)), torch.tensor([0, 1, 2])
    mask = torch.cat([dense(plan), unwritten_slots_mask(plan)], dim=-1)

    class Zeros(DynamicCache):
        def update(self, keys, values, *args, **kwargs):
            return tuple(torch.cat([t, t.new_zeros(*t.shape[:2], 25, t.shape[-1])], dim=2) for t in (keys, values))

    tokens = codes[:, torch.tensor(plan.source[1:])]
    embeddings = torch.cat([family.prompt(labels), family.embed(tokens)], dim=1)
    with torch.no_grad():
        hidden = family.hidden(embeddings, torch.tensor(plan.position), mask, Zeros())
        logits = family.head(hidden)[:, torch.tensor(plan.target) >= 0]
    wanted = codes[:, torch.tensor(plan.target[plan.target >= 0])]
    truth = -logits.log_softmax(-1).gather(-1, wanted[..., None]).mean().item() / log(2)

    class One:
        def __iter__(self):
            yield Batch(codes, labels)

    assert bits_by_decoding(Decoder(family, plan, released=True), One()) == pytest.approx(truth, rel=1e-12)
    assert bits_by_decoding(Decoder(family, plan), One()) != pytest.approx(truth, rel=1e-4)


def test_bits_are_of_as_many_images_as_is_said():
    family = llamagen(8, 8)

    plan = Plan.raster(family.grid)
    codes = torch.randint(family.codebook_size, (9, 64))
    parts = [Batch(codes[k : k + 3], torch.tensor([0, 1, 2])) for k in (0, 3, 6)]
    assert bits_per_code(family, plan, parts, images=4) == pytest.approx(
        bits_per_code(family, plan, [Batch(codes[:4], torch.tensor([0, 1, 2, 0]))]), rel=1e-12
    )
    assert bits_per_code(family, plan, parts, images=100) == bits_per_code(family, plan, parts)

"""LlamaGen's own facts, against independent arithmetic: rotary positions, sizes, the loss of the transformers class."""

import cmath

import pytest
import torch
from families import llamagen
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from zipar_train.models.family import build
from zipar_train.models.llamagen.family import SIZES
from zipar_train.models.llamagen.rope import Rope2D
from zipar_train.models.restore import LoadedWeights, load_family
from zipar_train.recipe.load import load_recipe
from zipar_train.recipe.model import Model


def original_rotation(x, *, columns, prompt, base=10000.0):
    """LlamaGen's rotary embedding in complex numbers (gpt.py: precompute_freqs_cis_2d, apply_rotary_emb).

    Pairs of neighbours (2 i, 2 i + 1) of a head turn together: the first half of the pairs by the row, the second by
    the column, each with base ** -(2 j / half) for j = 0, 1, ...; prompt tokens become zero. x: (S, head).
    """
    length, head = x.shape
    half = head // 2
    turned = torch.zeros_like(x)
    for position in range(prompt, length):
        row, column = divmod(position - prompt, columns)
        for pair in range(half):
            quarter = half // 2
            along, j = (row, pair) if pair < quarter else (column, pair - quarter)
            z = complex(x[position, 2 * pair], x[position, 2 * pair + 1])
            z *= cmath.exp(1j * along * base ** -(2 * j / half))
            turned[position, 2 * pair], turned[position, 2 * pair + 1] = z.real, z.imag
    return turned


@pytest.mark.parametrize(("columns", "prompt", "head"), [(5, 1, 8), (3, 4, 12), (7, 1, 32)])
def test_rotation_is_the_originals(columns, prompt, head):
    torch.manual_seed(0)
    length = prompt + 3 * columns
    q, k = torch.randn(2, length, head, dtype=torch.float64)
    split = torch.cat([torch.arange(0, head, 2), torch.arange(1, head, 2)])  # neighbours to transformers' two halves
    cos, sin = Rope2D(head, columns, prompt)(q[None], torch.arange(length)[None])
    ours_q, ours_k = apply_rotary_pos_emb(q[None, None, :, split], k[None, None, :, split], cos, sin)
    for ours, x in ((ours_q, q), (ours_k, k)):
        theirs = original_rotation(x, columns=columns, prompt=prompt)
        assert (ours[0, 0] - theirs[:, split]).abs().max() < 1e-12
    assert not ours_q[0, 0, :prompt].any()


@pytest.mark.parametrize(("size", "parameters"), [("B", 110_888_448), ("L", 342_910_976), ("XL", 774_699_520)])
def test_sizes_have_the_published_number_of_parameters(size, parameters):
    model = Model(family="llamagen", size=size, grid=[24, 24], codebook_size=16384, num_classes=1000)
    family = build(model, device="meta")
    assert sum(p.numel() for p in family.model.parameters()) == parameters
    assert size in SIZES


def test_the_transformers_class_has_its_usual_loss():
    model = llamagen(3, 4).model
    ids = torch.cat([torch.full((2, 1), 8), torch.randint(7, (2, 12))], dim=1)
    out = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    assert torch.allclose(out.loss, expected)


def test_another_number_of_heads_is_refused_though_every_tensor_fits(tmp_path):
    recipe = load_recipe("digits-base")
    other = load_recipe("digits-base", ["model.num_heads=2"])
    saved = LoadedWeights(tmp_path, recipe, build(recipe.model).model.state_dict(), {})
    load_family(recipe.model, saved)
    with pytest.raises(ValueError, match="has 4 attention heads, the model of this recipe 2"):
        load_family(other.model, saved)


@pytest.mark.parametrize("labels", [[10], [-1], [0.5], [], [[1]]])
def test_labels_that_are_no_classes_are_refused(labels):
    with pytest.raises(ValueError, match="label"):
        llamagen(2, 2, classes=10).check(labels)

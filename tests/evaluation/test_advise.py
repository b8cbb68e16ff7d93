"""Window advice: what is cut off against the decode order, attention against transformers' own, the advice's words."""

import json

import numpy as np
import pytest
import torch
from commands import sets
from families import llamagen
from PIL import Image

from zipar_train import Plan
from zipar_train.data.batch import Batch
from zipar_train.evaluation.window_advice import _by_offset, advise, attention, cut_off
from zipar_train.plan.grid import Grid
from zipar_train.recipe.load import load_recipe
from zipar_train.training.fit import fit


@pytest.mark.parametrize("row_end", [False, True])
@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_cut_off_is_what_is_drawn_later(window, row_end):
    """A code is fed in the pass after the one that draws it, so an earlier code is seen if it was drawn before."""
    plan = Plan.zipar(Grid(4, 5, row_end), window=window, prompt=3)
    drawn = plan.generated_at().flatten()
    cut = cut_off(plan)
    for n in range(20):
        for m in range(20):
            assert cut[n, m] == (m < n and drawn[m] >= drawn[n]), (n, m)
    assert cut.any() == (window < plan.grid.row_length)


def test_attention_is_transformers_own():
    """Against eager attention's returned weights, layer by layer; and afterwards sdpa is itself again."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    family = llamagen(4, 4)
    plan = Plan.raster(family.grid)
    codes, labels = torch.randint(family.codebook_size, (3, 16)), torch.tensor([0, 1, 2])

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def update(self, count):
            self.count = getattr(self, "count", 0) + count

    bar = Bar()
    found = attention(family, plan, iter([Batch(codes[:2], labels[:2]), Batch(codes[2:], labels[2:])]), bar=bar)
    assert bar.count == 3 and ALL_ATTENTION_FUNCTIONS["sdpa"] is stock
    family.model.set_attn_implementation("eager")
    embeddings = torch.cat([family.prompt(labels), family.embed(codes[:, :-1])], dim=1)
    causal = torch.full((1, 1, 16, 16), float("-inf"), dtype=embeddings.dtype).triu(1)
    with torch.no_grad():
        out = family.model.model(
            inputs_embeds=embeddings, attention_mask=causal, output_attentions=True, position_ids=torch.arange(16)[None]
        )
    assert len(found) == len(out.attentions)
    for ours, theirs in zip(found, out.attentions, strict=True):
        expected = theirs.mean((0, 1))[:, 1:].numpy()
        assert np.allclose(ours[:, :15], expected, atol=1e-6)
        assert (ours[:, 15] == 0).all() and ours.sum(1).max() < 1


def test_offsets_are_means_over_the_pairs_there_are():
    grid = Grid(2, 3)
    weights = np.random.default_rng(0).random((6, 6))
    found = _by_offset(weights, grid)
    assert found[0][1] == pytest.approx(np.mean([weights[1, 0], weights[2, 1], weights[4, 3], weights[5, 4]]))
    assert found[1][2] == pytest.approx(np.mean([weights[3, 0], weights[4, 1], weights[5, 2]]))
    assert found[1][4] == pytest.approx(weights[3, 2])
    assert found[0][2] is None and found[0][3] is None


@pytest.mark.slow
def test_advice_follows_the_tolerance(tiny, tmp_path, run):
    recipe = load_recipe("digits-base", [*tiny, "trainer.max_epochs=6", "optim.lr=2e-2"])
    fit(recipe)
    given = {"shards": recipe.data.val, "images": 100, "lookaheads": [], "progress": False}
    found = advise(recipe, tmp_path / "run", **given, tolerance=0.0)
    assert [row.window for row in found.windows] == [8, 4, 2, 1]
    assert found.windows[0].cut == [0.0] and found.windows[0].costs == 0
    cuts = [row.cut[0] for row in found.windows]
    assert cuts == sorted(cuts) and 0 < cuts[-1] < 1
    costs = {row.window: row.costs for row in found.windows}
    for tolerance in (0.0, *(cost + 1e-9 for cost in costs.values() if cost > 0), 10.0):
        allowed = min(window for window, cost in costs.items() if cost <= tolerance)
        advice = advise(recipe, tmp_path / "run", **given, tolerance=tolerance)
        assert advice.window == allowed
        assert [pair.window for pair in advice.decode.pairs] == [w for w, cost in costs.items() if cost <= tolerance]

    arguments = ["advise", "--recipe", "digits-base", *sets(tiny), "--checkpoint", tmp_path / "run"]
    status, out, err = run(*arguments, "--tolerance", "10", "--png", "a.png", "--json", "a.json")
    assert status == 0, err
    assert "Smallest window within 1000.00% of next-token's bits: 1 (22 passes, 66% fewer)." in out
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["window"] == 1
    tried = [(pair["window"], pair["lookahead"]) for pair in told["decode"]["pairs"]]
    assert tried == [(window, slots) for window in (8, 4, 2, 1) for slots in (0, 16, 32, 64)]
    assert Image.open(tmp_path / "a.png").size[0] > 1000
    mistakes = {
        ("--tolerance", "-1"): "must be 0 or more",
        ("--windows", "9"): "window 9 does not fit",
        ("--shards", "gone.json"): "gone.json",
        ("--images", "0"): "at least 1",
    }
    for wrong, message in mistakes.items():
        status, out, err = run(*arguments, *wrong)
        assert status == 2 and message in err and "Traceback" not in err

"""The variants of the one epoch that docs/evidence.md compares, and the limit of a window."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zipar_train import Grid, Plan

SCRIPTS = Path(__file__).parents[2] / "scripts" / "evidence"


@pytest.fixture(scope="module")
def variants():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(SCRIPTS))
    import variants

    yield variants
    patch.undo()


@given(st.data())
def test_missing_codes_are_those_generated_in_the_same_pass_or_later(variants, data):
    height, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    window = data.draw(st.integers(1, width))
    passes = [(row > 0) * width + max(0, row - 1) * window + column for row in range(height) for column in range(width)]
    wanted = [sum(passes[other] >= passes[code] for other in range(code)) for code in range(height * width)]
    assert variants.missing_context(Plan.zipar(Grid(height, width), window=window)).tolist() == wanted


@pytest.fixture
def made(variants, tmp_path):
    """Build the module of a tiny recipe, its teacher another model, and a batch."""
    from zipar_train.data.batch import Batch
    from zipar_train.models.family import build
    from zipar_train.recipe.load import load_recipe

    overrides = ["model.num_layers=2", "model.hidden_size=32", "model.grid=[5, 4]", "zipar.windows={4: 1, 2: 1, 1: 1}"]
    recipe = load_recipe("digits", [*overrides, "data.val_windows=null", "evaluate.windows=[4]"])
    codes = torch.randint(17, (3, 20), generator=torch.Generator().manual_seed(0))

    def make(**options):
        torch.manual_seed(0)
        family, teacher = build(recipe.model), build(recipe.model)
        module = variants.Variant(family, teacher=teacher, distill=0.5, windows={4: 1.0, 2: 1.0, 1: 1.0}, **options)
        return module.train(), Batch(codes=codes, condition=torch.tensor([1, 2, 3]), keys=["a", "b", "c"])

    return make


def test_windows_favoured_early_or_late_keep_their_shares(made):
    found = {}
    for order in ("mixed", "narrow first", "narrow last"):
        module, _ = made(order=order)
        found[order] = [module.sampled(0, (step + 0.5) / 600, step) for step in range(600)]
        assert all(abs(found[order].count(window) - 200) < 40 for window in (4, 2, 1)), order
    early, late = [found[order][:300].count(1) for order in ("narrow first", "narrow last")]
    assert early > 120 > 80 > late


def test_weights_of_codes_grow_with_what_they_miss(made, variants):
    module, batch = made(context=4.0)
    plain, _ = made()
    missing = {window: variants.missing_context(module.plans.plan(window)).float() for window in (4, 2, 1)}
    assert not missing[4].any() and missing[1].max() > missing[2].max()
    for window, each in missing.items():
        weights = 1 + 4 * each / missing[1].max()
        assert torch.allclose(module.weights[window], weights / weights.mean())
    condition = module.family.check(batch.condition)
    for window in (4, 2):
        loss, divergence = module.losses(batch, condition, window, with_teacher=True)
        module.weights[window].fill_(1)
        equal = module.losses(batch, condition, window, with_teacher=True)
        torch.testing.assert_close(equal, plain.losses(batch, condition, window, with_teacher=True))
        assert torch.isclose(loss, equal[0]) == torch.isclose(divergence, equal[1]) == (window == 4)


def test_the_models_own_wide_window_teaches_the_narrow_ones(made):
    module, batch = made(own=True)
    plain, _ = made()
    condition = module.family.check(batch.condition)
    wide = module.losses(batch, condition, 4, with_teacher=True)
    torch.testing.assert_close(wide, plain.losses(batch, condition, 4, with_teacher=True))
    loss, divergence = module.losses(batch, condition, 2, with_teacher=True)
    plain.teacher.family.model.load_state_dict(module.family.model.state_dict())
    torch.testing.assert_close((loss, divergence), plain.losses(batch, condition, 2, with_teacher=True))
    module.eval()
    assert module.losses(batch, condition, 2)[1] is None


def test_learning_rates_by_layer(made):
    module, _ = made(layer_decay=0.5)
    rates = {p: group["lr"] for group in module.optimizer().param_groups for p in group["params"]}
    layers = module.model.model.layers
    assert {rates[p] for p in layers[1].parameters()} == {module.lr * 0.5}
    assert {rates[p] for p in layers[0].parameters()} == {module.lr * 0.25}
    assert rates[module.model.get_input_embeddings().weight] == module.lr * 0.25
    assert len(rates) == len([p for p in module.model.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    ("curve", "stops"),
    [([1.0, 0.9, 0.8], False), ([1.0, 0.9, 0.9, 0.9, 0.9], True), ([1.0, 0.9, 0.9, 0.9, 0.8], False), ([1.0], False)],
)
def test_a_limit_is_reached_when_three_epochs_bring_nothing(variants, curve, stops):
    from limits import stopped

    assert stopped(curve) == stops


def test_a_limit_goes_on_where_it_was_interrupted(variants, monkeypatch):
    """A run that has four epochs is trained to six and then nine, and one that has ended not at all."""
    import limits

    curves, asked = [0.9, 0.8, 0.7, 0.65], []
    dataset = limits.MNIST_14

    def tuned(self, seed, *overrides, **more):
        asked.append(int(overrides[-1].rpartition("=")[2]))
        curves.extend([0.65] * (asked[-1] - len(curves)))

    monkeypatch.setattr(type(dataset), "tuned", tuned)
    monkeypatch.setattr(limits, "curve_of", lambda run, window: list(curves))
    for _ in range(2):
        run, curve = limits.limit_run(dataset, 2)
        assert asked == [6, 9] and len(curve) == 9 and run.name == "mnist-limit-2-0"

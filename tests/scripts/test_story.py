"""The project's claim, small enough for a test: an epoch under the masks mends what windows break, another does not."""

import pytest

from zipar_train import load
from zipar_train.data.loader import ShardLoader
from zipar_train.evaluation.likelihood import bits_per_code
from zipar_train.recipe.load import load_recipe
from zipar_train.training.fit import fit

pytestmark = pytest.mark.slow
SMALL = [
    "log.wandb=disabled",
    "model.num_layers=3",
    "model.hidden_size=64",
    "model.ffn_size=128",
    "trainer.accelerator=cpu",
]


@pytest.fixture(scope="module")
def bits(shards, tmp_path_factory):
    """Held-out bits a code: {run: {window: bits}} of a base, its tuned and its control run."""
    folder = tmp_path_factory.mktemp("story")
    common = [*SMALL, f"data.train={shards}/train.json", f"data.val={shards}/val.json"]
    runs = {
        "base": ("digits-base", ["trainer.max_epochs=20", "optim.lr=6e-3"]),
        "tuned": ("digits", [f"model.weights={folder}/base"]),
        "control": ("digits", [f"model.weights={folder}/base", "zipar.windows={8: 1}", "tune.distill=0"]),
    }
    found = {}
    for name, (recipe, more) in runs.items():
        fit(load_recipe(recipe, [*common, *more, f"run_dir={folder}/{name}"]))
        generator = load(folder / name)
        family = generator.inference_family
        held_out = ShardLoader(shards / "val.json", batch_size=100)
        found[name] = {window: bits_per_code(family, generator.plan(window), held_out) for window in (8, 2, 1)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("window", "costs"), [(2, 0.02), (1, 0.1)])
def test_one_epoch_under_the_masks_closes_the_gap_and_one_more_of_next_token_does_not(bits, window, costs):
    gap = bits["base"][window] - bits["base"][8]
    assert gap > costs * bits["base"][8]  # untuned, the window costs a share of all bits
    assert (bits["base"][window] - bits["tuned"][window]) / gap > 0.5
    assert (bits["base"][window] - bits["control"][window]) / gap < 0.2


def test_next_token_is_kept(bits):
    assert bits["tuned"][8] < 1.02 * bits["base"][8]
